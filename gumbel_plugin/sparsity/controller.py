"""The controller that steers gates to their budgets while they are learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from gumbel_plugin.config_values import Section
from gumbel_plugin.sparsity.budget import Budget
from gumbel_plugin.sparsity.budgeted import HasBudgetLoss
from gumbel_plugin.sparsity.schedules import Schedule


class BudgetConfig(Section):
    """How the masks are steered towards their `sparse_ratio` while they are learned.

    Attributes:
        ramp: The part of the mask learning over which the target falls from whole to its final value.
        strength: Weight of the quadratic term of the budget loss.
        multiplier_rate: How fast the Lagrange multiplier follows the violation, per step; None (the default) lets it
            come equally far however many steps the mask learning has.
    """

    ramp: float = Field(default=0.8, ge=0, le=1)
    strength: float = Field(default=1.0, gt=0)
    multiplier_rate: float | None = Field(default=None, ge=0)


_FAR = 0.5
"""The distance of log densities (density at 1.65 times the target) from which on the budget's pull is constant."""
_REACH = 16.0
"""How far a violation of 1 throughout the mask learning takes a multiplier: 0.01 a step over 1600 of them."""
_RATE = 0.01  # where nobody knows how many there will be
_FASTEST = 0.05  # beyond it the gates of small groups overshoot


class BudgetController:
    """Steers every scope to its ratio with a Lagrange multiplier, along a falling target.

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
        self._violations: Tensor | None = None

    def targets(self, progress: float) -> list[float]:
        """Return each scope's target density at this progress of the mask learning.

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
        densities = torch.stack([budget.density() for budget in self.budgets])
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


def _own_loss(budget: Budget) -> Tensor | None:
    masks, weights = [m.mask for m in budget.terms], [m.weight for m in budget.terms]
    first = masks[0]
    if budget.ratio is None or not isinstance(first, HasBudgetLoss):
        return None
    return first.budget_loss(masks, weights, budget.achievable, budget.usage)


def _at_least(values: Tensor, lowest: Tensor) -> Tensor:
    """Raise values to the lowest ones allowed, with their gradients: a mask that closed everything can open again."""
    return values + (lowest - values.detach()).clamp_min(0.0)
