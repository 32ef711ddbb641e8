"""Training loops from which gates learn nothing, or not enough: noticed, and said once, with what usually helps."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError, shown
from gumbel_plugin.sparsity.budget import Budget
from gumbel_plugin.sparsity.controller import BudgetController

_logger = logging.getLogger(__name__)

_FEW = 20
"""Fewer steps of mask learning than these are too few; docs/results.md has what more of them are worth."""
_FAR = 0.1
"""Gates are far from their budget if the cut changes what they keep by more than this part of the budget."""
_NOTICEABLE = 0.01
"""But by no less than this part of the dense cost."""


def checked_length(name: str, value: object) -> int | None:
    """Return the length of a training as an int, or None where it is not known.

    Args:
        name: The argument's name, for the message.
        value: A number of optimizer steps or epochs, of any integral type, or None.

    Raises:
        ConfigError: If it is no whole number of at least 1.
    """
    if value is None:
        return None
    try:
        length = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        length = -1
    if length < 1:
        raise ConfigError(f"{name} = {shown(value)}: it must be a whole number of at least 1, or None")
    return length


@dataclass(frozen=True)
class _Cut:
    """What the gates of a budget kept of the dense cost by themselves, and what the cut allowed."""

    budget: Budget
    kept: float
    allowed: float

    @property
    def distance(self) -> float:
        return abs(self.kept - self.allowed)


class TrainingCheck:
    """Watches one session's training, from the first step of its mask learning to the decision."""

    def __init__(self, gates: Iterable[nn.Parameter], controller: BudgetController) -> None:
        """Start watching.

        Args:
            gates: The learned parameters of all masks.
            controller: What keeps the gates on their budgets.
        """
        self._gates = list(gates)
        self._before: list[float] = []
        self._controller = controller
        self._forwards = self._without_gradients = self._losses = 0
        self._warned = False
        self._cuts: list[_Cut] = []
        self._changed = self._decided = 0

    def length(self, steps: int) -> None:
        """Warn, before the training, where budgets will fall faster than a network can follow.

        Args:
            steps: Of the mask learning.
        """
        if steps < _FEW and self._controller.budgets:
            _logger.warning(
                "the masks will be learned in %d steps, and budgets fall over a part of them: with fewer than %d the "
                "network cannot follow. Train for longer, or lower pruning.phases.dense or pruning.phases.fixed",
                steps, _FEW,
            )  # fmt: skip

    def forward(self) -> None:
        """Count a forward in train mode while the gates are being learned."""
        if not self._forwards:
            self._before = self._sums()
        self._forwards += 1
        self._without_gradients += not torch.is_grad_enabled()

    def loss(self) -> None:
        """Count a call of the session's loss."""
        self._losses += 1

    def step(self) -> None:
        """Warn where a step was made whose loss left the budget out."""
        if self._controller.has_loss and not self._losses and not self._warned:
            self._warned = True
            _logger.warning(
                "a training step was made without session.loss(): nothing drives the gates of this method to their "
                "sparse_ratio; add it to the loss of every step while the masks are learned"
            )

    def cut(self, budget: Budget, own: Mapping[str, Tensor], cut: Mapping[str, Tensor]) -> None:
        """Note what a budget changed when it was cut.

        Args:
            budget: The budget.
            own: By mask name, the gates as the method decides them without a budget, bool.
            cut: The gates as the budget decides them, bool.
        """
        usages = [float(budget.usage([gates.float() for gates in each.values()])) for each in (own, cut)]
        self._cuts.append(_Cut(budget, *usages))
        self._changed += sum(int((hard != own[name]).sum()) for name, hard in cut.items())
        self._decided += sum(hard.numel() for hard in cut.values())

    def decided(self, steps: int, total_steps: int | None) -> None:
        """Warn where the gates cannot have learned anything, or not enough; log what the cut changed.

        Args:
            steps: Optimizer steps so far, all phases together.
            total_steps: Optimizer steps of the whole training, if known.
        """
        if self._forwards:
            self._warn_if_nothing_was_learned(steps)
        self._warn_if_far(steps, total_steps)
        share = 100 * self._changed / self._decided
        _logger.info("masks decided: the cut changed %d of %d gates (%.3g %%)", self._changed, self._decided, share)
        self._cuts, self._changed, self._decided = [], 0, 0  # a training may go back to before its decision

    def _warn_if_nothing_was_learned(self, steps: int) -> None:
        if not steps:
            _logger.warning(
                "the masks are decided after %d training forwards, but session.step() was never called: the schedules "
                "stood still; call it after every optimizer step",
                self._forwards,
            )
        if self._without_gradients == self._forwards:
            _logger.warning(
                "all training forwards ran without gradients (torch.no_grad or inference_mode): the gates learned "
                "nothing; train them with gradients enabled"
            )
        elif self._gates and not self._have_moved():
            _logger.warning(
                "the gates did not move since the training began: no optimizer holds them; give "
                "session.parameter_groups() to yours, or step those of session.optimizers()"
            )

    def _warn_if_far(self, steps: int, total_steps: int | None) -> None:
        """Warn where the cut changed much of what the gates had kept."""
        steered = [
            cut for cut in self._cuts if cut.budget.ratio is not None and not cut.budget.method.manages_own_sparsity
        ]
        far = [cut for cut in steered if cut.distance > max(_FAR * cut.allowed, _NOTICEABLE)]
        if not far:
            return
        worst = max(far, key=lambda cut: cut.distance)
        of = "" if total_steps is None else f" of {total_steps}"
        _logger.warning(
            "masks decided at step %d%s far from the budget: the gates of %s had kept %.3g %% of the dense cost, the "
            "budget is %.3g %%, and the cut did the rest, for which the network was not trained%s. %s",
            steps, of, shown(worst.budget.name), 100 * worst.kept, 100 * worst.allowed,
            f" ({len(far)} of {len(steered)} budgets are far)" if len(steered) > 1 else "",
            _remedy(steps, total_steps),
        )  # fmt: skip

    def _have_moved(self) -> bool:
        """Return whether an optimizer moved the gates; what is on budget moves without one, too."""
        return self._controller.has_moved if self._controller.budgets else self._sums() != self._before

    def _sums(self) -> list[float]:
        """Return what shows without a copy whether the gates moved; torch counts no changes by fused optimizers."""
        return [float(parameter.detach().sum(dtype=torch.float64)) for parameter in self._gates]


def _remedy(steps: int, total_steps: int | None) -> str:
    if not steps:
        return "Call session.step() after every optimizer step: it brings the gates to their budget"
    if total_steps is not None and steps < total_steps:
        return "The budget was still falling: train to the end, say the real total_steps, or lower pruning.budget.ramp"
    return "Units of a very different cost, or limits that leave no choice, are the usual cause"
