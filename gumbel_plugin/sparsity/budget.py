"""Budgets: how many units may stay, and the cut that meets them exactly."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.sparsity.budgeted import BudgetedMask
from gumbel_plugin.sparsity.ranking import count_to_prune

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class BudgetTerm:
    """One mask's part in a budget.

    Attributes:
        name: The mask's name.
        mask: The mask.
        weight_source: Returns the weight that a weight-dependent method reads, or None for channel groups.
        cost: How many weights one unit stands for.
        max_ratio: At most this fraction of the units goes.
        min_ratio: At least this fraction of the units goes.
        multiple: How many units stay is a multiple of this (as far as the mask has that many).
        least: How many units stay at least: 1, or 0 where the network works without any, as around a residual block.
    """

    name: str
    mask: BudgetedMask
    weight_source: object
    cost: float = 1.0
    max_ratio: float = 1.0
    min_ratio: float = 0.0
    multiple: int = 1
    least: int = 1

    @property
    def weight(self) -> Tensor | None:
        """The weight a weight-dependent method reads."""
        return getattr(self.weight_source, "weight", None)

    @property
    def units(self) -> int:
        """How many units the mask has."""
        return math.prod(self.mask.shape)

    def prunable_range(self) -> tuple[int, int]:
        """Return the least and the most units that may go; a type that fixes its own density leaves no choice."""
        density = self.mask.sparsity_type.density
        if density is not None:
            return (self.units - round(self.units * density),) * 2
        most = self.units - self._fewest()
        return min(count_to_prune(self.units, self.min_ratio), most), most

    def removal_order(self, scores: Tensor) -> Tensor:
        """Return the units in the order in which they go, from their scores, one dimension each."""
        order = torch.argsort(scores, stable=True)
        if self.mask.sparsity_type.density is None:
            return order
        kept = self.mask.sparsity_type.project(scores.reshape(self.mask.shape), 0.0).flatten()
        return order[torch.argsort(kept[order], stable=True)]

    def round_down(self, kept: Tensor, scores: Tensor) -> None:
        """Close the lowest-scored of the kept units, in place, until their number is a multiple."""
        count = int(kept.sum())
        target = max(count - count % self.multiple, self._fewest())
        if target < count:
            open_units = torch.nonzero(kept).flatten()
            kept[open_units[torch.argsort(scores[open_units], stable=True)[: count - target]]] = False

    def _fewest(self) -> int:
        """Return how many units stay at least: a multiple, as far as the mask has that many."""
        least = max(self.least, self.units - count_to_prune(self.units, self.max_ratio))
        return min(self.units, math.ceil(least / self.multiple) * self.multiple)


@dataclass(eq=False)
class Budget:
    """Masks that share one budget: a layer, a dependency group, or the whole network.

    Attributes:
        name: What it is called in messages.
        terms: Its masks.
        ratio: The fraction of its weights to remove, None where the gates decide by themselves.
        threshold: Without a ratio: a unit stays if its P(keep) is at least this.
        constant: The cost of what is counted too, but has no gates.
    """

    name: str
    terms: list[BudgetTerm] = field(default_factory=list)
    ratio: float | None = None
    threshold: float | None = None
    constant: float = field(default=0.0, kw_only=True)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name in ("ratio", "constant"):  # the masks of some methods follow it at every forward
            for term in self.terms:
                self._sync(term)

    def add(self, term: BudgetTerm) -> None:
        """Let one more mask share the budget."""
        self.terms.append(term)
        self._sync(term)

    def _sync(self, term: BudgetTerm) -> None:
        ratio = self.of_gated(self.ratio)
        term.mask.sparsity = None if ratio is None else min(max(ratio, term.min_ratio), term.max_ratio)

    def of_gated(self, ratio: float | None) -> float | None:
        """Return a fraction of everything that is counted as a fraction of what has gates."""
        if not ratio or not self.constant:
            return ratio
        gated = sum(term.units * term.cost for term in self.terms)
        return min(1.0, ratio * (gated + self.constant) / gated)

    @property
    def method(self) -> BudgetedMask:
        """One of its masks, which are all of one method."""
        return self.terms[0].mask

    def check(self) -> None:
        """Refuse a budget that the method cannot have.

        Raises:
            ConfigError: If the method needs a ratio and there is none, or its masks cannot share one.
        """
        method, what = self.method.method_name, self.terms[0].name
        if self.method.manages_own_sparsity and self.ratio is None:
            raise ConfigError(f"sparse_ratio of {what!r} is missing: method {method!r} cannot find one by itself")
        if len(self.terms) > 1 and not self.method.shares_budget:
            raise ConfigError(
                f"{self.name}: method {method!r} ranks {what!r} and the others each by itself, so that they cannot "
                "share a budget; leave out global_group_id (in Torch-Pruning, global_pruning)"
            )

    def check_ratio(self) -> None:
        """Refuse a ratio that leaves a layer without its last unit, or that what has gates cannot meet.

        Raises:
            ConfigError: With the highest ratio that can be met.
        """
        if self.ratio is not None and self.constant and self.ratio > self.achievable + 1e-9:
            raise ConfigError(
                f"budget.ratio {self.ratio:g} of {self.name} cannot be met: {self.constant / self.total:.1%} have no "
                f"gates; the largest possible ratio is {self.achievable:.3f}"
            )
        if self.ratio is None or self.constant or len(self.terms) > 1:
            return
        (term,) = self.terms
        most = 1 - term.least / term.units
        if min(self.ratio, term.max_ratio) > most + 1e-9:
            raise ConfigError(
                f"sparse_ratio {self.ratio:g} leaves {term.name!r} less than one of its {term.units} units: lower "
                f"it to at most {most:.4g}, exclude the layer, or set max_sparse_ratio"
            )

    @property
    def achievable(self) -> float:
        """The fraction to remove as far as the terms' limits let it; 0 without a ratio."""
        limits = [term.prunable_range() for term in self.terms]
        lowest, highest = (
            sum(m.cost * limit[end] for m, limit in zip(self.terms, limits, strict=True)) for end in (0, 1)
        )
        return min(max(self.ratio or 0.0, lowest / self.total), highest / self.total)

    @property
    def total(self) -> float:
        """The cost of all units, and the constant."""
        return self.constant + sum(term.units * term.cost for term in self.terms)

    def usage(self, gates: Sequence[Tensor]) -> Tensor:
        """Return the fraction of the dense cost that stays under gates (soft or hard), one tensor a term."""
        shares = [g.sum() * (term.cost / self.total) for g, term in zip(gates, self.terms, strict=True)]
        return sum(shares[1:], start=shares[0]) + self.constant / self.total

    @torch.no_grad()
    def cut(self) -> dict[str, Tensor]:
        """Return the hard gates of every term, bool, that meet the ratio exactly (or the threshold, without one).

        Units go in the order of their scores, the lowest first, until what is gone reaches the ratio: ⌊ratio · units⌋
        of them where all units cost the same; otherwise the cost may pass the ratio by less than one unit.
        """
        if self.ratio is None:
            return {term.name: self._threshold(term) for term in self.terms}
        scores = [term.mask.scores(term.weight).float().flatten() for term in self.terms]
        keep = [torch.ones_like(score, dtype=torch.bool) for score in scores]
        gone = 0.0
        candidates: list[tuple[Tensor, Tensor, int]] = []
        for number, (term, score) in enumerate(zip(self.terms, scores, strict=True)):
            least, most = term.prunable_range()
            order = term.removal_order(score)
            keep[number][order[:least]] = False
            gone += least * term.cost
            candidates.append((score[order[least:most]], order[least:most], number))
        highest = self._remove(candidates, keep, self._to_remove(self.ratio) - gone)
        for term, kept, score in zip(self.terms, keep, scores, strict=True):
            term.round_down(kept, score)
            if int(kept.sum()) != 1 or term.units == 1:
                continue
            if self.ratio * term.units > term.units - 1 or float(score[kept].max()) < highest:
                _logger.warning("%s would lose its last unit; it keeps one", term.name)
        return {m.name: kept.reshape(m.mask.shape) for m, kept in zip(self.terms, keep, strict=True)}

    def _to_remove(self, ratio: float) -> float:
        """Return the cost to remove: whole units where they all cost the same, else whole weights."""
        costs = {term.cost for term in self.terms}
        if len(costs) == 1 and not self.constant:
            return count_to_prune(sum(term.units for term in self.terms), ratio) * costs.pop()
        return cost_to_prune(self.total, ratio)

    def _remove(self, candidates: Sequence[tuple[Tensor, Tensor, int]], keep: list[Tensor], needed: float) -> float:
        """Close the lowest-scored candidates until their cost reaches what is needed; return the last one's score.

        That is -inf if none had to go, and inf if all of them were not enough.
        """
        if needed <= 0:
            return -math.inf
        costs = torch.cat(
            [torch.full(units.shape, self.terms[n].cost, dtype=torch.float64) for _, units, n in candidates]
        )
        scores = torch.cat([score for score, _, _ in candidates]).cpu()
        order = torch.argsort(scores, stable=True)
        reached = torch.cumsum(costs[order], 0)
        enough = int(torch.searchsorted(reached, needed * (1 - 1e-12))) + 1  # sums of fractional costs are rounded
        count = min(enough, len(order))
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[:count]] = True
        start = 0
        for _, units, number in candidates:
            part = chosen[start : start + len(units)].to(units.device)
            keep[number][units[part]] = False
            start += len(units)
        return math.inf if enough > len(order) else float(scores[order[count - 1]])

    def _threshold(self, term: BudgetTerm) -> Tensor:
        if self.threshold is None:
            kept = term.mask.decide(term.weight)
        else:
            kept = term.mask.probability(term.weight) >= self.threshold
        least, most = term.prunable_range()
        gone = int((~kept).sum())
        if least <= gone <= most and term.mask.sparsity_type.density is None:
            return kept
        if gone == term.units:
            _logger.warning("%s would lose its last unit; it keeps one", term.name)
        order = term.removal_order(term.mask.scores(term.weight).flatten())
        within = torch.ones_like(kept).flatten()
        within[order[: min(max(gone, least), most)]] = False
        return within.reshape(kept.shape)


def cost_to_prune(total: float, ratio: float) -> float:
    """Return the cost to remove from a total: whole numbers where the costs are whole."""
    return float(count_to_prune(round(total), ratio)) if float(total).is_integer() else total * ratio
