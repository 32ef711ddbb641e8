"""Ratios at and above ``max_pruning_ratio``: refused at once for a reason that is true, or met as far as limits let."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from torch import nn

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.errors import ConfigError

INPUTS = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def make(first: int, second: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 3))


SIZES = [(16, 24), (7, 12), (64, 128)]
SWEEP = [
    (*sizes, ratio, limit, steps, round_to)
    for sizes, ratio, limit in itertools.product(SIZES, (0.1, 0.5, 0.95), (0.1, 0.3, 0.5, 1.0))
    for steps, round_to in ((10, 1),) + (((1, 1), (3, 4)) if sizes == (16, 24) else ())
]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "ratio", "limit", "steps", "round_to"), SWEEP)
def test_shared_ratios_are_met_as_far_as_limits_let(first, second, ratio, limit, steps, round_to):
    model = make(first, second)
    arguments = {"pruning_ratio": ratio, "max_pruning_ratio": limit, "round_to": round_to, "iterative_steps": steps}
    if (first + second) * (1 - min(ratio, limit)) < 1:
        with pytest.raises(ConfigError, match="keeps one channel"):
            GumbelGroupPruner(model, INPUTS, global_pruning=True, **arguments)
        return
    pruner = GumbelGroupPruner(model, INPUTS, global_pruning=True, **arguments)
    for _ in range(steps):
        pruner.step()
    sizes, left = (first, second), (model[0].out_features, model[2].out_features)
    fewest = [max(1, size - int(size * limit + 1e-6)) for size in sizes]
    fewest = [min(size, -(-least // round_to) * round_to) for size, least in zip(sizes, fewest, strict=True)]
    assert all(now >= least for now, least in zip(left, fewest, strict=True))
    wanted = sum(sizes) - int(sum(sizes) * min(ratio, limit) + 1e-6)
    expected = max(wanted, sum(fewest))
    assert expected - len(sizes) * (round_to - 1) <= sum(left) <= expected


@pytest.mark.slow
@pytest.mark.parametrize("target", ["macs", "parameters"])
@pytest.mark.parametrize(("ratio", "limit"), [(0.3, 0.5), (0.5, 0.5), (0.9, 0.5)])
def test_costs_are_met_within_limits_or_refused_at_once(target, ratio, limit):
    model = make(16, 24)
    before = sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear))
    arguments = {"target": target, "pruning_ratio": ratio, "max_pruning_ratio": limit, "iterative_steps": 5}
    if ratio == 0.9:
        with pytest.raises(ConfigError, match="cannot be met"):
            GumbelGroupPruner(model, INPUTS, **arguments)
        return
    pruner = GumbelGroupPruner(model, INPUTS, **arguments)
    for _ in range(5):
        pruner.step()
    assert model[0].out_features >= 8
    assert model[2].out_features >= 12
    assert sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear)) <= before * (1.02 - ratio)


def test_a_ratio_above_the_limit_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        GumbelGroupPruner(make(16, 24), INPUTS, pruning_ratio=0.8, max_pruning_ratio=0.5)
    assert "pruning_ratio = 0.8 is above max_pruning_ratio = 0.5" in caplog.text


def test_a_step_that_removes_nothing_is_told(caplog):
    pruner = GumbelGroupPruner(make(2, 2), INPUTS, pruning_ratio=0.9, iterative_steps=3)
    pruner.step()
    pruner.step()
    with caplog.at_level(logging.WARNING):
        pruner.step()
    assert "step 3 removes nothing" in caplog.text
