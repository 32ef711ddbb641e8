"""max_pruning_ratio beside pruning_ratio: all steps run, and the end is as near to the ratio as the limits allow."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from gumbel_plugin import GumbelGroupPruner

INPUTS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def network(first: int, second: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 3))


@pytest.mark.parametrize("round_to", [None, 4])
@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize(("ratio", "limit"), [(0.1, 0.1), (0.5, 0.1), (0.5, 0.5), (0.95, 0.5)])
@pytest.mark.parametrize("widths", [(16, 24), (64, 128)])
def test_every_step_runs_to_the_limits(
    widths: tuple[int, int], ratio: float, limit: float, steps: int, round_to: int | None
) -> None:
    model = network(*widths)
    pruner = GumbelGroupPruner(
        model,
        INPUTS,
        pruning_ratio=ratio,
        max_pruning_ratio=limit,
        global_pruning=True,
        iterative_steps=steps,
        round_to=round_to,
        ignored_layers="4",
    )
    for _ in range(steps):
        pruner.step()
    multiple = round_to or 1
    allowed = [-(-(width - int(width * limit)) // multiple) * multiple for width in widths]
    assert [model[0].out_features, model[2].out_features] == allowed


def test_a_ratio_above_the_limit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        GumbelGroupPruner(network(16, 24), INPUTS, pruning_ratio=0.9, max_pruning_ratio=0.5)
    assert [record.getMessage() for record in caplog.records] == [
        "pruning_ratio is above max_pruning_ratio = 0.5, which is what goes at most"
    ]
