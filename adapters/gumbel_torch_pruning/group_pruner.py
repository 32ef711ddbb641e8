"""Learned gates as a Torch-Pruning pruner: swap one class, and what leaves the network changes nothing."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from gumbel_plugin.config import ConfigLike, GatesConfig, PruningSection
from gumbel_plugin.errors import LifecycleError, TargetError
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.graph.dependency_groups import DependencyGroups, mark_outputs
from gumbel_plugin.graph.guarded_graph import GuardedPruner
from gumbel_plugin.graph.history import replay
from gumbel_plugin.graph.optimizer_state import ParameterChanges, tracked
from gumbel_plugin.graph.record import Record, units_left
from gumbel_plugin.graph.removal import closed_units
from gumbel_plugin.graph.tracing import Structure, calling, catch_up, shared_parts, traceable
from gumbel_plugin.graph.transaction import restored_on_error
from gumbel_plugin.layers.example_inputs import call_model, dtype_of, inputs_following
from gumbel_plugin.sparsity.latency import LatencyTable
from gumbel_plugin.storage.mask_format import Masks
from gumbel_plugin.training.distillation import DistillationLike, distillation_of
from gumbel_plugin.training.gate_gradients import GateGradNormalizer
from gumbel_plugin.training.group_planner import GroupMetric, GroupPlanner, Share
from gumbel_plugin.training.loop import MaskingLoop
from gumbel_plugin.training.plan import Plan, carry_over
from gumbel_plugin.training.session import MaskingSession
from gumbel_plugin.training.session_config import read_config
from gumbel_plugin.training.status import hard_gates
from gumbel_torch_pruning.arguments import check_graph, forward_of, read_arguments
from gumbel_torch_pruning.importance import GateImportance
from gumbel_torch_pruning.shares import shares

_logger = logging.getLogger(__name__)


class GumbelGroupPruner(GuardedPruner):
    """Learns which channels of each dependency group to keep, and removes the others exactly.

    Example::

        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        pruner = GumbelGroupPruner(model, example_inputs, pruning_ratio=0.5, ignored_layers=[model.fc])
        optimizer.add_param_group({"params": pruner.gate_parameters(), "lr": 0.05, "weight_decay": 0.0})
        for batch in loader:
            ...; loss.backward(); pruner.regularize(model, loss); optimizer.step(); optimizer.zero_grad()
        pruner.step()
        pruner.update_optimizer(optimizer)    # momentum follows the shrunk parameters, should training go on

    One gate per unit of a group acts at every layer that reads the group's channels, so that closing and removing are
    the same thing. All arguments of `BasePruner` mean what they mean there, with three exceptions: ``importance`` is
    not needed; ``prune_head_dims`` narrows no head, which would change its softmax; and counts are met as they are
    written: ⌊n·ratio⌋ of n channels go, where Torch-Pruning removes n − int(n·(1 − ratio)), one more wherever n·ratio
    is not whole. With another target than channels the groups share the one budget.

    Attributes:
        session: The masking session; its verbs are called by the methods here.
        distillation: What is learned from a teacher beside the task.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Any = None,
        *,
        target: GroupMetric | None = None,
        pruning: PruningSection | ConfigLike | None = None,
        total_steps: int | None = None,
        inexact: bool = False,
        latency_table: LatencyTable | None = None,
        seed: int | None = None,
        distillation: DistillationLike = None,
        **arguments: Any,
    ) -> None:
        """Build the graph and attach the gates; the model can be trained at once.

        Args:
            model: The model; its train/eval flags are kept, and if this raises it is as it was.
            example_inputs: A tensor, a tuple of positional inputs, or a dict.
            importance: Ignored by this pruner; by default `GateImportance`.
            target: What ``pruning_ratio`` is a fraction of: ``channels`` (the default; per group, or of all with
                ``global_pruning``), or the network's ``macs``, ``parameters`` or ``latency``.
            pruning: Method, rescale and budget settings: a section, or a whole configuration. A config list in it says
                which channels are gated and how many go, in place of ``pruning_ratio`` and its like; without one, its
                budget's metric, ratio and scope are other words for ``target``, ``pruning_ratio`` and
                ``global_pruning``. Without a ``gate_optimizer`` in it the gates belong into your optimizer; with one
                the pruner steps them itself.
            total_steps: How many optimizer steps will be made before each `step`; by default `USUAL_LENGTH`.
            inexact: Also gate groups whose removal changes what a normalization computes.
            latency_table: A measured table for the target ``latency``; measured here without it.
            seed: Seeds initial weights and the masks' noise; by default that of the configuration, else 0.
            distillation: What is learned from a teacher, also after `step`, until ``pruner.distillation.detach()``.
            **arguments: All other arguments of `BasePruner`: ``pruning_ratio``, ``ignored_layers``, ...

        Raises:
            ConfigError: If an argument breaks a rule or the target cannot be met.
            GraphError: If the model rejects the example inputs or has nothing to differentiate.
            TargetError: If a layer that an argument names is not in the graph, or nothing can be gated.
            LifecycleError: If the model has gates already.
        """
        pruning = PruningSection() if pruning is None else pruning
        self.distillation = distillation_of(distillation, pruning)
        self._settings, self._seed, _ = read_config(pruning, seed)
        given = {"importance": importance, **arguments}
        metric, arguments = read_arguments(model, target, given, self._settings, inexact)
        self._forward = forward_of(arguments.pop("forward_fn", None), arguments.pop("output_transform", None))
        self._own_importance = importance is None
        arguments.setdefault("importance", tp.importance.RandomImportance())
        self._total_steps = total_steps
        self._changes = ParameterChanges()
        self._running: Callable[[], Generator[Any, None, None] | None] = lambda: None  # the step that is being made
        self._found: DependencyGroups | None = None
        self._dtype = dtype_of(model)
        self.model, self.example_inputs = model, example_inputs
        with restored_on_error(model, weights_change=self._settings.weight_init != "keep"):
            self._trace(arguments)
            self._planner = GroupPlanner(
                self._settings,
                self._seed,
                self._dependency.groups,
                metric=metric,
                limit=self.max_pruning_ratio,
                round_to=self.round_to or 1,
                inexact=inexact,
                table=latency_table,
            )
            if self.iterative_steps > 1:  # a target that cannot be met shows at once, not at the last step
                self._plan(-1)
            self._attach()
            self._record = Record(model, list(self.session.plan.groups.values()))

    def _trace(self, arguments: Mapping[str, Any]) -> None:
        """Let Torch-Pruning read its arguments and trace the model."""
        inputs, named = self.example_inputs, arguments["num_heads"]
        with calling(self.model, self._forward, inputs), traceable(self.model, inputs, named):
            super().__init__(self.model, inputs, forward_fn=call_model, output_transform=mark_outputs, **arguments)
        check_graph(self, arguments, self._dependency)

    # Training -----------------------------------------------------------------------------------------------------

    def gate_parameters(self) -> list[nn.Parameter]:
        """Return the gates' parameters (and scales) for the user's optimizer; a configured one steps them by itself."""
        return [*self.session.gate_parameters(), *self.session.scale_parameters()]

    def update_regularizer(self) -> None:
        """Log where the gates stand; to be called once an epoch, as with Torch-Pruning's other pruners."""
        self._loop.after_step()
        _logger.info("%s", self.session.status())

    def regularize(self, model: nn.Module, loss: Tensor | None = None, **_: Any) -> Tensor:
        """Add the gradient of what the gates add to the loss; to be called before every step of the optimizer.

        It comes after ``loss.backward()``, ``unscale_`` and gradient clipping. Where the configuration has a
        ``gate_optimizer``, the gates are stepped here; gates that no budget steers get gradients of one size, see
        `GateGradNormalizer`. The schedules advance with the next training forward. After the last `step` no gates are
        left: this does nothing.

        Args:
            model: The pruner's model, or what wraps it.
            loss: The task's loss, checked to be finite.

        Returns:
            The gates' part of the loss.

        Raises:
            NonFiniteLossError: If the loss is NaN or infinite; the model gets its last remembered state back.
        """
        if all(module is not self.model for module in model.modules()):
            raise LifecycleError("regularize got another model than the pruner was built for")
        if not self._attached:
            return torch.zeros(())
        self._loop.after_step()  # of a step with no forward of the model since
        if loss is not None:
            self._loop.guard(loss)
        penalty = self._loop.before_step()
        self._gradients.apply()
        return penalty

    # Removing -----------------------------------------------------------------------------------------------------

    def step(self, interactive: bool = False) -> Iterator[Any] | None:
        """Decide the gates and remove what they close; afterwards the model is smaller and computes the same.

        Until the last of the ``iterative_steps`` new gates are attached to what is left; they go on where the old ones
        were, so call `update_optimizer`.

        If anything fails, model, gates and pruner are as before the step; so they are where a caller stops half-way
        (breaks out of the loop, raises, closes the generator, or calls the next verb).

        Args:
            interactive: Yield Torch-Pruning's groups instead of pruning them; call ``group.prune()`` on each. What is
                not pruned stays, with gates of its own in the next step.

        Raises:
            LifecycleError: If all ``iterative_steps`` are done, or the model's layers were changed meanwhile.
        """
        self._take_back()
        if self.current_step >= self.iterative_steps:
            raise LifecycleError(
                f"no gates are left to decide: {self.current_step} of {self.iterative_steps} iterative_steps are done"
            )
        if self._attached:
            self._structure.check(self.model)
        self._loop.after_step()
        groups = self._prune()
        self._running = weakref.ref(groups)
        if interactive:
            return groups
        with contextlib.closing(groups):
            for group in groups:
                group.prune()
        return None

    def _prune(self) -> Generator[Any, None, None]:
        with restored_on_error(self):
            self.current_step += 1
            if not self._attached:
                _logger.warning("step %d removes nothing: no group is left that can be gated", self.current_step)
                return
            self.session.extract()
            self._detach()
            plan, dependency, history = self.session.plan, self._dependency, list(self.pruning_history())
            hard = {name: mask.hard for name, mask in plan.masks.items()}
            with tracked(self.model) as self._changes:
                for name, units in closed_units(self.model, plan.groups, hard).items():
                    yield dependency.pruning_group(name, units)
            kept = self._changes.kept()
            left = {name: units_left(self.model, group, kept) for name, group in plan.groups.items()}
            self._removed(history + dependency.history(left))
            if self.current_step < self.iterative_steps and self._planner.gated(*self._asked(self.current_step + 1)):
                self._attach()
            carry_over(plan, self.session.plan if self._attached else None, left, self._changes)
            self.session.controller.go_on(self.session.progress)

    def _removed(self, history: list[Any]) -> None:
        """Note what was removed: in the record, the history, the graph, and where heads are counted."""
        self._record.add(self.model, self._changes.kept())
        self.DG._pruning_history = history
        self._dependency.count_heads()
        catch_up(self.DG, {id(change.old): change.new for change in self._changes.changes})
        self._found = None  # the groups are read again when they are asked for

    def _take_back(self) -> None:
        """Take a step back that its caller left half-way; a finished one is not changed."""
        groups = self._running()
        if groups is not None:
            groups.close()

    def update_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer go on after `step`: smaller parameters take the old ones' places, their state is cut alike.

        Args:
            optimizer: The optimizer of the model's weights (and, if they are in it, of the gates).

        Raises:
            LifecycleError: If the optimizer knows nothing of the model as it was before the step.
        """
        self._changes.apply_to(optimizer)

    def reset(self) -> None:
        """Start over: ``iterative_steps`` count from zero again, and new gates are attached to what is left."""
        self._take_back()
        with restored_on_error(self):
            super().reset()
            self._detach()
            self._attach()

    # Results ------------------------------------------------------------------------------------------------------

    def groups(self) -> list[ChannelGroup]:
        """Return every dependency group with its safety: exact, inexact or unsupported, and why."""
        return list(self._dependency.groups)

    def masks(self) -> Masks:
        """Return the masks in NNI's format, on the original network's shapes.

        They say what was removed so far; before the first `step`, what the gates would close now.
        """
        self._loop.after_step()
        if self.current_step or self._record.kept or not self._attached:
            return self._record.masks(self.model)
        terms = [term for budget in self.session.plan.budgets for term in budget.terms]
        return self.session.masks({term.name: hard_gates(term) for term in terms})

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on later: gates, schedules and what was pruned so far."""
        self._loop.after_step()
        return {
            "step": self.current_step,
            "history": [list(entry) for entry in self.pruning_history()],
            "session": self.session.state_dict() if self._attached else None,
            "gradients": self._gradients.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._loop.optimizers],
            **self.distillation.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, with a pruner that was built alike on the original, unpruned network.

        What was removed is removed again; load the model's own state dict afterwards, and give `gate_parameters` to
        the optimizer afterwards, because they are new ones.

        Raises:
            LifecycleError: If this pruner pruned something already.
            TargetError: If the state is of another network.
        """
        missing = {"step", "history", "session", "gradients"} - set(state)
        if missing:
            raise TargetError(f"this is no state of a GumbelGroupPruner: it lacks {sorted(missing)}")
        if state["history"] or not state["session"]:
            self.load_pruning_history(state["history"])
        self.current_step = state["step"]
        self.distillation.load_state_dict(state)
        if state["session"]:
            if not self._attached:
                self._attach()
            self.session.load_state_dict(state["session"])
            self._gradients.load_state_dict(state["gradients"])
            for optimizer, own in zip(self._loop.optimizers, state.get("optimizers", ()), strict=False):
                optimizer.load_state_dict(own)

    def load_pruning_history(self, pruning_history: Sequence[Any]) -> None:
        """Remove what another pruner removed, from a pruner on the original network; the model is a plain one then.

        Raises:
            LifecycleError: If this pruner pruned something already.
            TargetError: If the history is of another network; nothing was removed.
        """
        self._take_back()
        if self.pruning_history():
            raise LifecycleError("this pruner pruned something already; replay a history on the unpruned network")
        with restored_on_error(self):
            self._detach()
            dependency = self._dependency  # read before anything is removed
            with tracked(self.model) as self._changes:
                replay(self.model, dependency, pruning_history)
            self._removed(copy.deepcopy(list(pruning_history)))
            self.current_step = self.iterative_steps

    def __deepcopy__(self, memo: dict[int, Any]) -> GumbelGroupPruner:
        groups = self._running()
        if groups is not None and inspect.getgeneratorstate(groups) == inspect.GEN_SUSPENDED:
            raise LifecycleError("a pruner cannot be copied in the middle of a step")
        memo.update(shared_parts(self.DG))
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        duplicate.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return duplicate

    # Planning -----------------------------------------------------------------------------------------------------

    @property
    def _dependency(self) -> DependencyGroups:
        """The groups of the network as it is now, read when they are asked for."""
        if self._found is None:
            self.example_inputs = inputs_following(self.model, self.example_inputs, self._dtype)
            self._dtype = dtype_of(self.model)
            with calling(self.model, self._forward, self.example_inputs):
                self._found = DependencyGroups(self.model, self.example_inputs, self)
        return self._found

    def _asked(self, step: int) -> tuple[list[ChannelGroup], dict[str, Share]]:
        """Return the groups, and what is asked of each at an iterative step; -1 is the last one."""
        dependency = self._dependency
        return dependency.groups, shares(self, dependency, self._planner.metric, step)

    def _plan(self, step: int) -> Plan:
        groups, asked = self._asked(step)
        with calling(self.model, self._forward, self.example_inputs):
            return self._planner.plan(self.model, groups, asked, self.example_inputs)

    def _attach(self) -> None:
        """Attach the gates of the next step."""
        plan, settings = self._plan(self.current_step + 1), self._settings
        if self.current_step:  # what was learned goes on: weights are not initialized again, nor latents
            settings = settings.model_copy(update={"weight_init": "keep", "gates": GatesConfig()})
        self.session = MaskingSession(self.model, settings, seed=self._seed, plan=plan, distillation=self.distillation)
        self._loop = MaskingLoop(self.session, steps_gates=settings.gate_optimizer is not None)
        self._loop.start(self._total_steps)
        self._loop.complete_at_forward()
        self._gradients = GateGradNormalizer(self.session.gate_parameters(), self.session.controller.parameters())
        self._structure = Structure(self.model)
        self._attached = True
        if self._own_importance:
            self.importance = GateImportance(self.session)

    def _detach(self) -> None:
        self._loop.detach()
        self._attached = False
        self.distillation.attach(self.model)  # a small model goes on learning from the teacher
