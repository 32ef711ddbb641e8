"""Where the sparse ratios of NNI's target spaces stand now."""

from __future__ import annotations

from collections.abc import Mapping

from nni.compression.base.target_space import PruningTargetSpace

from gumbel_plugin.sparsity.budget import Budget, BudgetTerm
from gumbel_plugin.training.plan import Plan


class SparsityTargets:
    """The sparse ratios (and thresholds and bounds) of a pruner's target spaces, which others may change at any time.

    `LinearPruner` and `AGPPruner` do: they scale them from zero to what was configured.
    """

    def __init__(self, plan: Plan, target_spaces: Mapping[str, Mapping[str, PruningTargetSpace]]) -> None:
        """Note which target space has a mask's budget."""
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
