"""Plans for channel groups that leave in several steps, under ratios and limits of the network as it was at first."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from gumbel_plugin.config import PruningSection
from gumbel_plugin.errors import ConfigError, NothingToGateError
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.sparsity.budget import Budget, BudgetTerm
from gumbel_plugin.sparsity.cost_budget import CostBudget
from gumbel_plugin.sparsity.latency import LatencyTable, measure_table
from gumbel_plugin.training.metric_budgets import cost_model
from gumbel_plugin.training.plan import Plan
from gumbel_plugin.training.planner import build_plan

_logger = logging.getLogger(__name__)

GroupMetric = Literal["channels", "macs", "parameters", "latency"]


@dataclass(frozen=True)
class Share:
    """What is asked of a channel group.

    Attributes:
        budget: The budget in which its units are ranked: its own name, or one that several groups share.
        ratio: The fraction of the budget's original cost to remove.
    """

    budget: str
    ratio: float


class GroupPlanner:
    """Plans the gates of one network's channel groups, before the first step and again after each.

    Attributes:
        metric: What ratios are fractions of: the channels of each budget, or the whole network's cost, for which all
            groups share one ratio.
    """

    def __init__(
        self,
        pruning: PruningSection,
        seed: int,
        groups: Sequence[ChannelGroup],
        *,
        metric: GroupMetric = "channels",
        limit: float = 1.0,
        round_to: int = 1,
        inexact: bool = False,
        table: LatencyTable | None = None,
    ) -> None:
        """Take note of the network as it is at first.

        Args:
            pruning: How gates are learned. A config list in it says what is gated and how much goes, instead of shares.
            seed: Seeds the masks' noise.
            groups: All groups of the original network.
            metric: See above.
            limit: No group loses more than this fraction of its original units.
            round_to: What the number of kept channels is a multiple of.
            inexact: Whether groups are gated too whose removal changes what a normalization computes.
            table: Measured latencies, for that metric; measured once without it.
        """
        self.metric = metric
        self._pruning, self._seed = pruning, seed
        self._limit, self._round_to = limit, round_to
        self._safe = ("exact", "inexact") if inexact else ("exact",)
        self._table = table
        self._original = {group.name: group.size for group in groups if group.safety in self._safe}
        self._dense_cost = 0.0

    def gated(self, groups: Sequence[ChannelGroup], shares: Mapping[str, Share]) -> list[ChannelGroup]:
        """Return the groups that a plan gates: those of which something is asked, and that can be cut."""
        return [group for group in groups if group.name in shares and group.safety in self._safe]

    def plan(
        self, model: nn.Module, groups: Sequence[ChannelGroup], shares: Mapping[str, Share], example_inputs: Any
    ) -> Plan:
        """Plan the gates of the network as it is now.

        Args:
            model: The plain model.
            groups: All of its groups.
            shares: What is asked, by group name; a group without is left alone.
            example_inputs: One batch, where a cost is counted.

        Raises:
            ConfigError: If the budget is below what must stay; it names what that is.
            NothingToGateError: If nothing can be gated; it has the groups, with their reasons.
            TargetError: If the latency table is of another network.
        """
        if self._pruning.config_list:
            return build_plan(model, self._pruning, groups, self._seed, example_inputs)
        gated = self.gated(groups, shares)
        if not gated:
            message = f"no dependency group of this model can be gated: {_why_not(groups)}"
            raise NothingToGateError(message, groups)
        plan = Plan(model, self._pruning, self._seed)
        terms = [self._limited(plan.gate_group(group), group) for group in gated]
        if self.metric == "channels":
            spent = {group.name: group.size for group in groups if group.name in self._original.keys() - plan.groups}
            return plan.finish(self._channel_budgets(terms, shares, spent))
        if self.metric == "latency" and self._table is None:
            self._table = measure_table(model, example_inputs)
        cost = cost_model(model, plan, self.metric, example_inputs, self._table)
        present = float(cost(cost.all_open()))
        self._dense_cost = self._dense_cost or present
        ratio = max(0.0, 1 - self._dense_cost * (1 - shares[gated[0].name].ratio) / present)
        return plan.finish([CostBudget(f"the network's {self.metric}", terms, ratio, model=cost)])

    def _limited(self, term: BudgetTerm, group: ChannelGroup) -> BudgetTerm:
        """Give a group's term its limits, which speak of the original widths."""
        original = self._original.get(group.name, group.size)
        term.max_ratio = max(0.0, 1 - (1 - self._limit) * original / group.size)
        term.multiple = self._round_to // math.gcd(self._round_to, _channels_of_a_unit(group))
        return term

    def _channel_budgets(
        self, terms: Sequence[BudgetTerm], shares: Mapping[str, Share], spent: Mapping[str, int]
    ) -> list[Budget]:
        """Return budgets in which every unit counts the same, also those of groups that can lose no more."""
        budgets: dict[str, Budget] = {}
        for term in terms:
            term.cost = 1.0
            share = shares[term.name]
            ratio = min(share.ratio, self._limit)
            budgets.setdefault(share.budget, Budget(share.budget, [], ratio)).add(term)
        for name, budget in budgets.items():
            left = {term.name: term.units for term in budget.terms}
            left |= {each: size for each, size in spent.items() if each in shares and shares[each].budget == name}
            original = sum(self._original.get(each, size) for each, size in left.items())
            wanted = max(0.0, sum(left.values()) - original * (1 - (budget.ratio or 0.0)))
            budget.ratio = _within_limits(budget, wanted, original) / sum(term.units for term in budget.terms)
        return list(budgets.values())


def _within_limits(budget: Budget, wanted: float, original: int) -> float:
    """Return how many units of a budget go: as many as wanted, or as its groups' limits let go, with a warning.

    Raises:
        ConfigError: If nothing was removed yet and there are more groups than units that would stay.
    """
    possible = sum(term.prunable_range()[1] for term in budget.terms)
    present = sum(term.units for term in budget.terms)
    if len(budget.terms) == 1 or math.floor(wanted + 1e-6) <= possible:
        return wanted
    most = sum(term.units - 1 for term in budget.terms)
    if present == original and math.floor(wanted + 1e-6) > most:
        raise ConfigError(
            f"pruning_ratio {budget.ratio:g} of the {original} channels of {budget.name!r} cannot be met: "
            f"{present - most} stay, because each of its {len(budget.terms)} groups keeps one channel; the largest "
            f"possible ratio is {math.floor(1000 * most / original) / 1000:.3f}"
        )
    _logger.warning(
        "the ratio %.3g of %r is not met: of its %d channels %d stay, which max_pruning_ratio and round_to demand",
        budget.ratio,
        budget.name,
        original,
        present - possible,
    )
    return float(possible)


def _channels_of_a_unit(group: ChannelGroup) -> int:
    """Return how many output channels of the layer that defines a group leave with one unit."""
    own = [part for part in group.producers if part.module == group.name]
    return max(1, len(own[0].positions) // group.size) if own else 1


def _why_not(groups: Sequence[ChannelGroup]) -> str:
    """Return why none of these groups is gated: the first few, with their layers' names."""
    if not groups:
        return "there is none beside the ignored layers"
    first = "; ".join(f"{each.name}: {each.reason or 'its ratio is 0, or its heads stay'}" for each in groups[:3])
    return first + (f"; and {len(groups) - 3} more (the error's `groups` has all)" if len(groups) > 3 else "")
