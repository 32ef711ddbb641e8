"""Where the mask learning stands, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gumbel_plugin.masks.base import Phase
from gumbel_plugin.sparsity.budget import Budget, BudgetTerm
from gumbel_plugin.sparsity.controller import BudgetController
from gumbel_plugin.training.plan import Plan

_SURE = 0.95
"""A gate is decided where one of its states has this probability."""


@dataclass(frozen=True)
class BudgetStatus:
    """Where one budget stands, all in fractions of its dense cost.

    Attributes:
        name: What the budget is called.
        target: What may stay at this step.
        hard: What would stay if the gates were decided now as they are.
        expected: What stays of a sample, in the mean.
        end: What may stay in the end.
    """

    name: str
    target: float
    hard: float
    expected: float
    end: float

    @property
    def cut(self) -> float:
        """What a cut to the end would take at this step, for which the network is not trained yet."""
        return max(0.0, self.hard - self.end)


@dataclass(frozen=True)
class Status:
    """Where the mask learning stands; as a text, one line.

    Attributes:
        phase: ``open``, ``learning`` or ``fixed``.
        sparsity: The fraction of gated weights whose gates are closed now, as a hard mask.
        soft_sparsity: The same by the gates' probabilities; its distance to `sparsity` is the soft-hard gap.
        step: Optimizer steps so far.
        undecided: The fraction of the gates that samples still open and close, each with a probability of over 5 %.
        budgets: Where each budget with a ratio stands.
    """

    phase: str
    sparsity: float
    soft_sparsity: float
    step: int
    undecided: float = 0.0
    budgets: tuple[BudgetStatus, ...] = ()

    @property
    def furthest(self) -> BudgetStatus | None:
        """The budget whose hard gates are furthest from its target; None where no budget has a ratio."""
        return max(self.budgets, key=lambda budget: abs(budget.hard - budget.target), default=None)

    def numbers(self) -> dict[str, float]:
        """Return what trainers log: the sparsity, and target, hard and expected density of the furthest budget."""
        numbers = {"sparsity": self.sparsity, "soft_sparsity": self.soft_sparsity, "undecided_gates": self.undecided}
        if self.furthest is not None:
            densities = {"target": self.furthest.target, "hard": self.furthest.hard, "expected": self.furthest.expected}
            numbers |= {f"{kind}_density": density for kind, density in densities.items()}
        return numbers

    def __str__(self) -> str:
        where = f"step {self.step}, gates {self.phase}"
        if self.furthest is None:
            return (
                f"{where}: {self.sparsity:.1%} of the gated weights closed, {self.undecided:.1%} of the gates undecided"
            )
        own = self.furthest
        more = f", the furthest of {len(self.budgets)} budgets" if len(self.budgets) > 1 else ""
        return (
            f"{where}: {own.name}{more}: {own.hard:.1%} of the dense cost stay, {own.expected:.1%} expected, target "
            f"{own.target:.1%}; {self.undecided:.1%} of the gates undecided; a cut to {own.end:.1%} now would take "
            f"{own.cut:.1%}"
        )


@torch.no_grad()
def status_of(plan: Plan, controller: BudgetController, phase: Phase, steps: int, progress: float) -> Status:
    """Return where the masks of a plan stand.

    Args:
        plan: The masks and budgets.
        controller: What steers some of the budgets.
        phase: What the gates do at present.
        steps: Optimizer steps so far.
        progress: Of the mask learning.
    """
    hard = soft = total = undecided = gates = 0.0
    targets = {id(b): t for b, t in zip(controller.budgets, controller.targets(progress), strict=True)}
    budgets = []
    for budget in plan.budgets:
        now = [hard_gates(term) for term in budget.terms]
        probabilities = [keep_probability(term) for term in budget.terms]
        for term, own, probability in zip(budget.terms, now, probabilities, strict=True):
            hard += float(own.sum()) * term.cost
            soft += float(probability.sum()) * term.cost
            total += term.units * term.cost
            undecided += float(((probability > 1 - _SURE) & (probability < _SURE)).sum())
            gates += term.units
        if budget.ratio is not None:
            budgets.append(_budget_status(budget, phase, targets, now, probabilities))
    return Status(phase.value, 1 - hard / total, 1 - soft / total, steps, undecided / gates, tuple(budgets))


def _budget_status(
    budget: Budget, phase: Phase, targets: Mapping[int, float], hard: list[Tensor], probabilities: list[Tensor]
) -> BudgetStatus:
    end = 1 - budget.achievable
    target = {Phase.OPEN: 1.0, Phase.LEARNING: targets.get(id(budget), end), Phase.FIXED: end}[phase]
    return BudgetStatus(budget.name, target, float(budget.usage(hard)), float(budget.usage(probabilities)), end)


@torch.no_grad()
def hard_gates(term: BudgetTerm) -> Tensor:
    """Return the gates that would be decided now, as 0 and 1."""
    learning = term.mask.phase is Phase.LEARNING
    return (term.mask.decide(term.weight) if learning else term.mask.hard).float()


@torch.no_grad()
def keep_probability(term: BudgetTerm) -> Tensor:
    """Return the probability of every gate to be open as it acts now: 1 before the learning, 0 or 1 after it."""
    return term.mask.probability(term.weight) if term.mask.phase is Phase.LEARNING else term.mask.hard.float()
