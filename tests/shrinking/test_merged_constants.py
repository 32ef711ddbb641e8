"""Channels that do not depend on the input: which are found, and what becomes of their readers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.shrinking.merged_constants import merge_constants
from gumbel_plugin.shrinking.shrink import masked_copy, shrink
from gumbel_torch_pruning import find_groups

X = torch.randn(3, 2, 7, 7, generator=torch.Generator().manual_seed(0))


def padded(activation: type[nn.Module] = nn.Sigmoid) -> nn.Sequential:
    """Under zero padding a constant channel is no bias."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), activation(),
        nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), activation(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    for norm in (model[1], model[4]):
        for tensor in (norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model.eval()


class TwoReaders(nn.Module):
    """A residual stream that two layers read, each through a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv1(torch.sigmoid(self.norm1(x)))
        return self.conv2(torch.sigmoid(self.norm2(x))).mean((2, 3))


def rows(layer: nn.Module, *closed: int, bias: bool = True) -> dict[str, Tensor]:
    masks = {"weight": torch.ones_like(layer.weight), "bias": torch.ones_like(layer.bias)}
    masks["weight"][list(closed)] = 0
    if bias:
        masks["bias"][list(closed)] = 0
    return masks


@pytest.mark.parametrize("bias", [True, False])
def test_one_channel_represents_all_constant_ones(engine: Any, bias: bool) -> None:
    model = padded()
    small = shrink(model, {"0": rows(model[0], 1, 4, 6, bias=bias)}, X, engine=engine)  # which verifies
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels) == (6, 6, 6)
    assert small[0].weight.flatten(1).any(1).sum() == 5
    assert {tensor.dtype for tensor in small.parameters()} == {torch.float32}


def test_zeros_need_no_representative(engine: Any) -> None:
    model = padded(nn.ReLU)
    model[1].bias.data[[1, 4, 6]] = -9.0
    small = shrink(model, {"0": rows(model[0], 1, 4, 6)}, X, engine=engine)
    assert small[0].out_channels == 5


def test_batch_norm_scales_close_channels(engine: Any) -> None:
    """What SlimPruner masks; NNI's own speedup removes nothing for it."""
    model = padded(nn.ReLU)
    small = shrink(model, {"1": rows(model[1], 0, 2, 3, 7)}, X, engine=engine)
    assert (small[0].out_channels, small[3].in_channels) == (4, 4)


def test_readers_agree_on_a_representative(engine: Any) -> None:
    model = TwoReaders().eval()
    masks = {"stem": rows(model.stem, 0, 3, 5), "conv1": rows(model.conv1, 0, 3, 5)}
    small = shrink(model, masks, X, engine=engine)
    assert small.stem.out_channels == small.conv1.in_channels == small.conv2.in_channels == 4


def test_rows_of_one_branch_alone_close_nothing() -> None:
    model = TwoReaders().eval()
    small = shrink(model, {"stem": rows(model.stem, 0, 3, 5)}, X)
    assert small.stem.out_channels == 6


def test_a_channel_that_is_constant_by_chance_is_left_alone() -> None:
    """It is zero on every likely input, but not on all."""
    model = padded(nn.ReLU)
    model[1].bias.data[[1, 4]] = -50.0
    before = copy.deepcopy(model)
    assert merge_constants(model, find_groups(model, X), X) == {}
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    masks = {"0": rows(model[0], 6, 7)}
    small, large = shrink(model, masks, X), 1e4 * X
    assert small[0].out_channels == 7
    torch.testing.assert_close(small(large), masked_copy(model, masks)(large))
    assert not torch.allclose(masked_copy(model, {**masks, "1": rows(model[1], 1, 4)})(large), small(large))


def test_the_outputs_stay_to_double_precision() -> None:
    model = padded().double()
    with torch.no_grad():
        for name, mask in rows(model[0], 1, 4, 6).items():
            model[0].get_parameter(name).mul_(mask)
        expected = model(X.double())
        unread = merge_constants(model, find_groups(model, X.double()), X.double())
        torch.testing.assert_close(model(X.double()), expected, rtol=0, atol=1e-14)
    assert len(unread["3"]) == 2
    assert set(unread["3"].tolist()) < {1, 4, 6}
    assert not model[3].weight[:, unread["3"]].any()


def test_what_an_embedding_reads_is_input_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3))
    x = torch.randint(0, 9, (4, 5))
    groups = find_groups(model, x)
    assert merge_constants(copy.deepcopy(model), groups, x) == {}
    with torch.no_grad():
        model[1].weight[[2, 5]] = 0
    unread = merge_constants(model, groups, x)
    assert len(unread["3"]) == 1
    assert unread["3"].item() in (2, 5)
