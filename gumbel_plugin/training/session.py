"""The one code path along which masks are learned: a few verbs that every training loop calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.config import ConfigLike, OptimizerConfig, PruningSection
from gumbel_plugin.errors import LifecycleError
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.layers.model_check import refuse_unusable
from gumbel_plugin.layers.weights import modules_with_gates, own_parameters, remove_gates
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.sparsity.controller import BudgetController
from gumbel_plugin.storage.mask_format import Masks
from gumbel_plugin.training.distillation import DistillationLike, distillation_of
from gumbel_plugin.training.forward_hooks import SessionHooks, act_before_steps
from gumbel_plugin.training.gate_modules import register_gates
from gumbel_plugin.training.hard_masks import decisions_of, masks_of
from gumbel_plugin.training.optimizers import make_optimizer, settings_for
from gumbel_plugin.training.plan import Plan
from gumbel_plugin.training.planner import build_plan
from gumbel_plugin.training.prior import Prior
from gumbel_plugin.training.rescale import initialize_weight
from gumbel_plugin.training.session_config import groups_for, mask_learning_span, read_config
from gumbel_plugin.training.snapshot import Snapshot, load_state, save_state
from gumbel_plugin.training.status import Status, status_of
from gumbel_plugin.training.training_check import TrainingCheck, checked_length


class MaskingSession:
    """Learns masks on a model, whoever trains it.

    The verbs, in the order in which a training loop calls them::

        session = MaskingSession(model, config, example_inputs=x)
        session.start(total_steps)               # attach; say how long the training will be
        gates = session.optimizers()             # or session.parameter_groups(yours) for an optimizer of your own
        for x, y in loader:
            loss = session.guard(criterion(model(x), y)) + session.loss()
            ...                                  # backward, step of all optimizers
            session.step()                       # advance the schedules
        masks = session.extract()                # hard masks; closed weights are now exactly zero
        session.detach()

    A sample is drawn by itself at the start of every forward of the model in train mode.

    Attributes:
        model: The model.
        config: What is pruned.
        plan: The masks, gated layers and budgets.
        distillation: What is learned from a teacher beside the task.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruningSection | ConfigLike,
        groups: Sequence[ChannelGroup] | None = None,
        seed: int | None = None,
        plan: Plan | None = None,
        example_inputs: Any = None,
        snapshot_every: int | None = 50,
        distillation: DistillationLike = None,
    ) -> None:
        """Plan the session; the model is not touched before `start`.

        Args:
            model: The plain model.
            config: What is pruned, by which method and how far: a section, or a whole configuration (a YAML path, a
                dict, an NNI config list or a `PruningConfig`).
            groups: The model's channel groups, where a rule removes whole channels; found here if they are not given.
            seed: Seeds initial weights and the masks' noise; by default the configuration's, else 0.
            plan: What is gated, where something else than the config list decides it.
            example_inputs: One batch: to find the channel groups with, for budgets of MACs or latency, and for methods
                whose units cost multiply-accumulates where they are known, and else weights (`PerSample`).
            snapshot_every: After how many steps `guard` copies the model's state, to fall back to; None copies nothing.
            distillation: What is learned from a teacher beside the task: settings, a teacher, or a `Distillation`; by
                default what a whole configuration says.

        Raises:
            TargetError: If a rule matches nothing or nothing would be gated.
            DataError: If a teacher's file cannot be used.
            LifecycleError: If the model has a session already, or inference mode is on.
            ConfigError: If the model cannot be gated as it is (see `refuse_unusable`), the configuration breaks a rule,
                or channels are to go and there is nothing to trace with.
        """
        self.model = refuse_unusable(model, "a masking session")
        self._require_free_model()
        if torch.is_inference_mode_enabled():
            why = "gates that are made in inference mode can have no gradient"
            raise LifecycleError(f"{why}: make the session outside of torch.inference_mode()")
        self.config, self.seed, own_inputs = read_config(config, seed)
        if plan is None:
            inputs = own_inputs if example_inputs is None else example_inputs
            found = groups_for(model, self.config, inputs) if groups is None else groups
            plan = build_plan(model, self.config, found, self.seed, inputs)
        self.plan = plan
        self.distillation = distillation_of(distillation, config)
        self.distillation.prepare(model)
        self.controller = BudgetController(self.plan.budgets, self.config.budget)
        self._prior = Prior(model, self.plan, self.config.gates, self.controller)
        self.total_steps: int | None = None
        self.steps = 0
        self._started = False
        self._frozen: list[nn.Parameter] = []
        self._hooks: SessionHooks | None = None
        self._snapshot = Snapshot(model, checked_length("snapshot_every", snapshot_every))
        self._check = TrainingCheck(self.gate_parameters(), self.controller)

    # Attaching ----------------------------------------------------------------------------------------------------

    def start(self, total_steps: int | None = None, *, hooks: bool = True) -> None:
        """Attach to the model and say how long the training will be.

        Args:
            total_steps: Optimizer steps of the whole training, all phases together; None if it is not known: the masks
                are then learned at once, in `USUAL_LENGTH` steps, and stay as they are if the training goes on.
            hooks: Whether the session acts by forward hooks; an adapter that wraps the layers itself passes False and
                calls each gated layer's `apply`.

        Raises:
            LifecycleError: If the session was started before.
            ConfigError: If `total_steps` is no whole number of at least 1.
        """
        total_steps = checked_length("total_steps", total_steps)
        if self._started:
            raise LifecycleError("the session was started before; a new MaskingSession learns new masks")
        self._require_free_model()
        self._started = True
        self.distillation.take(self.model, final=not self.config.phases.dense)  # before weights are drawn
        generator = torch.Generator().manual_seed(self.seed)
        for gated in self.plan.gated_layers.values():
            factor = 1.0 if gated.mask is None else gated.mask.fan_factor
            initialize_weight(gated.weight, self.config.weight_init, generator, factor)
        self.total_steps = total_steps
        self.attach(hooks=hooks)
        self._enter_phase()
        self._snapshot.take(self.steps)

    def expect(self, total_steps: int) -> None:
        """Say how long the training will be, if `start` could not know; before the first step.

        Raises:
            ConfigError: If `total_steps` is no whole number of at least 1.
            LifecycleError: If the session was not started, a step was made, or the masks are fixed.
        """
        self._require_start("expect")
        if self.steps or self.phase is Phase.FIXED:
            at = f"the session is at step {self.steps}, its masks are {self.phase.value}"
            raise LifecycleError(f"expect() comes before the first step; {at}")
        self.total_steps = checked_length("total_steps", total_steps)
        for mask in self.plan.learned():
            mask.phase = Phase.OPEN
        self.controller.take_back()
        self._enter_phase()

    def attach(self, *, hooks: bool = True) -> None:
        """Attach a started session again to its model, from which it was detached; `start` does it the first time.

        Args:
            hooks: See `start`.

        Raises:
            LifecycleError: If the session was not started, or it or another one is attached to the model.
        """
        self._require_start("attach")
        if self._hooks is not None:
            raise LifecycleError("the session is attached to its model already; detach() comes before attach()")
        taken = set(modules_with_gates(self.model)) & {gated.module for gated in self.plan.gated_layers.values()}
        if taken:  # several sessions may hold different layers of one model
            raise LifecycleError("another masking session holds layers of this one; detach that one first")
        if self.config.weights == "frozen":
            self._frozen = [p for p in self.model.parameters() if p.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(False)
        register_gates(self.plan, self.model.training)
        self._hooks = SessionHooks(self.model, self.plan, self._check, self.distillation, on_layers=hooks)
        self._pricing = act_before_steps(self.controller, self._prior)

    def detach(self) -> None:
        """Remove hooks and gates from the model, if they are there; what `extract` wrote into the weights stays."""
        if self._hooks is None:
            return  # the gates on the model, if any, are another session's
        self._hooks.remove()
        self._pricing.remove()
        self._hooks = None
        remove_gates(self.model)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    # Learning -----------------------------------------------------------------------------------------------------

    def parameter_groups(
        self, optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer] | None = None
    ) -> list[dict[str, Any]]:
        """Return the gates' and the scales' parameters, each with its learning settings, for an optimizer of yours.

        Args:
            optimizer: Who will get them, or its class. Where the configured rate is one that only SGD can have (the
                published 50 of frozen weights) and this is another optimizer, the gates get 0.05, as they do by default
                with Adam, and a message says so. Without it the configured settings are returned as they are.
        """
        fitting = [(parameters, settings_for(own, optimizer)) for parameters, own in self._learned_parameters()]
        return [{"params": each, "lr": own.lr, "weight_decay": own.weight_decay} for each, own in fitting]

    def weight_parameters(self) -> list[nn.Parameter]:
        """Return what is trained of the network itself, for its own optimizer; nothing if the weights are frozen."""
        return own_parameters(self.model)

    def gate_parameters(self) -> list[nn.Parameter]:
        """Return the learned parameters of all masks, each once."""
        return list(dict.fromkeys(p for mask in self.plan.learned() for p in mask.parameters()))

    def scale_parameters(self) -> list[nn.Parameter]:
        """Return the scalars of smart rescale."""
        return self.plan.scales()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return optimizers of gates and scales with the configured (by default the published) settings."""
        return [make_optimizer(parameters, settings) for parameters, settings in self._learned_parameters()]

    def guard(self, loss: Tensor) -> Tensor:
        """Return the loss, with distillation's part if there is any; remember the model's state (``snapshot_every``).

        On a CPU it is looked at now, elsewhere some steps later, but before a state is remembered, saved or decided.

        Raises:
            NonFiniteLossError: If the loss is NaN or infinite. The model gets its last remembered state back.
        """
        return self._snapshot.guard(self.distillation.loss(loss), self.steps)

    def loss(self) -> Tensor:
        """Return what the method adds to the training loss, its penalties; 0 where it has none, and outside learning.

        Raises:
            LifecycleError: If the session was not started.
        """
        self._require_start("loss")
        self._check.loss()
        total = torch.zeros((), device=next(self.model.parameters()).device)
        if self.phase is not Phase.LEARNING:
            return total
        penalties = [mask.penalty(self.plan.weight_of(mask)) for mask in self.plan.learned()]
        return sum([each for each in (self.controller.loss(), *penalties) if each is not None], start=total)

    def step(self) -> None:
        """Bring the gates to their budgets, advance schedules and phases; to be called after every optimizer step.

        Raises:
            LifecycleError: If the session was not started.
        """
        self._require_start("step")
        self.steps += 1
        self.plan.noise.forward += 1  # a new sample, also where the loop calls parts of the model instead of the model
        begin, end = self.mask_learning_span()
        if self.phase is Phase.LEARNING:
            self._check.step()
            self.controller.step(self.progress, end - begin)
        for mask in self.plan.learned():
            mask.advance(self.progress)
        self._enter_phase()

    # The result ---------------------------------------------------------------------------------------------------

    def decide(self) -> None:
        """Fix the hard masks: each budget is met exactly. Logs how much the final cut changed.

        Raises:
            LifecycleError: If the session was not started.
            NonFiniteLossError: If a loss that `guard` got was NaN or infinite.
        """
        self._require_start("decide")
        self._snapshot.check()
        for budget in self.plan.budgets:
            own = {term.name: term.mask.decide(term.weight) for term in budget.terms}
            cut = budget.cut()
            self._check.cut(budget, own, cut)
            for name, hard in cut.items():
                mask = self.plan.masks[name]
                mask.fix(hard, self.plan.weight_of(mask))
        self._check.decided(self.steps, self.total_steps)

    def extract(self) -> Masks:
        """Decide the masks if that is still to be done, write them into the weights, and return them.

        Afterwards every closed weight, and every closed input column of a consumer, is exactly zero in the parameters,
        and scales are folded in.

        Raises:
            LifecycleError: If the session was not started.
        """
        self._require_start("extract")
        if self.phase is not Phase.FIXED:
            self.decide()
        for gated in self.plan.gated_layers.values():
            gated.fold()
        return self.masks()

    def masks(self, decided: Mapping[str, Tensor] | None = None) -> Masks:
        """Return the masks as NNI reports them: element masks on weights; a channel group's on its producers' rows.

        Args:
            decided: Hard gates by mask name; by default those that were fixed.
        """
        hard = decided or {name: mask.hard for name, mask in self.plan.masks.items()}
        return masks_of(self.plan, dict(self.model.named_modules()), hard)

    def fix_masks(self, masks: Masks) -> None:
        """Take over hard masks in NNI's format: element masks of gated layers, rows of the groups' producers.

        All masks are fixed then: gates of which the given masks say nothing stay as they were fixed before, or open.

        Raises:
            TargetError: If masks do not fit the model, hold anything but 0 and 1, or disagree within a group.
        """
        decided = decisions_of(self.plan, dict(self.model.named_modules()), masks)
        for mask in self.plan.masks.values() if decided else ():
            if id(mask) in decided:
                mask.fix(decided[id(mask)], self.plan.weight_of(mask))
            elif mask.phase is not Phase.FIXED:
                mask.fix(torch.ones(mask.shape), self.plan.weight_of(mask))

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on later on the same model: masks, scales, steps, noise."""
        self._snapshot.check()
        state = save_state(self.plan, self.steps, self.total_steps)
        return {**state, **self.distillation.state_dict(), **self._prior.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; the session must be planned alike, on a model of the same shape.

        Raises:
            TargetError: If the state is of another plan or damaged; the session is as it was.
        """
        self.distillation.check_state(state)
        self._prior.check_state(state)
        load_state(self.plan, state)
        self.distillation.load_state_dict(state)
        self.steps, self.total_steps = state["steps"], state["total_steps"]
        self._prior.load_state_dict(state, self.mask_learning_span()[0] - self.steps)
        if self.phase is Phase.LEARNING:
            self.controller.go_on(self.progress)
        self._snapshot.forget()  # it is of another moment
        for mask in self.plan.learned():
            mask.advance(self.progress)

    # State --------------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """What the gates do at present."""
        return self.plan.learned()[0].phase

    @property
    def progress(self) -> float:
        """How far the mask learning is, in [0, 1]."""
        begin, end = self.mask_learning_span()
        return min(1.0, max(0.0, (self.steps - begin) / max(1, end - begin)))

    def status(self) -> Status:
        """Return where the learning stands."""
        return status_of(self.plan, self.controller, self.phase, self.steps, self.progress)

    def _learned_parameters(self) -> list[tuple[list[nn.Parameter], OptimizerConfig]]:
        gates = self.gate_parameters(), self.config.gate_optimizer_config()
        scales = self.scale_parameters(), self.config.scale_optimizer
        return [pair for pair in (gates, scales) if pair[0]]

    def _require_free_model(self) -> None:
        if modules_with_gates(self.model):
            raise LifecycleError("the model has a masking session already; detach that one first")

    def _require_start(self, verb: str) -> None:
        if not self._started and self.phase is not Phase.FIXED:  # masks may be given instead of learned
            raise LifecycleError(f"{verb}() of a session that was not started; start(total_steps) comes first")

    def mask_learning_span(self) -> tuple[int, int]:
        """Return the steps at which the mask learning begins and ends (see `session_config.mask_learning_span`)."""
        return mask_learning_span(self.config, self.total_steps)

    def _enter_phase(self) -> None:
        begin, end = self.mask_learning_span()
        if self.phase is Phase.FIXED:
            return
        if not self.steps and self.total_steps is not None:
            self._check.length(end - begin)
        self._prior.follow(begin - self.steps)
        if self.total_steps is not None and self.config.phases.fixed > 0 and self.steps >= end:
            self.decide()
        elif self.phase is Phase.OPEN and self.steps >= begin:
            for mask in self.plan.learned():
                mask.phase = Phase.LEARNING
                mask.advance(self.progress)
            self.controller.begin(self.progress)
