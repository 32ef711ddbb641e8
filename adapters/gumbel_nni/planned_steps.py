"""What NNI says about a training: how long it will be, and where the sparse ratios stand now."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.utils import Evaluator
from nni.compression.utils.evaluator import LightningEvaluator, TransformersEvaluator

from gumbel_nni.compat.compressors import planned_length
from gumbel_plugin.sparsity.budget import Budget, BudgetTerm
from gumbel_plugin.training.plan import Plan

_logger = logging.getLogger(__name__)
_NOT_YET = sys.maxsize


class PlannedSteps:
    """How many optimizer steps an evaluator's next training has.

    Steps are told beforehand. Epochs are turned into steps by the trainers of Lightning and Transformers, once they
    run; a training function of a `TorchEvaluator` does not tell.

    Attributes:
        planned: The number of steps; a very large number if it will be known later, None if it will not.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        steps, epochs = planned_length(evaluator)
        later = isinstance(evaluator, LightningEvaluator | TransformersEvaluator)
        self.planned: int | None = steps if steps is not None or not later else _NOT_YET
        if self.planned is None and epochs is not None:
            _logger.warning(
                "max_epochs = %d does not say how many steps that is: masks are learned from the first step on, at "
                "their final sparsity; pass max_steps to have phases and a ramp",
                epochs,
            )

    def known(self, total: int | None) -> int | None:
        """Return the number of steps, asking the trainer (which runs by now) if it was not known before.

        Args:
            total: What was known so far.
        """
        if total != _NOT_YET:
            return total
        if isinstance(self._evaluator, LightningEvaluator):
            steps = self._evaluator.model.trainer.estimated_stepping_batches
        else:
            steps = self._evaluator.trainer.state.max_steps
        return int(steps) if 0 < steps < _NOT_YET else None


class SparsityTargets:
    """The sparse ratios (and thresholds and bounds) of a pruner's target spaces, which others may change at any time.

    `LinearPruner` and `AGPPruner` do: they scale them from zero to what was configured.
    """

    def __init__(self, plan: Plan, target_spaces: Mapping[str, Mapping[str, PruningTargetSpace]]) -> None:
        """Note which target space says what a mask's budget is."""
        self._spaces: list[tuple[Budget, BudgetTerm, PruningTargetSpace]] = []
        for budget in plan.budgets:
            for term in budget.terms:
                group = plan.groups.get(term.name)
                layers = [part.module for part in group.producers] if group is not None else [term.name]
                spaces = [target_spaces[name]["weight"] for name in layers if "weight" in target_spaces.get(name, {})]
                if spaces:
                    self._spaces.append((budget, term, spaces[0]))
        self._read = [_settings(space) for _, _, space in self._spaces]

    def read(self) -> None:
        """Take over what was changed in the target spaces; what was not is as the plan has it."""
        for number, (budget, term, space) in enumerate(self._spaces):
            now = _settings(space)
            if now != self._read[number]:
                self._read[number] = now
                budget.ratio, budget.threshold, term.min_ratio, term.max_ratio = now


def _settings(space: PruningTargetSpace) -> tuple[float | None, float | None, float, float]:
    limit = 1.0 if space.max_sparse_ratio is None else space.max_sparse_ratio
    return space.sparse_ratio, space.sparse_threshold, space.min_sparse_ratio or 0.0, limit
