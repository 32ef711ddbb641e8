"""Where the mask learning stands, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gumbel_plugin.masks.base import Phase
from gumbel_plugin.sparsity.budget import BudgetTerm
from gumbel_plugin.training.plan import Plan


@dataclass(frozen=True)
class Status:
    """Where the mask learning stands.

    Attributes:
        phase: ``open``, ``learning`` or ``fixed``.
        sparsity: The fraction of gated weights whose gates are closed now, as a hard mask.
        soft_sparsity: The same by the gates' probabilities; its distance to `sparsity` is the soft-hard gap.
        step: Optimizer steps so far.
    """

    phase: str
    sparsity: float
    soft_sparsity: float
    step: int


def status_of(plan: Plan, phase: Phase, steps: int) -> Status:
    """Return where the masks of a plan stand.

    Args:
        plan: The masks and budgets.
        phase: What the gates do at present.
        steps: Optimizer steps so far.
    """
    hard = soft = total = 0.0
    for budget in plan.budgets:
        for term in budget.terms:
            hard += float(hard_gates(term).sum()) * term.cost
            soft += float(keep_probability(term).sum()) * term.cost
            total += term.units * term.cost
    return Status(phase.value, 1 - hard / total, 1 - soft / total, steps)


@torch.no_grad()
def hard_gates(term: BudgetTerm) -> Tensor:
    """Return the gates that would be decided now, as 0 and 1."""
    learning = term.mask.phase is Phase.LEARNING
    return (term.mask.decide(term.weight) if learning else term.mask.hard).float()


@torch.no_grad()
def keep_probability(term: BudgetTerm) -> Tensor:
    """Return the probability of every gate to be open as it acts now: 1 before the learning, 0 or 1 after it."""
    return term.mask.probability(term.weight) if term.mask.phase is Phase.LEARNING else term.mask.hard.float()
