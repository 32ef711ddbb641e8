"""Histories of Torch-Pruning: only those of the same network are replayed. See also test_pruner and test_heads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.errors import TargetError

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def chain(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(
    "entry",
    [
        ("2", True, [0, 1, 2, 3, 4, 5]),
        ("2", True, [1, 6]),
        ("2", True, [-1]),
        ("2", False, [3, 16]),
        ("nothing", True, [0]),
    ],
)
def test_an_entry_that_does_not_fit_is_refused_with_nothing_removed(entry: Any) -> None:
    model = chain(3, 16, 6, 2)
    before = model(IMAGES)
    pruner = GumbelGroupPruner(model, IMAGES)
    with pytest.raises(TargetError, match="pruning history"):
        pruner.load_pruning_history([("0", True, [1, 3]), entry])
    assert [layer.out_channels for layer in model if isinstance(layer, nn.Conv2d)] == [16, 6, 2]
    pruner.step()  # the gates are still there
    assert model[0].out_channels == 8
    assert model(IMAGES).shape == before.shape


def test_positions_count_what_is_left() -> None:
    model = chain(3, 4, 6, 2)
    GumbelGroupPruner(model, IMAGES).load_pruning_history([("0", True, [1, 3]), ("0", True, [1])])
    assert model[0].out_channels == model[2].in_channels == 1
    with pytest.raises(TargetError, match=r"'0' has 2 units left, of which \[2\] cannot go"):
        GumbelGroupPruner(chain(3, 4, 6, 2), IMAGES).load_pruning_history([("0", True, [1, 3]), ("0", True, [2])])
