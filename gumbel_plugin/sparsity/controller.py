"""The controller that steers gates to their budgets while they are learned."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gumbel_plugin.config_values import Section
from gumbel_plugin.sparsity.budget import Budget
from gumbel_plugin.sparsity.budgeted import HasBudgetLoss
from gumbel_plugin.sparsity.schedules import Schedule
from gumbel_plugin.sparsity.steered_gates import SteeredGates, root_mean_square, steered_gates

_logger = logging.getLogger(__name__)
_RETIRED = ("strength", "multiplier_rate")

Metric = Literal["weights", "channels", "macs", "parameters", "latency"]
"""What a budget counts."""


class BudgetConfig(Section):
    """How much goes, counted in what, and how the masks are steered there while they are learned.

    Attributes:
        metric: What the ratio is a fraction of: gated ``weights`` (the default), gated ``channels``, or the whole
            network's ``parameters``, ``macs`` or ``latency`` (measured on this machine).
        ratio: The fraction to remove, for all entries of the config list; by default their own `sparse_ratio`.
        scope: ``network``: all that is selected shares the ratio (the default where metric or ratio is given);
            ``layer``: each layer or channel group has it by itself (weights and channels only).
        ramp: The part of the mask learning over which the target falls from whole to its final value.
    """

    metric: Metric | None = None
    ratio: float | None = Field(default=None, ge=0, lt=1)
    scope: Literal["network", "layer"] | None = None
    ramp: float = Field(default=0.8, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _forget_the_multiplier(cls, values: Any) -> Any:
        """Accept what configurations of 0.1.0 say of a Lagrange multiplier, which nothing needs any more."""
        retired = [key for key in _RETIRED if isinstance(values, dict) and key in values]
        if retired:
            _logger.warning("pruning.budget.%s has no effect: gates are on budget after every step", retired[0])
        return {key: value for key, value in values.items() if key not in retired} if retired else values

    @model_validator(mode="after")
    def _is_of_the_network_where_only_that_can_be(self) -> BudgetConfig:
        if self.scope == "layer" and self.metric in ("macs", "parameters", "latency"):
            raise ValueError(f"scope 'layer': {self.metric} are budgeted for the whole network; use 'network'")
        return self

    @property
    def given(self) -> bool:
        """Whether it says what goes, beside what the config list's entries say."""
        return self.metric is not None or self.ratio is not None or self.scope is not None


USUAL_LENGTH = 300
"""How many steps the mask learning has where nobody says how long the training will be."""
_PATH = 50.0
"""How far a gate moves in all, in root mean square, in units of the noise's scale at the beginning."""
_SETTLING = 0.7
"""From this progress on the gates slow down, to stand still at `_SETTLED`: the weights get used to what will stay."""
_SETTLED = 0.97
_QUIET = 0.9
"""From this progress on the gates are sampled without noise: what is trained is what will be cut."""


