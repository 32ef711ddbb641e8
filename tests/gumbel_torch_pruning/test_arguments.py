"""Torch-Pruning's arguments mean what they mean there: its own BasePruner is the oracle."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin import GumbelGroupPruner, verify_equivalence
from gumbel_plugin.layers.weights import plain_copy
from tests.graph.exact_steps import set_gates

import torch_pruning as tp  # isort: skip  (after gumbel_plugin, which makes torchvision importable)

INPUTS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, before: int, width: int, after: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class SmallResNet(nn.Module):
    """Six groups: the residual streams (conv1: 16 channels, layer2: 24) and four inner ones (20, 30, 28, 36)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 20, 16), Block(16, 30, 16))
        self.layer2 = nn.Sequential(Block(16, 28, 24), Block(24, 36, 24))
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))).mean((2, 3)))


def make() -> SmallResNet:
    torch.manual_seed(0)
    return SmallResNet()


def widths(model: nn.Module) -> dict[str, int]:
    """Return the output channels of the layers that define the six groups."""
    names = ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.conv2", "layer2.1.conv1"]
    return {name: model.get_submodule(name).out_channels for name in names}


def prune(model: nn.Module, steps: int = 1, **arguments: Any) -> Iterator[GumbelGroupPruner]:
    """Prune with random gates, verify every step, and yield the pruner after each."""
    pruner = GumbelGroupPruner(model, arguments.pop("example_inputs", INPUTS), iterative_steps=steps, **arguments)
    for number in range(steps):
        set_gates(pruner, number + 4)
        groups = pruner.step(interactive=True)
        first = next(groups, None)
        masked = plain_copy(pruner.model)
        for group in (first,) if first is not None else ():
            group.prune()
        for group in groups:
            group.prune()
        verify_equivalence(masked, plain_copy(pruner.model), pruner.example_inputs).raise_for_failure()
        yield pruner


def ours(steps: int = 1, **arguments: Any) -> dict[str, int]:
    model = make()
    for _ in prune(model, steps, **arguments):
        pass
    return widths(model)


def theirs(steps: int = 1, model: nn.Module | None = None, **arguments: Any) -> dict[str, int]:
    model = model or make()
    importance = tp.importance.MagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(model, INPUTS, importance, iterative_steps=steps, **arguments)
    for _ in range(steps):
        pruner.step()
    return widths(model)


def kept(original: dict[str, int], ratio: float) -> dict[str, int]:
    return {name: width - math.floor(width * ratio + 1e-6) for name, width in original.items()}


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_uniform_ratios_remove_what_torch_pruning_removes(steps):
    assert ours(steps, pruning_ratio=0.5) == theirs(steps, pruning_ratio=0.5) == kept(widths(make()), 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.29, 0.3, 0.7])
def test_where_a_ratio_is_no_whole_number_they_remove_one_more(ratio):
    original = widths(make())
    mine, other = ours(pruning_ratio=ratio), theirs(pruning_ratio=ratio)
    assert mine == kept(original, ratio)
    for name, width in original.items():
        whole = abs(width * ratio - round(width * ratio)) < 1e-6
        assert mine[name] - other[name] == (0 if whole else 1)


@pytest.mark.slow
def test_a_ratio_is_met_to_the_unit_whatever_the_steps():
    one, three = ours(1, pruning_ratio=0.7), ours(3, pruning_ratio=0.7)
    assert one == three


@pytest.mark.slow
def test_global_pruning_removes_as_many_channels_in_all():
    mine, other = ours(global_pruning=True, pruning_ratio=0.5), theirs(global_pruning=True, pruning_ratio=0.5)
    assert sum(mine.values()) == sum(other.values()) == sum(widths(make()).values()) // 2
    assert mine != ours(pruning_ratio=0.5)


def test_a_layer_has_a_ratio_of_its_own():
    model, other = make(), make()
    for _ in prune(model, pruning_ratio=0.5, pruning_ratio_dict={model.layer1[0].conv1: 0.25, model.layer2: 0.0}):
        pass
    theirs(pruning_ratio=0.5, pruning_ratio_dict={other.layer1[0].conv1: 0.25, other.layer2: 0.0}, model=other)
    assert widths(model) == widths(other)
    assert widths(model)["layer1.0.conv1"] == 15
    assert widths(model)["layer2.1.conv1"] == 36


