"""Torch-Pruning's arguments as budgets: which groups share one, and how much of each may go."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch_pruning as tp
from torch import nn

from gumbel_plugin.config import PruningSection
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.graph.attention_heads import kind_of
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.graph.tracing import calling
from gumbel_plugin.sparsity.budget import Budget, BudgetTerm
from gumbel_plugin.sparsity.cost_budget import CostBudget
from gumbel_plugin.sparsity.latency import LatencyTable, measure_table
from gumbel_plugin.training.metric_budgets import cost_model
from gumbel_plugin.training.plan import Plan
from gumbel_plugin.training.planner import build_plan

_logger = logging.getLogger(__name__)

Target = Literal["channels", "macs", "parameters", "latency"]


@dataclass(frozen=True)
class Ranking:
    """Which groups are ranked together, and how much of each goes; by group name.

    Attributes:
        budgets: By group name, the name of the budget that it shares; a group that is not in it is ranked alone.
        ratios: The fraction of each group, or of its budget, to remove.
    """

    budgets: Mapping[str, str]
    ratios: Mapping[str, float]


@dataclass(frozen=True)
class GroupBudget:
    """What `GumbelGroupPruner` was asked for, at the present iterative step.

    Attributes:
        target: What the ratio is a fraction of.
        ratio: The fraction to remove from the original network.
        limit: No group loses more than this fraction of its original units (``max_pruning_ratio``).
        round_to: What the number of kept channels is a multiple of.
        ranking: How the groups are ranked, for the target channels.
        original: By group name, how many units it had at first.
        spent: By group name, how many units are left of those that can lose no more, but share a ratio with others.
        dense_cost: The original network's cost, for a target other than channels; 0 if this is the original.
        table: Measured latencies, for the target latency.
    """

    target: Target
    ratio: float
    limit: float
    round_to: int
    ranking: Ranking
    original: Mapping[str, int]
    spent: Mapping[str, int] = field(default_factory=dict)
    dense_cost: float = 0.0
    table: LatencyTable | None = None


def rank(pruner: tp.pruner.BasePruner, groups: Sequence[ChannelGroup], heads: Container[str], step: int) -> Ranking:
    """Read from a pruner's arguments which groups it ranks together, and at which ratio.

    Args:
        pruner: The pruner, of Torch-Pruning.
        groups: The groups.
        heads: Names of those whose units are attention heads.
        step: The iterative step; -1 is the last one.
    """
    budgets: dict[str, str] = {}
    ratios: dict[str, float] = {}
    modules = dict(pruner.model.named_modules())
    patterns = _patterns(pruner) if pruner.isomorphic else {}
    for group in groups:
        layers = [modules[part.module] for part in group.producers]
        own = next((layer for layer in layers if layer in pruner._layer_to_scope), None)
        name, ratio = None, pruner.per_step_pruning_ratio[step]
        if group.name in heads:
            given = pruner.head_pruning_ratio_dict
            ratio = next((given[layer] for layer in layers if layer in given), pruner.per_step_head_pruning_ratio)[step]
            name = "attention heads" if pruner.global_pruning else None
        elif own is not None:
            name, ratio = pruner._layer_to_scope[own][0], pruner.pruning_ratio_dict[own][step]
        elif pruner.isomorphic:
            name = patterns[group.name]
        elif pruner.global_pruning:
            name = "all groups"
        ratios[group.name] = float(ratio)
        if name is not None:
            budgets[group.name] = name
    return Ranking(budgets, ratios)


def _patterns(pruner: tp.pruner.BasePruner) -> dict[str, str]:
    """Return what each group connects: groups of one pattern are comparable (Fang et al., arXiv 2407.04616)."""
    patterns = {}
    for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        kinds = [
            f"{type(dep.source.module).__name__}-{type(dep.target.module).__name__}"
            f"-{'out' if pruner.DG.is_out_channel_pruning_fn(dep.handler) else 'in'}"
            for dep, _ in group
        ]
        patterns[pruner.DG._module2name[group[0].dep.target.module]] = "isomorphic " + " ".join(kinds)
    return patterns


def budget_of(pruner: Any, groups: Sequence[ChannelGroup], step: int) -> GroupBudget:
    """Read from a `GumbelGroupPruner` what it was asked for.

    Args:
        pruner: The pruner.
        groups: The groups that it gates now.
        step: The iterative step; -1 is the last one.
    """
    gated = {group.name for group in groups}
    spent = [group for group in pruner._groups if group.name in pruner._gated - gated]
    return GroupBudget(
        target=pruner._target,
        ratio=pruner.per_step_pruning_ratio[step],
        limit=pruner.max_pruning_ratio,
        round_to=pruner.round_to or 1,
        ranking=rank(pruner, [*groups, *spent], pruner._heads, step),
        original=pruner._original,
        spent={group.name: group.size for group in spent},
        dense_cost=pruner._dense_cost,
        table=pruner._table,
    )


def gated_groups(pruner: Any) -> list[ChannelGroup]:
    """Return the groups of a `GumbelGroupPruner` of which something may go: exact ones, unless their ratio is 0.

    Heads stay unless ``prune_num_heads`` says otherwise.
    """
    allowed = ("exact", "inexact") if pruner._inexact else ("exact",)
    modules = dict(pruner.model.named_modules())
    groups = [
        group
        for group in pruner._groups
        if group.safety in allowed and (group.name in pruner._heads or kind_of(modules[group.name]) is None)
    ]
    if pruner._target != "channels":
        return groups
    ratios = rank(pruner, groups, pruner._heads, -1).ratios
    return [group for group in groups if ratios[group.name] > 0]


def plan_step(pruner: Any, step: int, pruning: PruningSection) -> Plan:
    """Plan the gates of a `GumbelGroupPruner`'s step; -1 is the last one."""
    groups = gated_groups(pruner)
    model, inputs = pruner.model, pruner.example_inputs
    with calling(model, pruner._forward, inputs):
        if pruning.config_list:
            return build_plan(model, pruning, pruner._groups, pruner._seed, inputs)
        if pruner._target == "latency" and pruner._table is None:
            pruner._table = measure_table(model, inputs)
        return plan_groups(model, pruning, groups, budget_of(pruner, groups, step), inputs, pruner._seed)


