"""What budgets need of the gates that they steer, rank and cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from gumbel_plugin.sparsity.types import SparsityType

Usage = Callable[[Sequence[Tensor]], Tensor]
"""Returns the fraction of a budget's dense cost that stays under gates, one tensor (soft or hard) for each mask."""


class BudgetedMask(Protocol):
    """Gates that share a budget (`gumbel_plugin.masks.LearnedMask` says what each of these means)."""

    method_name: ClassVar[str]
    manages_own_sparsity: ClassVar[bool]
    shares_budget: ClassVar[bool]
    shape: tuple[int, ...]
    sparsity_type: SparsityType
    sparsity: float | None
    hard: Tensor

    @property
    def phase(self) -> Enum:
        """What the gates do at present (`gumbel_plugin.masks.Phase`)."""

    def scores(self, weight: Tensor | None) -> Tensor:
        """Return the gates' importance, of `shape`: the highest are kept."""

    def probability(self, weight: Tensor | None) -> Tensor:
        """Return the differentiable expectation of each gate, of `shape`, in [0, 1]."""

    def decide(self, weight: Tensor | None) -> Tensor:
        """Return the gates that are open without any budget, bool, of `shape`."""


@runtime_checkable
class HasBudgetLoss(Protocol):
    """Gates whose method drives them to their budget by a loss of its own."""

    def budget_loss(
        self, masks: Sequence[Any], weights: Sequence[Tensor | None], ratio: float, usage: Usage
    ) -> Tensor | None:
        """Return the loss over all masks that share one budget; asked of the first of them.

        Args:
            masks: The masks, all of one method.
            weights: The weights that they read.
            ratio: The fraction to remove.
            usage: What gates of these masks leave of the cost.
        """