def test_only_some_layers_have_a_ratio():
    model = make()
    for _ in prune(model, pruning_ratio=0.0, pruning_ratio_dict={model.layer2[1].conv1: 0.5}):
        pass
    assert widths(model) == {**widths(make()), "layer2.1.conv1": 18}


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_a_tuple_of_layers_shares_a_ratio_where_pruning_is_global(shared):
    model, other = make(), make()
    arguments = {"pruning_ratio": 0.5, "global_pruning": shared}
    for _ in prune(model, pruning_ratio_dict={(model.layer1[0].conv1, model.layer1[1].conv1): 0.2}, **arguments):
        pass
    theirs(model=other, pruning_ratio_dict={(other.layer1[0].conv1, other.layer1[1].conv1): 0.2}, **arguments)
    pair = [widths(model)[name] for name in ("layer1.0.conv1", "layer1.1.conv1")]
    assert sum(pair) == sum(widths(other)[name] for name in ("layer1.0.conv1", "layer1.1.conv1")) == 40
    assert (pair == [16, 24]) is not shared
    assert sum(widths(model).values()) == sum(widths(other).values())


def test_no_group_loses_more_than_its_limit_of_the_original():
    model = make()
    original = widths(model)
    arguments = {"global_pruning": True, "pruning_ratio": 0.4, "max_pruning_ratio": 0.5, "iterative_steps": 3}
    pruner = GumbelGroupPruner(model, INPUTS, **arguments)
    for _ in range(3):
        for name, mask in pruner.session.plan.masks.items():  # all of one group would go first
            mask.logit.data.normal_().sub_(100.0 if name == "layer1.1.conv1" else 0.0)
        pruner.step()
        assert widths(model)["layer1.1.conv1"] == 15
        assert all(width >= 0.5 * original[name] for name, width in widths(model).items())
    assert sum(widths(model).values()) == sum(original.values()) - math.floor(sum(original.values()) * 0.4)


@pytest.mark.slow
def test_a_ratio_above_the_limit_is_capped():
    assert ours(2, pruning_ratio=0.8, max_pruning_ratio=0.5) == kept(widths(make()), 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_widths_are_multiples(shared):
    found = ours(2, pruning_ratio=0.5, round_to=4, global_pruning=shared, max_pruning_ratio=0.8)
    assert all(width % 4 == 0 and width > 0 for width in found.values())
    if not shared:
        assert found == theirs(2, pruning_ratio=0.5, round_to=4)


def test_a_multiple_never_takes_a_group_below_its_limit():
    found = ours(pruning_ratio=0.5, round_to=8, max_pruning_ratio=0.5)
    assert found == {**kept(widths(make()), 0.5), "layer1.0.conv1": 16, "layer1.1.conv1": 16, "layer2.0.conv1": 16,
                     "layer2.0.conv2": 16, "layer2.1.conv1": 24, "conv1": 8}  # fmt: skip


def test_ignored_layers_keep_their_widths():
    model, other = make(), make()
    for _ in prune(model, pruning_ratio=0.5, ignored_layers=[model.layer1, model.fc]):
        pass
    theirs(model=other, pruning_ratio=0.5, ignored_layers=[other.layer1, other.fc])
    assert widths(model) == widths(other)
    assert widths(model) == {**kept(widths(make()), 0.5), "conv1": 16, "layer1.0.conv1": 20, "layer1.1.conv1": 30}


@pytest.mark.slow
def test_isomorphic_groups_share_a_ratio():
    model = make()
    pruner = next(prune(model, pruning_ratio=0.5, global_pruning=True, isomorphic=True))
    budgets = [{term.name for term in budget.terms} for budget in pruner.session.plan.budgets]
    inner = {"layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.1.conv1"}
    assert inner in budgets
    assert len(budgets) == 3  # the inner groups, and each residual stream: their shortcuts differ
    assert sum(width for name, width in widths(model).items() if name in inner) == (20 + 30 + 28 + 36) // 2
    assert widths(model)["conv1"] == 8
    assert widths(model)["layer2.0.conv2"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["out_channel_groups", "channel_groups"])
@pytest.mark.filterwarnings("ignore:channel_groups is deprecated")
def test_channel_groups_lose_the_same_members(argument):
    model = make()
    layer = model.layer1[0].conv1
    pruner = next(prune(model, pruning_ratio=0.4, **{argument: {layer: 4}}))
    parts = pruner.masks()["layer1.0.conv1"]["weight"].flatten(1).any(1).view(4, 5)
    assert bool((parts == parts[0]).all())
    assert int(parts[0].sum()) == 3  # of 5 members two go
    assert layer.out_channels == 12


@pytest.mark.slow
def test_steps_follow_the_users_schedule():
    model = make()
    schedule = lambda ratio, steps: [0.0, ratio, ratio]  # noqa: E731
    found = []
    for _ in prune(model, 2, pruning_ratio=0.5, iterative_pruning_ratio_scheduler=schedule):
        found.append(widths(model))
    assert found == [kept(widths(make()), 0.5)] * 2


def test_the_old_names_are_understood():
    with pytest.warns(UserWarning, match="ch_sparsity is deprecated"):
        assert ours(ch_sparsity=0.5) == kept(widths(make()), 0.5)


def test_dictionaries_of_the_caller_and_of_torch_pruning_stay_as_they_are():
    defaults = [dict(d) for d in tp.pruner.BasePruner.__init__.__defaults__ if isinstance(d, dict)]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(12, 4, 1))
    given: dict[nn.Module, int] = {}
    GumbelGroupPruner(net, INPUTS, out_channel_groups=given)
    assert given == {}
    assert [d for d in tp.pruner.BasePruner.__init__.__defaults__ if isinstance(d, dict)] == defaults


