"""NNI's speedup on torchvision's networks: about half of the channels go, and the outputs stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
import torchvision
from nni.compression.speedup import ModelSpeedup
from torch import Tensor, nn

import gumbel_nni
from gumbel_nni.compat.exact_speedup import remove_channels
from tests.gumbel_nni.helpers import Masks, masked_copy, randomized, relative_error, size

pytestmark = pytest.mark.slow

_IN_PRUNERS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
_OUT_PRUNERS = (tp.prune_conv_out_channels, tp.prune_linear_out_channels)
_NEVER_GATED = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention, nn.Parameter)
# Name: (arguments, image size). The widest linear layers of VGG and most layers of the transformer go, for speed.
NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "resnet18": ({}, 32),
    "mobilenet_v2": ({}, 32),
    "densenet121": ({}, 32),
    "vgg11": ({"init_weights": False}, 32),
    "squeezenet1_1": ({}, 48),
    "mnasnet0_5": ({}, 32),
    "efficientnet_b0": ({}, 32),
    "vit_b_16": ({"image_size": 32}, 32),
}


def network(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """Return a torchvision model with random weights, biases and statistics of a working scale, and an input."""
    arguments, size = NETWORKS[name]
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None, num_classes=10, **arguments)
        if name == "vgg11":
            model.classifier[0], model.classifier[3] = nn.Linear(512 * 49, 128), nn.Linear(128, 4096)
        elif name == "vit_b_16":
            del model.encoder.layers[2:]
    model = randomized(model.to_empty(device="cpu").to(dtype)).eval()
    return model, torch.randn(2, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def consumer_columns(model: nn.Module, example_input: Tensor, seed: int = 0, with_rows: bool = False) -> Masks:
    """Close about half of the channels of every group that may be gated, at the group's consumers."""
    graph = tp.DependencyGraph().build_dependency(model, example_input)
    model.eval()
    names = {module: name for name, module in model.named_modules()}
    last = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))][-1]
    generator = torch.Generator().manual_seed(seed)
    masks: Masks = {}
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        terms = [(item.dep.target.module, item.dep.handler) for item in group.items]
        if any(isinstance(m, _NEVER_GATED) or (m is last and handler in _OUT_PRUNERS) for m, handler in terms):
            continue
        is_open = torch.rand(len(group.items[0].idxs), generator=generator) < 0.5
        is_open[0] = True
        for item, (module, handler) in zip(group.items, terms, strict=True):
            values = is_open[item.root_idxs]
            if handler in _IN_PRUNERS and getattr(module, "groups", 1) == 1:
                close(masks, names[module], module, 1, item.idxs, values)
            elif with_rows and handler in _OUT_PRUNERS:
                close(masks, names[module], module, 0, item.idxs, values)
    return masks


def close(masks: Masks, name: str, module: nn.Module, dimension: int, positions: list[int], values: Tensor) -> None:
    mask = masks.setdefault(name, {}).setdefault("weight", torch.ones_like(module.weight))
    mask.movedim(dimension, 0)[positions] *= values.to(mask).view(-1, *[1] * (mask.dim() - 1))
    if dimension == 0 and module.bias is not None:
        masks[name].setdefault("bias", torch.ones_like(module.bias))[positions] *= values.to(module.bias)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_networks_shrink_exactly(name: str) -> None:
    model, x = network(name)
    masks = consumer_columns(model, x)
    small = remove_channels(model, masks, x)
    masked = masked_copy(model, masks)
    assert relative_error(masked, small, x) < 1e-5
    assert relative_error(masked, small, x[:1].repeat(3, 1, 1, 1)) < 1e-5
    assert relative_error(masked, model, x) > 1e-2  # the masks mattered
    assert size(small) < 0.75 * size(model)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_float64_is_exact_to_float64_with_rows_too(name: str) -> None:
    model, x = network(name, torch.float64)
    masks = consumer_columns(model, x, seed=1, with_rows=True)
    small = gumbel_nni.speedup(model, masks, x, backend="nni")
    assert {tensor.dtype for tensor in small.state_dict().values()} == {torch.float64, torch.int64}
    assert relative_error(masked_copy(model, masks), small, x) < 1e-13
    assert size(small) < 0.5 * size(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_plain_model_speedup_runs_on_baked_networks(name: str) -> None:
    """What NNI's own users call, without a graph_module."""
    model, x = network(name)
    masks = consumer_columns(model, x)
    masked = masked_copy(model, masks)
    small = ModelSpeedup(copy.deepcopy(masked), x, masks).speedup_model().eval()
    if name != "vit_b_16":  # NNI's conflict resolution opens the columns of its linear layers again
        assert size(small) < 0.75 * size(model)
    assert relative_error(masked, small, x) < 1e-5
