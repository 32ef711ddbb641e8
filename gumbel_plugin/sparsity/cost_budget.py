"""A budget over the whole network in what a deployer pays: MACs, parameters or latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.sparsity.budget import Budget
from gumbel_plugin.sparsity.cost_model import CostModel

_REOPEN = 64
"""How many units at the edge of a cut are tried again."""


@dataclass(eq=False)
class CostBudget(Budget):
    """A budget over the whole network, in a cost that is a product of what stays before and after each layer.

    Attributes:
        model: The cost of the network as a function of the gates of its terms.
    """

    model: CostModel = field(kw_only=True)

    def __post_init__(self) -> None:
        self._dense = float(self.model(self.model.all_open()))
        self._check_floor()

    @property
    def achievable(self) -> float:
        """The ratio itself: one that cannot be met was refused."""
        return self.ratio or 0.0

    @property
    def total(self) -> float:
        """The dense network's cost."""
        return self._dense

    @override
    def usage(self, gates: Sequence[Tensor]) -> Tensor:
        return self.model({term.name: gate for term, gate in zip(self.terms, gates, strict=True)}) / self.total

    @torch.no_grad()
    def cut(self) -> dict[str, Tensor]:
        """Return hard gates whose cost is at most the budget, and short of it by less than the units at the edge.

        As few of the lowest-scored units as meet the budget are closed; then those of them that still fit open again,
        the highest-scored first: a costly unit at the edge would leave a gap that cheaper ones can fill.
        """
        scores = {term.name: term.mask.scores(term.weight).float().flatten().cpu() for term in self.terms}
        order = self._removal_order(scores)
        low, high = 0, len(order)
        while low < high:  # the cost falls with every unit: bisect for the fewest that meet the budget
            middle = (low + high) // 2
            if self._meets(self._rounded(self._without(order[:middle]), scores)):
                high = middle
            else:
                low = middle + 1
        gates = self._without(order[:low])
        for name, unit in reversed(order[max(0, low - _REOPEN) : low]):
            gates[name][unit] = True
            gates[name][unit] = self._meets(self._rounded(gates, scores))
        rounded = self._rounded(gates, scores)
        return {term.name: rounded[term.name].to(term.mask.hard.device) for term in self.terms}

    def _meets(self, gates: Mapping[str, Tensor]) -> bool:
        cost = float(self.model({name: gate.double() for name, gate in gates.items()}))
        return cost <= self.total * (1 - (self.ratio or 0.0)) * (1 + 1e-9)

    def _removal_order(self, scores: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        """Return (mask, unit) pairs, the lowest score first; units that must stay are left out.

        Among equal scores every mask loses its share in turn: gates that were not learned do not empty one layer first.
        """
        candidates = []
        for term in self.terms:
            score = scores[term.name]
            units = torch.argsort(score, stable=True)[: term.prunable_range()[1]]
            for place, (value, unit) in enumerate(zip(score[units].tolist(), units.tolist(), strict=True)):
                candidates.append((value, place / term.units, term.name, unit))
        return [(name, unit) for _, _, name, unit in sorted(candidates)]

    def _without(self, units: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        """Return gates that are open but for these units."""
        closed: dict[str, list[int]] = {term.name: [] for term in self.terms}
        for name, unit in units:
            closed[name].append(unit)
        gates = {term.name: torch.ones(term.units, dtype=torch.bool) for term in self.terms}
        for name, own in closed.items():
            gates[name][own] = False
        return gates

    def _rounded(self, gates: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gates with as many more closed as `BudgetTerm.multiple` wants."""
        rounded = {name: gate.clone() for name, gate in gates.items()}
        for term in self.terms:
            term.round_down(rounded[term.name], scores[term.name])
        return rounded

    def _check_floor(self) -> None:
        """Refuse a budget below what is left when every group keeps as little as it may."""
        smallest = self.model.all_open()
        for term in self.terms:
            smallest[term.name][term.units - term.prunable_range()[1] :] = 0.0
        floor = float(self.model(smallest)) / self.total
        if floor > 1 - (self.ratio or 0.0) + 1e-9:
            left = self.model.by_layer(smallest)
            worst = max(left, key=lambda name: left[name])
            raise ConfigError(
                f"pruning_ratio {self.ratio:g} of the {self.model.metric} cannot be met: {floor:.1%} stay when every "
                f"group keeps its minimum ({self.model.constant / self.total:.1%} cannot be gated at all, the largest "
                f"gated layer left is {worst!r}); the largest possible ratio is {1 - floor:.3f}"
            )
