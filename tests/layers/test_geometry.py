"""The geometry of layers against brute force: every input is wiggled, and the outputs that move are its own."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.layers.geometry import (
    channel_dimension,
    column_sums,
    columns_view,
    input_channels,
    is_depthwise,
    is_matrix,
    layer_channels,
    output_dimension,
    read_channels,
    rows_view,
    written_channels,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def cases() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found: dict[str, nn.Module] = {"linear": nn.Linear(3, 4), "one by one": nn.Linear(1, 1)}
    for make, inputs, outputs, groups in product(CONVOLUTIONS, (1, 2, 4, 6), (1, 2, 4, 6), (1, 2, 4, 6)):
        if inputs % groups == outputs % groups == 0:
            found[f"{make.__name__} {inputs}-{outputs} in {groups}"] = make(inputs, outputs, 2, groups=groups)
    return found


CASES = cases()


def example(layer: nn.Module) -> Tensor:
    return torch.randn(2, input_channels(layer), *(3,) * (-1 - channel_dimension(layer)))


def connections(layer: nn.Module) -> Tensor:
    """Return which output channel (row) depends on which input channel (column)."""
    x = example(layer)
    dim = channel_dimension(layer)
    columns = []
    for channel in range(x.shape[dim]):
        changed = x.clone()
        changed.select(dim, channel).add_(1)
        moved = (layer(changed) != layer(x)).movedim(dim, 0).flatten(1).any(1)
        columns.append(moved)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_agrees_with_what_the_layer_computes(name: str) -> None:
    layer = CASES[name]
    inputs, outputs = layer_channels(layer)
    connected = connections(layer)
    assert is_matrix(layer)
    assert connected.shape == (outputs, inputs)
    apart = inputs == outputs > 1 and torch.equal(connected, torch.eye(inputs, dtype=torch.bool))
    assert (hasattr(layer, "groups") and is_depthwise(layer)) == apart

    weight = layer.weight.detach().clone()
    x = example(layer)
    factors = torch.randn(inputs)
    gated = layer(x * factors.reshape(-1, *(1,) * (-1 - channel_dimension(layer))))
    layer.weight.mul_(columns_view(layer, factors))
    assert torch.allclose(layer(x), gated, atol=1e-5)
    alone = [columns_view(layer, one) * weight for one in torch.eye(inputs)]
    assert torch.allclose(column_sums(layer, weight), torch.stack([each.sum() for each in alone]), atol=1e-5)

    layer.weight.copy_(weight * columns_view(layer, (torch.arange(inputs) % 2).float()))
    assert read_channels(layer).tolist() == [bool(channel % 2) for channel in range(inputs)]

    layer.weight.copy_(weight)
    if output_dimension(layer) is None:
        assert written_channels(layer) is None
    else:
        layer.weight.mul_(rows_view(layer, (torch.arange(outputs) % 2).float()))
        closed = ~connections(layer).any(1)
        assert closed.tolist() == [channel % 2 == 0 for channel in range(outputs)]
        assert torch.equal(written_channels(layer), ~closed)
    layer.weight.copy_(weight)


def test_only_grouped_transposed_convolutions_have_no_output_dimension() -> None:
    without = {name for name, layer in CASES.items() if output_dimension(layer) is None}
    grouped = {name for name in CASES if "Transpose" in name and not name.endswith("in 1")}
    assert without == {name for name in grouped if not is_depthwise(CASES[name])}


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.BatchNorm2d(3), torch.ones(2, 3, 4, 4)),
        (nn.GroupNorm(1, 3), torch.ones(2, 3, 4)),
        (nn.LayerNorm(3), torch.ones(2, 4, 3)),
        (nn.Embedding(5, 3), torch.ones(2, 4, dtype=torch.int64)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_sum_over_nothing(layer: nn.Module, x: Tensor) -> None:
    assert layer_channels(layer) == (3, 3)
    assert layer(x).shape[channel_dimension(layer)] == 3
    assert not is_matrix(layer)
    rows = torch.ones_like(layer.weight) * rows_view(layer, torch.arange(3.0))
    assert all(row.tolist() == [0.0, 1.0, 2.0] for row in rows.reshape(-1, 3))
    with torch.no_grad():
        layer.weight.copy_(rows)
    assert written_channels(layer).tolist() == [False, True, True]
