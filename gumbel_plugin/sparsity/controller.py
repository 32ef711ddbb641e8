"""The controller that steers gates to their budgets while they are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gumbel_plugin.config_values import Section
from gumbel_plugin.sparsity.budget import Budget
from gumbel_plugin.sparsity.budgeted import HasBudgetLoss
from gumbel_plugin.sparsity.cost_budget import CostBudget
from gumbel_plugin.sparsity.schedules import Schedule

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
        strength: Weight of the quadratic term of the budget loss.
        multiplier_rate: How fast the Lagrange multiplier follows the violation, per step; None (the default) lets it
            come equally far however many steps the mask learning has.
    """

    metric: Metric | None = None
    ratio: float | None = Field(default=None, ge=0, lt=1)
    scope: Literal["network", "layer"] | None = None
    ramp: float = Field(default=0.8, ge=0, le=1)
    strength: float = Field(default=1.0, gt=0)
    multiplier_rate: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _is_of_the_network_where_only_that_can_be(self) -> BudgetConfig:
        if self.scope == "layer" and self.metric in ("macs", "parameters", "latency"):
            raise ValueError(f"scope 'layer': {self.metric} are budgeted for the whole network; use 'network'")
        return self

    @property
    def given(self) -> bool:
        """Whether it says what goes, beside what the config list's entries say."""
        return self.metric is not None or self.ratio is not None or self.scope is not None


_FAR = 0.5
"""The distance of log densities (density at 1.65 times the target) from which on the budget's pull is constant."""
_REACH = 16.0
"""How far a violation of 1 throughout the mask learning takes a multiplier: 0.01 a step over 1600 of them."""
_RATE = 0.01  # where nobody knows how many there will be
_FASTEST = 0.05  # beyond it the gates of small groups overshoot


class BudgetController:
    """Steers every budget to its ratio with a Lagrange multiplier, along a falling target.

    loss = Σ μ·v + ρ·v², v = log density − log target; μ ← μ + η·v after every step; beyond |v| = ½ the square goes on
    as a straight line, and μ follows v no faster. Both signs of v count, so gates that were closed too far open again.
    """

    def __init__(self, budgets: Sequence[Budget], config: BudgetConfig) -> None:
        for budget in budgets:
            budget.check()
        self.budgets = [
            budget for budget in budgets if budget.ratio is not None and not budget.method.manages_own_sparsity
        ]
        self._others = [budget for budget in budgets if budget.method.manages_own_sparsity]
        self.config = config
        self.multipliers = torch.zeros(len(self.budgets))
        self._flat = FlatDensities.of(self.budgets)
        self._violations: Tensor | None = None

    def targets(self, progress: float) -> list[float]:
        """Return each budget's target density at this progress of the mask learning.

        It falls by constant factors rather than by constant amounts, faster at first (Zhu and Gupta's cubic, in log
        density): from 2 % to 0.2 % is as far as from 20 % to 2 %, and must not happen within a few steps at the end.
        """
        ramp = self.config.ramp
        position = 1.0 if ramp == 0 else Schedule(0.0, 1.0, "cubic")(progress / ramp)
        return [Schedule(1.0, 1.0 - budget.achievable, "exponential")(position) for budget in self.budgets]

    def loss(self, progress: float) -> Tensor | None:
        """Return the budget loss (the methods' own, where they steer themselves), or None where there is none."""
        losses = [loss for budget in self._others if (loss := _own_loss(budget)) is not None]
        if self.budgets:
            losses.append(self._steering_loss(progress))
        return torch.stack(losses).sum() if losses else None

    def _steering_loss(self, progress: float) -> Tensor:
        flat = self._flat
        densities = flat() if flat else torch.stack([budget.density() for budget in self.budgets])
        densities = _at_least(densities, densities.new_tensor([0.5 / budget.total for budget in self.budgets]))
        targets = densities.new_tensor(self.targets(progress))
        violations = torch.log(densities) - torch.log(targets)
        self._violations = violations.detach().clamp(-_FAR, _FAR)
        multipliers = self.multipliers.to(densities.device)
        # Huber's loss: v² near the target, straight beyond. Far from it the gates would else follow nothing but the
        # budget, cross 0 together and leave what the network needs to chance.
        squares = 2 * nn.functional.huber_loss(violations, torch.zeros_like(violations), reduction="none", delta=_FAR)
        return (multipliers * violations + self.config.strength * squares).sum()

    def step(self, length: int | None = None) -> None:
        """Move the multipliers along the violations that the last loss saw.

        Args:
            length: How many steps the mask learning has, if that is known.
        """
        if self._violations is None:
            return
        rate = self.config.multiplier_rate
        if rate is None:
            rate = _RATE if length is None else min(_FASTEST, _REACH / max(1, length))
        self.multipliers = self.multipliers + rate * self._violations.cpu()
        self._violations = None


class FlatDensities:
    """The densities of budgets all of whose gates lie in one bank: a few operations, however many groups there are."""

    def __init__(self, gates: Any, budgets: Sequence[Budget]) -> None:
        """Note where each budget's gates are.

        Args:
            gates: The mask that holds all of them.
            budgets: Budgets whose terms are slices of it.
        """
        self._gates = gates
        self._cost = budgets[0] if isinstance(budgets[0], CostBudget) else None
        owners, shares = [], []
        spans: list[Any] = [term.mask for budget in budgets for term in budget.terms]
        self._places = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        for number, budget in enumerate(budgets):
            for term in budget.terms:
                owners.append(torch.full((term.units,), number))
                shares.append(torch.full((term.units,), term.cost / budget.total))
        self._owners, self._shares = torch.cat(owners), torch.cat(shares)
        self._constants = torch.tensor([budget.constant / budget.total for budget in budgets])

    @classmethod
    def of(cls, budgets: Sequence[Budget]) -> FlatDensities | None:
        """Return what computes the densities of these budgets at once; None if that cannot be done."""
        banks = {id(bank): bank for b in budgets for t in b.terms for bank in [getattr(t.mask, "bank", None)]}
        alone = len(budgets) == 1 or not any(isinstance(budget, CostBudget) for budget in budgets)
        (bank, *others) = banks.values() if banks else (None,)
        return cls(bank, budgets) if bank is not None and not others and alone else None

    def __call__(self) -> Tensor:
        """Return the densities as `Budget.density` does, shape (budgets,)."""
        soft = self._usage(self._gates.probability(None))
        with torch.no_grad():
            hard = self._usage(self._gates.decide(None).to(soft.dtype))
        return hard + (soft - soft.detach())

    def _usage(self, gates: Tensor) -> Tensor:
        if gates.device != self._shares.device:
            parts = (self._places, self._owners, self._shares, self._constants)
            self._places, self._owners, self._shares, self._constants = (part.to(gates.device) for part in parts)
        gates = gates[self._places]
        if self._cost is not None:
            return (self._cost.model(gates) / self._cost.total).reshape(1)
        return self._constants.to(gates.dtype).index_add(0, self._owners, gates * self._shares.to(gates.dtype))


def _own_loss(budget: Budget) -> Tensor | None:
    masks, weights = [m.mask for m in budget.terms], [m.weight for m in budget.terms]
    first = masks[0]
    if budget.ratio is None or not isinstance(first, HasBudgetLoss):
        return None
    return first.budget_loss(masks, weights, budget.of_gated(budget.achievable) or 0.0, budget.usage)


def _at_least(values: Tensor, lowest: Tensor) -> Tensor:
    """Raise values to the lowest ones allowed, with their gradients: a mask that closed everything can open again."""
    return values + (lowest - values.detach()).clamp_min(0.0)
