"""How units leave a model, and what is repaired in Torch-Pruning's graphs on the way there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping
from torchvision.ops import FrozenBatchNorm2d

from gumbel_plugin.errors import GraphError
from gumbel_plugin.graph.removal import unchanging_graph
from gumbel_plugin.graph.tracing_repairs import FrozenNormPruner, missing_pruners, repaired_tracing
from gumbel_torch_pruning import DependencyGroups, find_groups

INPUTS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def dense() -> nn.Module:
    return torchvision.models.DenseNet(4, (2, 3), 8, num_classes=3)


def grouped() -> nn.Module:
    bottleneck = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(bottleneck, [2, 1, 1, 1], groups=2, width_per_group=8, num_classes=3)


def flattened() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.PReLU(6), nn.AvgPool2d(7), nn.Flatten(), nn.Linear(24, 5), nn.Linear(5, 2)
    )


def scaled() -> nn.Module:
    torch.manual_seed(0)
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(8, 16, 1), block(16, None, 1)], num_classes=3)


MODELS = {"dense": dense, "grouped": grouped, "flattened": flattened, "scaled": scaled}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def some(size: int, generator: torch.Generator) -> Tensor:
    number = int(torch.randint(1, size, (), generator=generator))
    return torch.randperm(size, generator=generator)[:number]


def cuts(group: Any) -> dict[Any, set[int]]:
    return {(item.dep.target, item.dep.handler.__func__): set(item.idxs) for item in group.items}


@pytest.mark.slow
def test_groups_are_cut_as_torch_pruning_would_cut_them(model: nn.Module) -> None:
    dependency = DependencyGroups(model, INPUTS)
    generator = torch.Generator().manual_seed(0)
    for group in dependency.groups:
        if group.safety == "unsupported":
            continue
        units = some(group.size, generator)
        root = model.get_submodule(group.name)
        (whole,) = (part for part in group.producers if part.module == group.name)
        channels = whole.positions[torch.isin(whole.units, units)].tolist()
        prune = dependency.graph.get_pruner_of_module(root).prune_out_channels
        theirs = dependency.graph.get_pruning_group(root, prune, channels)
        assert cuts(dependency.pruning_group(group.name, units)) == cuts(theirs)


@pytest.mark.slow
def test_it_does_not_matter_in_which_steps_units_leave(model: nn.Module) -> None:
    """All at once; group by group in both orders; and each group in two steps, in the numbers of that moment."""
    generator = torch.Generator().manual_seed(0)
    exact = [group for group in find_groups(model, INPUTS) if group.safety == "exact"]
    units = {group.name: some(group.size, generator) for group in exact}
    at_once = DependencyGroups(copy.deepcopy(model), INPUTS)
    at_once.remove_all(units)
    expected = at_once.model.state_dict()

    forwards, backwards, twice = (DependencyGroups(copy.deepcopy(model), INPUTS) for _ in range(3))
    for name, own in units.items():
        forwards.remove(name, own)
    for name, own in reversed(units.items()):
        backwards.pruning_group(name, own).prune()
    for name, own in units.items():
        twice.remove(name, own[:1])
    for name, own in units.items():
        rest = own[1:]
        twice.remove(name, rest - (rest > own[0]).long())

    for other in (forwards, backwards, twice):
        found = other.model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_frozen_parameters_stay_frozen(model: nn.Module) -> None:
    flags = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        flags[name] = number % 2 == 0
        parameter.requires_grad_(flags[name])
    dependency = DependencyGroups(model, INPUTS)
    dependency.remove_all({group.name: torch.tensor([0]) for group in dependency.groups if group.safety == "exact"})
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


# Repairs --------------------------------------------------------------------------------------------------------------


class Shuffled(nn.Module):
    """The part of ShuffleNetV2 that Torch-Pruning cannot build a graph of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.inside, self.outside = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, dim=1)
        joined = torch.cat([left, self.outside(torch.relu(self.inside(right)))], dim=1)
        return self.head(joined.view(2, 2, 4, 16, 16).transpose(1, 2).reshape(2, 8, 16, 16))


def test_a_channel_shuffle_leaves_the_rest_exact() -> None:
    safety = {group.name: group.safety for group in find_groups(Shuffled(), INPUTS)}
    assert safety == {"head": "unsupported", "stem": "unsupported", "inside": "exact", "outside": "unsupported"}


class Deep(nn.Module):
    """A concatenation of parts whose sizes are told by a layer far away only."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)
        self.head = nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        for _ in range(600):
            left = left * 1.001
        return self.head(torch.cat([left, self.right(x)], dim=1))


@pytest.mark.slow
def test_a_concatenation_far_from_its_layers_is_understood() -> None:
    exact = {group.name: group.size for group in find_groups(Deep(), INPUTS) if group.safety == "exact"}
    assert exact == {"left": 4, "right": 5}


def test_torch_pruning_is_left_as_it_was() -> None:
    build, update = tp.DependencyGraph._build_dependency, index_mapping.update_index_mapping
    with repaired_tracing(), unchanging_graph():
        assert tp.DependencyGraph._build_dependency is not build
        assert index_mapping.update_index_mapping is not update
    with pytest.raises(GraphError, match="forward fails"):
        find_groups(nn.Linear(3, 2), torch.randn(2, 4))
    assert tp.DependencyGraph._build_dependency is build
    assert index_mapping.update_index_mapping is update


def test_frozen_norms_of_any_library_are_known() -> None:
    class TheirFrozenNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in FrozenNormPruner.BUFFERS:
                self.register_buffer(name, torch.arange(4.0))

    layers = nn.Sequential(FrozenBatchNorm2d(4), TheirFrozenNorm(), nn.BatchNorm2d(4), nn.ReLU())
    assert set(missing_pruners(layers)) == {FrozenBatchNorm2d, TheirFrozenNorm}
    FrozenNormPruner().prune_out_channels(layers[1], [0, 2])
    assert all(buffer.tolist() == [1, 3] for buffer in layers[1].buffers())