def why_not(groups: Sequence[ChannelGroup]) -> str:
    """Return why none of these groups is gated: the first few, with their layers' names."""
    if not groups:
        return "there is none beside the ignored layers"
    first = "; ".join(f"{each.name}: {each.reason or 'its ratio is 0, or its heads stay'}" for each in groups[:3])
    return first + (f"; and {len(groups) - 3} more" if len(groups) > 3 else "")


def plan_groups(
    model: nn.Module,
    pruning: PruningSection,
    groups: Sequence[ChannelGroup],
    budget: GroupBudget,
    example_inputs: Any,
    seed: int = 0,
) -> Plan:
    """Plan a session that gates these groups under this budget.

    Raises:
        ConfigError: If the budget is below what must stay; it names what that is.
        TargetError: If the latency table is of another network.
    """
    plan = Plan(model, pruning, seed)
    terms = []
    for group in groups:
        term = plan.gate_group(group)
        terms.append(term)
        original = budget.original.get(group.name, group.size)
        # Torch-Pruning's limit and ratios speak of the original widths, also in later iterative steps.
        term.max_ratio = max(0.0, 1 - (1 - budget.limit) * original / group.size)
        term.multiple = budget.round_to // math.gcd(budget.round_to, _channels_of_a_unit(group))
    if budget.target == "channels":
        return plan.finish(_channel_budgets(terms, budget))
    return plan.finish([_cost_budget(model, plan, terms, budget, example_inputs)])


def _channel_budgets(terms: Sequence[BudgetTerm], asked: GroupBudget) -> list[Budget]:
    """Return the budgets that Torch-Pruning would rank in; there every unit counts the same."""
    budgets: dict[str, Budget] = {}
    for term in terms:
        term.cost = 1.0
        ratio = min(asked.ranking.ratios[term.name], asked.limit)  # as Torch-Pruning caps it
        budget = budgets.setdefault(asked.ranking.budgets.get(term.name, term.name), Budget(term.name, [], ratio))
        budget.add(term)
    for name, budget in budgets.items():
        budget.name = name
        left = {term.name: term.units for term in budget.terms}
        left |= {each: units for each, units in asked.spent.items() if asked.ranking.budgets.get(each) == name}
        original = sum(asked.original.get(each, units) for each, units in left.items())
        wanted = max(0.0, sum(left.values()) - original * (1 - (budget.ratio or 0.0)))
        present = sum(term.units for term in budget.terms)
        budget.ratio = _within_limits(budget, wanted, original) / present
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


def _cost_budget(
    model: nn.Module, plan: Plan, terms: list[BudgetTerm], budget: GroupBudget, example_inputs: Any
) -> CostBudget:
    cost = cost_model(model, plan, budget.target, example_inputs, budget.table)
    present = float(cost(cost.all_open()))
    dense = budget.dense_cost or present  # an earlier step removed something already
    ratio = max(0.0, 1 - dense * (1 - budget.ratio) / present)
    return CostBudget(f"the network's {budget.target}", terms, ratio, model=cost)


def _channels_of_a_unit(group: ChannelGroup) -> int:
    """Return how many output channels of the layer that defines a group leave with one unit."""
    own = [part for part in group.producers if part.module == group.name]
    return max(1, len(own[0].positions) // group.size) if own else 1


__all__ = ["GroupBudget", "Ranking", "Target", "budget_of", "plan_groups", "rank"]