# How the model is called, and layers of one's own ---------------------------------------------------------------------


class Keyed(nn.Module):
    """Takes a dictionary as one argument and returns an object; only the user's functions know how to trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU())
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, batch: dict[str, Tensor]) -> Any:
        class Result:
            value = self.head(self.body(batch["image"]))

        return Result()


@pytest.mark.parametrize("target", ["channels", "macs"])
def test_forward_fn_and_output_transform_are_used_throughout(target):
    torch.manual_seed(0)
    model = Keyed()
    arguments = {
        "forward_fn": lambda model, images: model({"image": images}),
        "output_transform": lambda result: result.value,
    }
    pruner = GumbelGroupPruner(model, INPUTS, pruning_ratio=0.5, target=target, iterative_steps=2, **arguments)
    assert "forward" not in vars(model)
    for _ in range(2):
        pruner.step(interactive=False)
    masked_shapes = [parameter.shape for parameter in model.parameters() if parameter.dim() > 1]
    assert masked_shapes[0][0] < 8
    assert model({"image": INPUTS}).value.shape == (2, 2, 8, 8)
    if target == "channels":
        assert masked_shapes == [(4, 3, 3, 3), (3, 4, 1, 1), (2, 3, 1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [{"x": INPUTS}, (INPUTS,), [INPUTS], INPUTS[:1]])
def test_example_inputs_have_any_form(inputs):
    class Named(SmallResNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = Named()
    for _ in prune(model, pruning_ratio=0.5, example_inputs=inputs):
        pass
    assert widths(model) == kept(widths(make()), 0.5)


class Scaled(nn.Module):
    """A layer scale as in ConvNeXt: a parameter of the model itself, one number a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(8, 10, 1), nn.Conv2d(10, 8, 1)
        self.layer_scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.layer_scale * self.outer(F.gelu(self.inner(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("target", ["channels", "parameters"])
def test_parameters_outside_of_layers_are_cut_too(kind, target):
    torch.manual_seed(0)
    model = Scaled()
    pairs = [(model.layer_scale, 0)]
    for _ in prune(model, 2, pruning_ratio=0.5, target=target, unwrapped_parameters=kind(pairs)):
        pass
    assert len(model.layer_scale) == model.stem.out_channels < 8
    if target == "channels":
        assert (model.stem.out_channels, model.inner.out_channels) == (4, 5)
    else:
        total = sum(parameter.numel() for parameter in Scaled().parameters())
        assert 0.9 * total / 2 < sum(parameter.numel() for parameter in model.parameters()) <= total / 2


class Affine(nn.Module):
    """A layer that Torch-Pruning does not know."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class AffinePruner(tp.BasePruningFunc):
    def prune_out_channels(self, layer: Affine, idxs: list[int]) -> Affine:
        left = [channel for channel in range(len(layer.weight)) if channel not in idxs]
        layer.weight = self._prune_parameter_and_grad(layer.weight, left, 0)
        layer.bias = self._prune_parameter_and_grad(layer.bias, left, 0)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Affine) -> int:
        return len(layer.weight)

    get_in_channels = get_out_channels


def test_customized_pruners_cut_unknown_layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), Affine(8), nn.Sigmoid(), nn.Conv2d(8, 6, 1), Affine(6), nn.Conv2d(6, 2, 1)
    )
    whole = copy.deepcopy(model)
    *_, pruner = prune(model, 2, pruning_ratio=0.5, customized_pruners={Affine: AffinePruner()})
    assert [len(model[1].weight), model[3].in_channels, len(model[4].weight)] == [4, 4, 3]
    assert torch.equal(whole[1].weight[pruner.masks()["1"]["weight"] != 0], model[1].weight)


def test_root_module_types_decide_what_defines_a_group():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 6), nn.Flatten(), nn.Linear(6, 8), nn.Linear(8, 2)
    )
    for _ in prune(model, pruning_ratio=0.5, root_module_types=[nn.Linear]):
        pass
    assert [model[0].out_channels, model[2].out_channels, model[4].out_features] == [8, 6, 4]
