"""Ratios, limits and costs of channel groups speak of the network as it was at first, whatever has left since."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from gumbel_plugin.config import PruningSection
from gumbel_plugin.errors import ConfigError, TargetError
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.graph.dependency_groups import find_groups
from gumbel_plugin.sparsity.counting import count_macs
from gumbel_plugin.training.group_planner import GroupPlanner, Share
from gumbel_plugin.training.plan import Plan

X = torch.randn(2, 4)


def network(first: int = 20, second: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 3))


def groups_of(model: nn.Module) -> list[ChannelGroup]:
    return find_groups(model, X)


def planner(**keys: Any) -> GroupPlanner:
    return GroupPlanner(PruningSection(), 0, groups_of(network()), **keys)


def plan(made: GroupPlanner, model: nn.Module, shares: dict[str, Share]) -> Plan:
    return made.plan(model, groups_of(model), shares, X)


def left(made: Plan) -> dict[str, int]:
    """Return how many units of each group the plan's cuts leave."""
    return {name: int(kept.sum()) for budget in made.budgets for name, kept in budget.cut().items()}


EACH = {"0": Share("0", 0.5), "2": Share("2", 0.5)}
TOGETHER = {"0": Share("all", 0.5), "2": Share("all", 0.5)}


def test_a_ratio_is_of_the_first_widths_whatever_left_before() -> None:
    made = planner()
    assert left(plan(made, network(), EACH)) == {"0": 10, "2": 5}
    assert left(plan(made, network(14, 5), EACH)) == {"0": 10, "2": 5}
    assert left(plan(made, network(8, 10), EACH)) == {"0": 8, "2": 5}


def test_a_shared_ratio_counts_groups_that_can_lose_no_more() -> None:
    made = planner()
    assert sum(left(plan(made, network(), TOGETHER)).values()) == 15
    assert left(plan(made, network(18, 1), TOGETHER)) == {"0": 14}  # and one unit of the other: half of 30


def test_limits_are_of_the_first_widths_and_widths_are_multiples() -> None:
    made = planner(limit=0.6, round_to=4)
    shares = {"0": Share("0", 0.9), "2": Share("2", 0.1)}
    assert left(plan(made, network(), shares)) == {"0": 8, "2": 8}
    assert left(plan(made, network(12, 9), shares)) == {"0": 8, "2": 8}


def test_limits_of_a_shared_ratio_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = left(plan(planner(limit=0.4, round_to=4), network(), TOGETHER))
    assert found == {"0": 12, "2": 8}
    assert "the ratio 0.4 of 'all' is not met: of its 30 channels 20 stay" in caplog.text
    greedy = {name: Share("all", 0.97) for name in TOGETHER}
    with pytest.raises(ConfigError, match=r"2 stay, because each of its 2 groups keeps one channel.*ratio is 0\.933"):
        plan(planner(), network(), greedy)


def test_a_cost_is_that_of_the_first_network() -> None:
    made, dense = planner(metric="macs"), count_macs(network(), X)
    for model in (network(), network(14, 8)):
        widths = left(plan(made, model, TOGETHER))
        assert 0.45 * dense < count_macs(network(widths["0"], widths["2"]), X) <= 0.5 * dense


def test_a_group_that_nothing_is_asked_of_is_left_alone() -> None:
    assert set(plan(planner(), network(), {"2": EACH["2"]}).masks) == {"2"}
    with pytest.raises(TargetError, match=r"can be gated: .*0: its ratio is 0, or its heads stay"):
        plan(planner(), network(), {})
