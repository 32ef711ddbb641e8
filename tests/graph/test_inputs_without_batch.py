"""Models that are called without a batch dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gumbel_plugin import GumbelGroupPruner
from gumbel_torch_pruning import find_groups
from tests.graph.exact_steps import exact_step


def vector(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), *between, nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))


def image(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 1), *between, nn.Conv2d(16, 8, 1), nn.Tanh(), nn.Conv2d(8, 4, 1))


VECTOR, IMAGE, SIGNAL = (6,), (3, 7, 7), (3, 9)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear layers": (lambda: vector(nn.Tanh()), VECTOR),
    "one slope": (lambda: vector(nn.PReLU()), VECTOR),
    "dropout": (lambda: vector(nn.Dropout(), nn.GELU()), VECTOR),
    "images": (lambda: image(nn.Sigmoid()), IMAGE),
    "depthwise": (lambda: image(nn.Conv2d(16, 16, 3, groups=16), nn.SiLU()), IMAGE),
    "instance norm": (lambda: image(nn.InstanceNorm2d(16, affine=True), nn.ReLU()), IMAGE),
    "pooled": (lambda: image(nn.MaxPool2d(2), nn.ReLU()), IMAGE),
    "transposed": (lambda: image(nn.ConvTranspose2d(16, 16, 2), nn.ReLU()), IMAGE),
    "signals": (lambda: nn.Sequential(nn.Conv1d(3, 16, 1), nn.Tanh(), nn.Conv1d(16, 8, 1), nn.Conv1d(8, 4, 1)), SIGNAL),
    "flattened": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Flatten(0), nn.Linear(784, 8), nn.Linear(8, 4)),
        IMAGE,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_channels_leave_exactly(case: str) -> None:
    torch.manual_seed(0)
    make, shape = CASES[case]
    model: Any = make()
    x = torch.randn(shape)
    *inner, last = (group for group in reversed(find_groups(model, x)))
    assert last.reason == "it reaches the network's output"
    assert all(group.safety == "exact" for group in inner)
    exact_step(GumbelGroupPruner(model, x, pruning_ratio=0.5, ignored_layers=[model[-1]]), x)


def test_norms_over_channels_are_named() -> None:
    reasons = {group.name: group.reason for group in find_groups(vector(nn.LayerNorm(16)), torch.randn(VECTOR))}
    assert reasons["0"] == "LayerNorm 1 computes statistics over these channels"
