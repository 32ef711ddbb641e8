from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.layers.geometry import columns_view, input_channels, output_dimension
from gumbel_plugin.sparsity.types import ELEMENT, OUT_CHANNEL, granularity_of


@st.composite
def blocks(draw: st.DrawFn) -> tuple[list[int], tuple[int, ...]]:
    """Draw block sizes along the last dimensions, and the shape of a tensor that they tile."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    steps = draw(st.lists(st.sampled_from([-1, 1, 2, 3]), min_size=1, max_size=len(counts)))
    sizes = [1] * (len(counts) - len(steps)) + [abs(step) for step in steps]
    return steps, tuple(count * size for count, size in zip(counts, sizes, strict=True))


@given(blocks())
def test_what_was_spread_is_summed_to_the_units_size_times_itself(case: tuple[list[int], tuple[int, ...]]) -> None:
    steps, shape = case
    granularity = granularity_of(steps)
    gates = torch.arange(prod(granularity.latent_shape(shape)), dtype=torch.float64).view(
        granularity.latent_shape(shape)
    )
    spread = granularity.expand(gates, shape).expand(shape)
    torch.testing.assert_close(granularity.reduce(spread), gates * granularity.unit_size(shape))
    assert granularity.unit_size(shape) * gates.numel() == prod(shape)


def test_gates_that_broadcast_are_not_copied() -> None:
    gates = torch.rand(8, 1, 1, 1)
    assert OUT_CHANNEL.expand(gates, (8, 3, 3, 3)) is gates
    assert ELEMENT.expand(torch.rand(8, 3), (8, 3)).shape == (8, 3)


def test_a_spread_mask_sends_each_gate_the_sum_of_its_units_gradients() -> None:
    gates = torch.rand(2, 3, requires_grad=True)
    upstream = torch.rand(4, 9, dtype=torch.float32)
    granularity_of([2, 3]).expand(gates, (4, 9)).backward(upstream)
    torch.testing.assert_close(gates.grad, granularity_of([2, 3]).reduce(upstream))


@pytest.mark.parametrize(("steps", "shape"), [([2, 2], (3, 4)), ([2], (3,)), ([4, 4], (2, 2)), ([1, 1, 1], (4, 4))])
def test_units_that_do_not_tile_the_tensor_are_an_error(steps: list[int], shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"granularity \[.*\] (does not tile|has 3 dimensions)") as error:
        granularity_of(steps).latent_shape(shape)
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("steps", [[], [0], [2, -2]])
def test_blocks_of_no_or_negative_size_are_an_error(steps: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"each positive or -1"):
        granularity_of(steps)


def test_an_unknown_word_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'outchannel' is unknown; did you mean 'out_channel'"):
        granularity_of("outchannel")
    assert granularity_of("default") == OUT_CHANNEL


LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise transposed": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_masking_a_weights_columns_masks_the_layers_input(kind: str) -> None:
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer, inputs = build().double(), torch.randn(shape, dtype=torch.float64)
    assert input_channels(layer) == 4
    columns = torch.tensor([0.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    channel_dim = -1 if kind == "linear" else 1
    masked_input = inputs * columns.view([4 if d == channel_dim % inputs.dim() else 1 for d in range(inputs.dim())])
    expected = layer(masked_input)
    with torch.no_grad():
        layer.weight.mul_(columns_view(layer, columns))
    torch.testing.assert_close(layer(inputs), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_output_dimension_is_where_an_output_channels_weights_lie(kind: str) -> None:
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer, inputs = build(), torch.randn(shape)
    dimension = output_dimension(layer)
    if kind == "grouped transposed":
        assert dimension is None
        return
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight.index_fill_(dimension, torch.tensor([1]), 0.0)
    output = layer(inputs).movedim(-1 if kind == "linear" else 1, 0)
    assert [bool(channel.any()) for channel in output] == [c != 1 for c in range(len(output))]


def test_an_embeddings_channels_are_its_columns() -> None:
    assert output_dimension(nn.Embedding(7, 4)) == 1
    assert output_dimension(nn.BatchNorm2d(4)) == 0


def test_a_layer_without_input_channels_is_an_error() -> None:
    with pytest.raises(ConfigError, match="ReLU has neither in_channels nor in_features"):
        input_channels(nn.ReLU())
