"""Where the mask learning stands, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gumbel_plugin.masks.base import Phase
from gumbel_plugin.training.plan import Plan


@dataclass(frozen=True)
class Status:
    """Where the mask learning stands.

    Attributes:
        phase: ``open``, ``learning`` or ``fixed``.
        sparsity: The fraction of gated weights whose gates are closed now, as a hard mask.
        soft_sparsity: The same by the gates' probabilities; its distance to `sparsity` is the soft-hard gap.
        step: Optimiser steps so far.
    """

    phase: str
    sparsity: float
    soft_sparsity: float
    step: int


@torch.no_grad()
def status_of(plan: Plan, phase: Phase, steps: int) -> Status:
    """Return where the masks of a plan stand.

    Args:
        plan: The masks and budgets.
        phase: What the gates do at present.
        steps: Optimizer steps so far.
    """
    hard = soft = total = 0.0
    for scope in plan.scopes:
        for member in scope.members:
            learning = member.mask.phase is Phase.LEARNING
            gates = member.mask.decide(member.weight) if learning else member.mask.hard
            expected = member.mask.probability(member.weight) if learning else gates.float()
            hard += float(gates.sum()) * member.cost
            soft += float(expected.sum()) * member.cost
            total += member.units * member.cost
    return Status(phase.value, 1 - hard / total, 1 - soft / total, steps)