class BudgetController:
    """Keeps every budget at its target of the moment, by construction, while its gates are learned.

    Before the gates' optimizer steps, `before_step` turns their gradients into benefit per cost less the budget's
    price (`SteeredGates.priced`). After it, `step` keeps the direction in which they moved, gives the movement its
    length, and shifts all latents of a budget by the one number at which its open gates cost what they may. So neither
    the size of the task's loss, nor the optimizer, its learning rate or the number of steps decide how far gates come.

    The noise of the samples falls to 0 before the end, and so do the movements: samples, probabilities and hard gates
    are one before the cut.

    Attributes:
        budgets: The budgets that are steered.
        gates: Their gates.
        has_moved: Whether an optimizer has moved the gates.
    """

    def __init__(self, budgets: Sequence[Budget], config: BudgetConfig) -> None:
        for budget in budgets:
            budget.check()
        self.budgets = [budget for budget in budgets if _is_steered(budget)]
        self._others = [budget for budget in budgets if budget.method.manages_own_sparsity]
        self.config = config
        self.gates = steered_gates(self.budgets)
        self._before: list[Tensor] = []
        self._initial: list[Tensor] = []
        self._is_priced = self.has_moved = False

    @property
    def has_loss(self) -> bool:
        """Whether some method drives its gates to the budget by a loss of its own."""
        return any(isinstance(budget.terms[0].mask, HasBudgetLoss) for budget in self._others)

    def targets(self, progress: float) -> list[float]:
        """Return each budget's target density at this progress of the mask learning.

        It falls by constant factors rather than by constant amounts, faster at first (Zhu and Gupta's cubic, in log
        density): from 2 % to 0.2 % is as far as from 20 % to 2 %, and must not happen within a few steps at the end.
        """
        return self._targets(self.budgets, progress)

    def loss(self) -> Tensor | None:
        """Return the losses of methods that drive their gates to a budget by one; None where there is none."""
        losses = [loss for budget in self._others if (loss := _own_loss(budget)) is not None]
        return torch.stack(losses).sum() if losses else None

    def begin(self, progress: float) -> None:
        """Bring the gates to their targets before the first step of the mask learning."""
        noise = _noise(progress)
        self._initial = [gates.latents() for gates in self.gates]
        for gates in self.gates:
            gates.write(gates.on_budget(gates.without_ties(), self._targets_of(gates, progress), noise))
        self.go_on(progress)

    def take_back(self) -> None:
        """Undo `begin`, exactly: the training turned out to be of another length before its first step."""
        for gates, latents in zip(self.gates, self._initial, strict=False):
            gates.write(latents)
        self._before, self._initial = [], []

    def go_on(self, progress: float) -> None:
        """Start from the gates as they are now, as after a state was loaded."""
        self._before = [gates.latents() for gates in self.gates]
        self._is_priced = False
        self._set_noise(_noise(progress))

    @torch.no_grad()
    def before_step(self) -> None:
        """Price the gates' gradients in place, once a step, when they are complete."""
        if self._is_priced or not self._before:
            return
        for gates in self.gates:
            gradients = gates.gradients()
            if gradients is not None:
                self._is_priced = True
                gates.write_gradients(gates.priced(gradients, gates.latents()))

    @torch.no_grad()
    def step(self, progress: float, length: int) -> None:
        """Scale the movement that an optimizer made, and bring the gates to their targets.

        Args:
            progress: Of the mask learning, after this step.
            length: How many steps the mask learning has.
        """
        if not self._before:
            return
        self.has_moved = self.has_moved or self._is_priced
        self._is_priced = False
        noise = _noise(progress)
        pace = _PATH / max(1, length) * _slowing(progress)
        for number, gates in enumerate(self.gates):
            latents = gates.latents()
            before = self._before[number].to(latents.device)
            moved = latents - before
            latents = before + moved / root_mean_square(moved) * pace
            latents = gates.on_budget(latents, self._targets_of(gates, progress), noise)
            gates.write(latents)
            self._before[number] = gates.latents()
        self._set_noise(noise)

    def parameters(self) -> list[Any]:
        """Return the parameters that hold steered gates."""
        return [parameter for gates in self.gates for parameter in gates.parameters()]

    def _targets(self, budgets: Sequence[Budget], progress: float) -> list[float]:
        ramp = self.config.ramp
        position = 1.0 if ramp == 0 else Schedule(0.0, 1.0, "cubic")(progress / ramp)
        return [Schedule(1.0, 1.0 - budget.achievable, "exponential")(position) for budget in budgets]

    def _targets_of(self, gates: SteeredGates, progress: float) -> Tensor:
        latents = gates.parameters()[0]
        return torch.tensor(self._targets(gates.budgets, progress), device=latents.device)

    def _set_noise(self, scale: float) -> None:
        for budget in self.budgets:
            for term in budget.terms:
                mask: Any = term.mask
                getattr(mask, "bank", mask).noise_scale = scale


def _noise(progress: float) -> float:
    """Return what the noise of the samples is multiplied by."""
    return max(0.0, 1 - progress / _QUIET)


def _slowing(progress: float) -> float:
    return min(1.0, max(0.0, (_SETTLED - progress) / (_SETTLED - _SETTLING)))


def _is_steered(budget: Budget) -> bool:
    method: Any = budget.method
    return budget.ratio is not None and not method.manages_own_sparsity and method.latents is not None


def _own_loss(budget: Budget) -> Tensor | None:
    masks, weights = [m.mask for m in budget.terms], [m.weight for m in budget.terms]
    first = masks[0]
    if budget.ratio is None or not isinstance(first, HasBudgetLoss):
        return None
    return first.budget_loss(masks, weights, budget.of_gated(budget.achievable) or 0.0, budget.usage)
