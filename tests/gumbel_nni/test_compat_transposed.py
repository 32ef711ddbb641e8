"""NNI's pruners on transposed convolutions: output channels are those, whatever the weight's first dimension holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nni.compression.pruning import L1NormPruner, L2NormPruner, LevelPruner
from nni.compression.utils import auto_set_denpendency_group_ids
from torch import Tensor, nn

import gumbel_nni
from tests.gumbel_nni.test_any_masks import PRUNERS, prune

DIMENSIONS = (1, 2, 3)


def layers(dimensions: int) -> tuple[type[nn.Module], type[nn.Module]]:
    return getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"ConvTranspose{dimensions}d")


def network(dimensions: int = 2, groups: int = 1, outputs: int = 12) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    conv, transposed = layers(dimensions)
    model = nn.Sequential(
        conv(3, 8, 3, padding=1), nn.ReLU(), transposed(8, outputs, 2, groups=groups), nn.ReLU(), conv(outputs, 4, 2)
    )
    return model, torch.randn(2, 3, *[6] * dimensions)


def closed_outputs(mask: Tensor, groups: int) -> Tensor:
    """Return which output channels a mask of shape (in, out / groups, ...) closes, bool, (out,)."""
    return torch.cat([(part == 0).transpose(0, 1).flatten(1).all(1) for part in mask.chunk(groups)])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dimensions", DIMENSIONS)
@pytest.mark.parametrize("name", ["l1norm", "fpgm"])
def test_whole_output_channels_and_their_biases_close(name: str, dimensions: int, groups: int) -> None:
    model, x = network(dimensions, groups)
    masks, expected = prune(name, model, x, [{"op_names": ["2"], "sparse_ratio": 0.5}])
    closed = closed_outputs(masks["2"]["weight"], groups)
    assert int(closed.sum()) == 6
    assert masks["2"]["weight"].mean() == 0.5, "and nothing else"
    assert torch.equal(masks["2"]["bias"] == 0, closed)
    small = gumbel_nni.speedup(model, masks, x)
    torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)
    if groups == 1:  # else no group may lose other channels than its neighbor
        assert (small[2].in_channels, small[2].out_channels) == (8, 6)


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner(name: str) -> None:
    model, x = network()
    masks, expected = prune(name, model, x, [{"op_types": ["ConvTranspose2d"], "sparse_ratio": 0.5}])
    small = gumbel_nni.speedup(model, masks, x)
    torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)
    assert small[2].out_channels == (12 if name == "level" else 6)


def test_the_closed_channels_are_the_smallest() -> None:
    model, _ = network(outputs=8)  # as many as inputs: masks of the wrong dimension would fit
    model[2].weight.data[:, 2] *= 1e-3
    model[2].weight.data[3] *= 1e-4
    _, masks = L1NormPruner(model, [{"op_names": ["2"], "sparse_ratio": 0.125}]).compress()
    assert closed_outputs(masks["2"]["weight"], 1).nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("groups", [1, 2])
def test_input_channels(groups: int) -> None:
    model, _ = network(groups=groups)
    rule = {"op_names": ["2"], "sparse_ratio": 0.5, "granularity": "in_channel"}
    _, masks = L2NormPruner(model, [rule]).compress()
    rows = masks["2"]["weight"].flatten(1)
    assert torch.equal(rows.amin(1), rows.amax(1)), "whole"
    assert int(rows.amax(1).sum()) == 4
    closed = closed_outputs(masks["2"]["weight"], groups)  # all inputs of a group may go
    assert torch.equal(masks["2"]["bias"] == 0, closed)


def test_single_weights_close_no_bias_but_those_of_closed_channels() -> None:
    model, _ = network()
    model[2].weight.data[:, 5] = 0
    _, masks = LevelPruner(model, [{"op_names": ["2"], "sparse_ratio": 0.25}]).compress()
    assert (masks["2"]["bias"] == 0).nonzero().flatten().tolist() == [5]


class Skip(nn.Module):
    """The outputs of a convolution and of a transposed one are added."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.side, self.out = nn.ConvTranspose2d(3, 8, 2, 2), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        wide = nn.functional.interpolate(x, scale_factor=2)
        return self.out(torch.relu(self.norm(self.up(x) + self.side(wide))))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")  # NNI traces by it
def test_tied_layers_close_the_same_outputs() -> None:
    torch.manual_seed(0)
    model, x = Skip(), torch.randn(2, 3, 4, 4)
    rules = [{"op_names": ["up", "side"], "sparse_ratio": 0.5}]
    tied = auto_set_denpendency_group_ids(model, rules, x)
    masks, expected = prune("l1norm", model, x, tied)
    assert torch.equal(closed_outputs(masks["up"]["weight"], 1), masks["side"]["bias"] == 0)
    small = gumbel_nni.speedup(model, masks, x)
    torch.testing.assert_close(small.eval()(x), expected, rtol=1e-4, atol=1e-5)
    assert small.up.out_channels < 8


@pytest.mark.parametrize("pruner", ["l1norm", "gumbel"])
def test_a_norm_that_follows_follows_the_outputs(pruner: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 8, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 4, 4)
    align = {"align": {"module_name": "0", "target_name": "weight", "dims": [0]}}
    rules: list[dict[str, Any]] = [
        {"op_names": ["0"], "sparse_ratio": 0.5},
        {"op_names": ["1"], "target_settings": {"weight": align, "bias": align}},
    ]
    if pruner == "l1norm":
        _, masks = L1NormPruner(copy.deepcopy(model), rules).compress()
        assert int((masks["1"]["weight"] == 0).sum()) == 4
    else:
        masked = gumbel_nni.GumbelPruner(model, rules, example_inputs=x)
        mask = torch.ones(3, 8, 2, 2)
        mask[:, 5] = 0
        bias = mask.amax((0, 2, 3))
        masked.update_masks({"0": {"weight": mask, "bias": bias}})
        masks = masked.get_masks()
    assert torch.equal(masks["1"]["weight"] == 0, closed_outputs(masks["0"]["weight"], 1))
