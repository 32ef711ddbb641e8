"""Torch-Pruning's arguments as budgets: which groups share one, and how much of each may go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from gumbel_plugin.config import PruningSection
from gumbel_plugin.insight.profile import count_macs, count_parameters
from gumbel_plugin.learning.budget import Member, Scope
from gumbel_plugin.learning.cost import CostScope, count_cost
from gumbel_plugin.learning.latency import LatencyTable, latency_cost
from gumbel_plugin.learning.plan import Plan
from gumbel_plugin.masks.targets import ChannelGroup

Target = Literal["channels", "macs", "parameters", "latency"]


@dataclass(frozen=True)
class Budget:
    """What `GumbelGroupPruner` was asked for, at the present iterative step.

    Attributes:
        target: What the ratio is a fraction of.
        ratio: The fraction to remove from the original network.
        shared: The groups share one budget (``global_pruning``).
        isomorphic: Groups of the same pattern share one budget.
        limit: No group loses more than this fraction of its original units (``max_pruning_ratio``).
        round_to: What the number of kept channels is a multiple of.
        layers: By group name, a ratio of its own and the name of the scope that shares it.
        original: By group name, how many units it had at first.
        table: Measured latencies, for the target latency.
        dense_cost: The original network's cost, for a target other than channels.
    """

    target: Target
    ratio: float
    shared: bool
    isomorphic: bool
    limit: float
    round_to: int
    layers: Mapping[str, tuple[str, float]]
    original: Mapping[str, int]
    dense_cost: float = 0.0
    table: LatencyTable | None = None


def plan_groups(
    model: nn.Module,
    pruning: PruningSection,
    groups: Sequence[ChannelGroup],
    budget: Budget,
    example_inputs: Any,
) -> Plan:
    """Plan a session that gates these groups under this budget.

    Raises:
        ConfigError: If the budget is below what must stay.
    """
    plan = Plan(model, pruning, seed=0)
    scopes: dict[str, Scope] = {}
    members = []
    for group in groups:
        member = plan.gate_group(group)
        members.append(member)
        original = budget.original[group.name]
        # Torch-Pruning's limit and ratios speak of the original widths, also in later iterative steps.
        member.max_ratio = max(0.0, 1 - (1 - budget.limit) * original / group.size)
        member.multiple = max(1, round(budget.round_to * group.size / _channels_of(group)))
        if budget.target == "channels":
            _join_channel_scope(scopes, member, group, budget)
    plan.join_consumers()
    if budget.target == "channels":
        plan.scopes = list(scopes.values())
    else:
        plan.scopes = [_cost_scope(model, plan, members, budget, example_inputs)]
    return plan


def _join_channel_scope(scopes: dict[str, Scope], member: Member, group: ChannelGroup, budget: Budget) -> None:
    """Put a group in the scope that Torch-Pruning would rank it in; there every unit counts the same."""
    member.cost = 1.0
    if group.name in budget.layers:
        name, ratio = budget.layers[group.name]
    else:
        name, ratio = group.name, budget.ratio
        if budget.isomorphic:
            name = _pattern(group)
        elif budget.shared:
            name = "all groups"
    scope = scopes.setdefault(name, Scope(name, [], ratio))
    scope.members.append(member)
    original = sum(budget.original[m.name] for m in scope.members)
    scope.ratio = max(0.0, 1 - original * (1 - ratio) / sum(m.units for m in scope.members))


def _cost_scope(
    model: nn.Module, plan: Plan, members: list[Member], budget: Budget, example_inputs: Any
) -> CostScope:
    if budget.table is not None:
        cost_model = latency_cost(model, plan.groups, budget.table)
    else:
        count = count_macs(model, example_inputs) if budget.target == "macs" else count_parameters(model)
        cost_model = count_cost(model, plan.groups, example_inputs, budget.target, count)
    scope = CostScope(f"the network's {budget.target}", members, budget.ratio, model=cost_model)
    if budget.dense_cost > scope.total:  # an earlier step removed something already
        scope.ratio = max(0.0, 1 - budget.dense_cost * (1 - budget.ratio) / scope.total)
    return scope


def _channels_of(group: ChannelGroup) -> int:
    return max(len(part.positions) for part in (*group.producers, *group.consumers))


def _pattern(group: ChannelGroup) -> str:
    """Name a group by what it connects: groups of the same pattern are comparable (Fang et al., arXiv 2407.04616)."""
    return f"{len(group.producers)} producers, {len(group.consumers)} consumers, {_channels_of(group) / group.size:g}"


__all__ = ["Budget", "Target", "plan_groups"]
