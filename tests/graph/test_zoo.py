"""Networks of torchvision, half of their exact groups closed at random: what is left computes the same.

The benchmark of the same name does this with all of them; here are the quick ones of every family.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import FrozenBatchNorm2d

from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.shrinking.equivalence import verify_equivalence
from gumbel_plugin.shrinking.shrink import masked_copy, remove_dead_units
from gumbel_plugin.sparsity.counting import count_macs, count_parameters
from gumbel_torch_pruning import find_groups

pytestmark = pytest.mark.slow


def load_benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "zoo.py"
    sys.path.append(str(path.parent))  # where the benchmark finds its neighbours
    spec = importlib.util.spec_from_file_location("zoo_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["zoo_benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = load_benchmark()
named = torchvision.models.get_model

BUILDS: dict[str, Callable[[], nn.Module]] = {
    "vgg, small": lambda: nn.Sequential(
        torchvision.models.vgg.make_layers([16, "M", 32, "M", 48, "M"], batch_norm=True),
        *(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(432, 64), nn.ReLU(), nn.Linear(64, 10)),
    ),
    "resnet18": partial(named, "resnet18"),
    "resnet18 with frozen norms": partial(named, "resnet18", norm_layer=FrozenBatchNorm2d),
    "resnext, narrow": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=16, num_classes=10
    ),
    "mobilenet_v2": partial(named, "mobilenet_v2"),
    "mobilenet_v3_small": partial(named, "mobilenet_v3_small"),
    "mnasnet0_5": partial(named, "mnasnet0_5"),
    "efficientnet_b0": partial(named, "efficientnet_b0"),
    "regnet_y_400mf": partial(named, "regnet_y_400mf"),
    "squeezenet1_1": partial(named, "squeezenet1_1"),
    "densenet, shallow": lambda: torchvision.models.DenseNet(16, (3, 4, 5), 32, num_classes=10),
    "googlenet": partial(named, "googlenet", aux_logits=False, init_weights=False),
    "shufflenet_v2_x0_5": partial(named, "shufflenet_v2_x0_5"),
    "convnext, small": lambda: ConvNeXt([CNBlockConfig(24, 48, 2), CNBlockConfig(48, None, 2)], num_classes=10),
    "vit, small": lambda: VisionTransformer(64, 16, 2, 4, 32, 64, num_classes=10),
    "swin, small": lambda: SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10),
    "swin v2, small": lambda: SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10, block=SwinTransformerBlockV2
    ),
    "maxvit, small": lambda: MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=10),
}

# How many groups are exact and how many are not, counted by hand in the networks' definitions where that is feasible.
COUNTS = {
    "vgg, small": (4, 1),  # all but the classes
    "resnet18": (12, 1),  # 8 inner widths, 4 residual streams
    "resnet18 with frozen norms": (12, 1),
    "squeezenet1_1": (25, 1),  # the stem, and 3 convolutions in each of 8 fire modules
    "shufflenet_v2_x0_5": (18, 17),  # the stem, the widths inside 16 branches, conv5
    "vit, small": (4, 2),  # 2 hidden widths, 2 layers' heads
}

Closed = tuple[nn.Module, nn.Module, Tensor, list[ChannelGroup]]


@pytest.fixture(params=BUILDS, scope="module")
def shrunk(request: pytest.FixtureRequest) -> tuple[str, Closed]:
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 64, 64)
    model = BUILDS[request.param]().eval()
    zoo.randomize(model, torch.Generator().manual_seed(0))
    groups = find_groups(model, inputs)
    masked = masked_copy(model, zoo.close_half(model, groups, seed=0))
    return request.param, (masked, remove_dead_units(masked, inputs), inputs, groups)


def test_the_small_network_computes_the_same(shrunk: tuple[str, Closed]) -> None:
    _, (masked, small, inputs, _) = shrunk
    verify_equivalence(masked, small, inputs, samples=2, tolerance=1e-5).raise_for_failure()


def test_something_of_every_exact_group_is_gone(shrunk: tuple[str, Closed]) -> None:
    _, (masked, small, inputs, groups) = shrunk
    assert count_macs(small, inputs) < count_macs(masked, inputs)
    before, after = masked.state_dict(), small.state_dict()
    for group in groups:
        for part in group.producers:
            old, new = before[f"{part.module}.weight"], after[f"{part.module}.weight"]
            if group.safety == "exact":
                assert new.numel() < old.numel(), group.name
    assert count_parameters(small) < 0.9 * count_parameters(masked)


def test_groups_are_what_the_definition_says(shrunk: tuple[str, Closed]) -> None:
    name, (_, _, _, groups) = shrunk
    exact = [group for group in groups if group.safety == "exact"]
    if name in COUNTS:
        assert (len(exact), len(groups) - len(exact)) == COUNTS[name]
    assert all(bool(group.reason) == (group.safety != "exact") for group in groups)
    by_output = [group for group in groups if "output" in group.reason]
    assert len(by_output) == 1  # the classes
