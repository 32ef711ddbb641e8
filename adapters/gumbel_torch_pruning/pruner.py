"""Learnt gates as a Torch-Pruning pruner: swap one class, and what leaves the network changes nothing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from gumbel_plugin.config import PruningSection
from gumbel_plugin.errors import ConfigError, GraphError, LifecycleError, TargetError, nearest
from gumbel_plugin.insight.profile import count_macs, count_parameters
from gumbel_plugin.learning.latency import LatencyTable, measure_table
from gumbel_plugin.learning.session import MaskingSession, Masks
from gumbel_plugin.masks.targets import ChannelGroup
from gumbel_plugin.shrinking.dead_units import find_dead_units
from gumbel_plugin.shrinking.inputs import observing
from gumbel_torch_pruning.groups import DependencyGroups, check_forward, mark_outputs
from gumbel_torch_pruning.importance import GateImportance
from gumbel_torch_pruning.optimizer import ParameterChanges, tracked
from gumbel_torch_pruning.scopes import Budget, Target, plan_groups

_logger = logging.getLogger(__name__)
_TARGETS = ("channels", "macs", "parameters", "latency")


class GumbelGroupPruner(tp.pruner.BasePruner):  # type: ignore[misc]
    """Learns which channels of each dependency group to keep, and removes the others exactly.

    Example::

        pruner = GumbelGroupPruner(model, example_inputs, pruning_ratio=0.5, ignored_layers=[model.fc])
        optimizer.add_param_group({"params": pruner.gate_parameters(), "lr": 0.05, "weight_decay": 0.0})
        for batch in loader:
            ...; loss.backward(); pruner.regularize(model, loss); optimizer.step(); optimizer.zero_grad()
        pruner.step()
        pruner.update_optimizer(optimizer)    # momentum follows the shrunk parameters, should training go on

    One gate per unit of a group acts at every layer that reads the group's channels, so that closing and removing are
    the same thing. All arguments of `BasePruner` mean what they mean there; ``importance`` is not needed.

    Attributes:
        session: The masking session; its verbs are called by the methods here.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Any = None,
        *,
        target: Target = "channels",
        pruning: PruningSection | None = None,
        total_steps: int | None = None,
        inexact: bool = False,
        latency_table: LatencyTable | None = None,
        **arguments: Any,
    ) -> None:
        """Build the graph and attach the gates; the model can be trained at once.

        Args:
            model: The model; its train/eval flags are kept.
            example_inputs: A tensor, a tuple of positional inputs, or a dict.
            importance: Ignored by this pruner; by default `GateImportance`.
            target: What ``pruning_ratio`` is a fraction of: ``channels`` (per group, or of all with
                ``global_pruning``), or the network's ``macs``, ``parameters`` or ``latency``.
            pruning: Method, rescale and budget settings; the config list is not used here.
            total_steps: How many optimiser steps will follow, so that the budget can tighten gradually.
            inexact: Also gate groups whose removal changes what a normalisation computes.
            latency_table: A measured table for the target ``latency``; measured here without it.
            **arguments: All other arguments of `BasePruner`: ``pruning_ratio``, ``ignored_layers``, ...

        Raises:
            ConfigError: If an argument breaks a rule or the target cannot be met.
            GraphError: If the model rejects the example inputs or has nothing to differentiate.
            LifecycleError: If the model has gates already.
        """
        _check_arguments(target, arguments)
        check_forward(model, example_inputs)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise GraphError("every parameter of the model is frozen, so Torch-Pruning cannot trace it; unfreeze some")
        transform = arguments.pop("output_transform", None)
        # Torch-Pruning keeps these dicts and writes into its own mutable defaults: hand it fresh ones.
        for name in ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups"):
            arguments[name] = dict(arguments.get(name) or {})
        self.example_inputs = example_inputs
        self._settings = pruning or PruningSection()
        self._target, self._inexact, self._table = target, inexact, latency_table
        self._total_steps = total_steps
        with observing(model), torch.enable_grad():
            super().__init__(
                model,
                example_inputs,
                importance or tp.importance.RandomImportance(),
                output_transform=lambda out: mark_outputs(transform(out) if transform else out),
                **arguments,
            )
        self._dependency = self._read_graph()
        self._original = {group.name: group.size for group in self._dependency.groups}
        self._dense_cost = {
            "macs": lambda: float(count_macs(model, example_inputs)),
            "parameters": lambda: float(count_parameters(model)),
        }.get(target, lambda: 0.0)()
        self._decided: Masks = {}
        self._changes = ParameterChanges()
        self.session = self._new_session(1)
        self.session.start(total_steps)
        if importance is None:
            self.importance = GateImportance(self.session)

    # Training -----------------------------------------------------------------------------------------------------

    def gate_parameters(self) -> list[nn.Parameter]:
        """Return the gates' parameters (and scales), for a parameter group of the user's optimizer."""
        return [*self.session.gate_parameters(), *self.session.scale_parameters()]

    def update_regularizer(self) -> None:
        """Say where the gates stand; to be called once an epoch, as with Torch-Pruning's other pruners."""
        status = self.session.status()
        _logger.info("gates: %s, %.1f %% closed", status.phase, 100 * status.sparsity)

    def regularize(self, model: nn.Module, loss: Tensor | None = None, **_: Any) -> Tensor:
        """Add the gradient of what the gates add to the loss; to be called after ``loss.backward()``, every step.

        Args:
            model: The model (it has to be the pruner's).
            loss: The task's loss, checked to be finite.

        Returns:
            The gates' part of the loss.

        Raises:
            NonFiniteLossError: If the loss is NaN or infinite; the model gets its last remembered state back.
        """
        if model is not self.model:
            raise LifecycleError("regularize got another model than the pruner was built for")
        if loss is not None:
            self.session.guard(loss.detach())
        penalty = self.session.loss()
        if penalty.requires_grad:
            penalty.backward()  # type: ignore[no-untyped-call]
        self.session.step()
        return penalty.detach()

    # Removing -----------------------------------------------------------------------------------------------------

    def step(self, interactive: bool = False) -> Iterator[Any] | None:
        """Decide the gates and remove what they close; afterwards the model is smaller and computes the same.

        Args:
            interactive: Yield Torch-Pruning's groups instead of pruning them; call ``group.prune()`` on each.

        Raises:
            LifecycleError: If all ``iterative_steps`` are done, or the model's layers were changed meanwhile.
        """
        if self.current_step >= self.iterative_steps:
            raise LifecycleError(
                f"step() was called {self.current_step} times already, iterative_steps is {self.iterative_steps}"
            )
        self._check_unchanged()
        self.current_step += 1
        groups = self._prune()
        if interactive:
            return groups
        for group in groups:
            group.prune()
        return None

    def _prune(self) -> Iterator[Any]:
        logits = {name: mask for name, mask in self.session.plan.masks.items()}
        masks = self.session.extract()
        if not self._decided:
            self._decided = masks
        self.session.detach()
        dead = find_dead_units(self.model, list(self.session.plan.groups.values()), include_inexact=self._inexact)
        training = {module: module.training for module in self.model.modules()}
        with tracked(self.model) as self._changes:
            for name, units in dead.items():
                yield self._dependency.pruning_group(name, units)
        for module, mode in training.items():
            module.training = mode
        self._dependency = self._read_graph()
        if self.current_step < self.iterative_steps:
            self.session = self._new_session(self.current_step + 1)
            for name, mask in self.session.plan.masks.items():
                self._carry_gates(logits[name], mask)
            self.session.start(self._total_steps)

    def update_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer go on after `step`: smaller parameters take the old ones' places, their state is cut alike.

        Args:
            optimizer: The optimizer of the model's weights (and, if they are in it, of the gates).
        """
        self._changes.apply_to(optimizer)

    # Results ------------------------------------------------------------------------------------------------------

    def groups(self) -> list[ChannelGroup]:
        """Return every dependency group with its safety: exact, inexact or unsupported, and why."""
        return list(self._dependency.groups)

    def masks(self) -> Masks:
        """Return the masks in NNI's format: the decided ones after `step`, else what the gates say now."""
        if self._decided:
            return self._decided
        hard = {m.name: m.mask.decide(m.weight) for scope in self.session.plan.scopes for m in scope.members}
        return self.session.masks(hard)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on later: gates, schedules and what was pruned so far."""
        return {"session": self.session.state_dict(), "step": self.current_step, "history": self.pruning_history()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, with a pruner that was built on the original, unpruned network.

        Raises:
            LifecycleError: If this pruner pruned something already.
        """
        if self.current_step or self.pruning_history():
            raise LifecycleError("load_state_dict needs a pruner on the unpruned network; this one pruned already")
        if state["history"]:
            self.session.detach()
            self.load_pruning_history(copy.deepcopy(state["history"]))
            self._dependency = self._read_graph()
            self.current_step = state["step"]
            if self.current_step < self.iterative_steps:
                self.session = self._new_session(self.current_step + 1)
                self.session.start(self._total_steps)
        if self.current_step < self.iterative_steps:
            self.session.load_state_dict(state["session"])

    # Planning -----------------------------------------------------------------------------------------------------

    def _read_graph(self) -> DependencyGroups:
        return DependencyGroups(
            self.model,
            self.example_inputs,
            graph=self.DG,
            ignored_layers=self.ignored_layers,
            root_module_types=self.root_module_types,
            parts=self._get_channel_groups,
        )

    def _new_session(self, step: int) -> MaskingSession:
        allowed = ("exact", "inexact") if self._inexact else ("exact",)
        groups = [group for group in self._dependency.groups if group.safety in allowed]
        if not groups:
            raise TargetError("no dependency group of this model can be gated; groups() says why")
        budget = Budget(
            target=self._target,
            ratio=self.per_step_pruning_ratio[step],
            shared=self.global_pruning,
            isomorphic=self.isomorphic,
            limit=self.max_pruning_ratio,
            round_to=self.round_to or 1,
            layers=self._layer_ratios(step, groups),
            original=self._original,
            dense_cost=self._dense_cost,
            table=self._latency_table(groups) if self._target == "latency" else None,
        )
        plan = plan_groups(self.model, self._settings, groups, budget, self.example_inputs)
        return MaskingSession(self.model, self._settings, plan=plan)

    def _latency_table(self, groups: Sequence[ChannelGroup]) -> LatencyTable:
        if self._table is None:
            self._table = measure_table(self.model, {group.name: group for group in groups}, self.example_inputs)
        return self._table

    def _layer_ratios(self, step: int, groups: Sequence[ChannelGroup]) -> dict[str, tuple[str, float]]:
        """Return the groups that ``pruning_ratio_dict`` speaks of: the scope's name and the ratio at this step."""
        modules = dict(self.model.named_modules())
        names = {module: name for name, module in modules.items()}
        ratios: dict[str, tuple[str, float]] = {}
        graph = {part.module for group in self._dependency.groups for part in group.producers}
        for layer, schedule in self.pruning_ratio_dict.items():
            if names.get(layer) not in graph:
                raise TargetError(f"pruning_ratio_dict: {names.get(layer, layer)!r} is in no dependency group"
                                  f"{nearest(str(names.get(layer)), graph)}")
            for group in groups:
                if names[layer] in {part.module for part in group.producers} and group.name not in ratios:
                    ratios[group.name] = (self._layer_to_scope[layer][0], float(schedule[step]))
        return ratios

    def _carry_gates(self, old: nn.Module, new: nn.Module) -> None:
        """Let the gates of the units that stayed go on where they were, in the optimizer too."""
        kept = torch.nonzero(old.hard).flatten()  # type: ignore[call-overload]
        for (_, before), (_, after) in zip(old.named_parameters(), new.named_parameters(), strict=True):
            with torch.no_grad():
                after.copy_(before[kept])
            self._changes.add(before, after, kept)

    def _check_unchanged(self) -> None:
        for name, group in self.session.plan.groups.items():
            for part in group.consumers:
                known = self.session.plan.sites[part.module].module
                if dict(self.model.named_modules()).get(part.module) is not known:
                    raise LifecycleError(
                        f"the model's layer {part.module!r} was replaced after the gates of {name!r} were attached; "
                        "build a new pruner on the changed model"
                    )


def _check_arguments(target: str, arguments: Mapping[str, Any]) -> None:
    if target not in _TARGETS:
        raise ConfigError(f"target {target!r} is unknown{nearest(target, _TARGETS)}")
    ratios = [("pruning_ratio", arguments.get("pruning_ratio", 0.5))]
    for key, ratio in (arguments.get("pruning_ratio_dict") or {}).items():
        ratios.append((f"pruning_ratio_dict[{type(key).__name__}]", ratio))
    for name, ratio in ratios:
        if not 0 <= ratio < 1:
            raise ConfigError(f"{name} = {ratio}: must be in [0, 1)")
