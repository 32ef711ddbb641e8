"""Torch-Pruning's graph read as channel groups: who computes, who reads, what is removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from gumbel_plugin.errors import ConfigError, GraphError
from gumbel_plugin.graph.channel_groups import ChannelGroup, ChannelSlice
from gumbel_torch_pruning import DependencyGroups, find_groups

# Network: {producers: (units, {consumer: how many of its input channels})}, for the groups that can be cut.
EXPECTED: dict[str, dict[frozenset[str], tuple[int, dict[str, int]]]] = {
    "conv_bn_relu": {frozenset("01"): (6, {"3": 6}), frozenset("34"): (5, {"6": 5})},
    "residual": {
        frozenset({"conv1", "bn1", "conv3", "bn3"}): (6, {"conv2": 6, "head": 6}),
        frozenset({"conv2", "bn2"}): (8, {"conv3": 8}),
    },
    "depthwise": {frozenset("0134"): (8, {"6": 8}), frozenset("67"): (6, {"9": 6})},
    "concat": {
        frozenset({"left", "bn"}): (4, {"mix": 4}),
        frozenset({"right", "bn"}): (6, {"mix": 6}),
        frozenset({"mix"}): (5, {"head": 5}),
    },
    "squeeze_excite": {
        frozenset({"stem", "bn", "excite"}): (8, {"squeeze": 8, "head": 8}),
        frozenset({"squeeze"}): (4, {"excite": 4}),
    },
    "sigmoid": {frozenset("01"): (6, {"3": 6}), frozenset("3"): (5, {"6": 5})},
    "no_bn": {frozenset("0"): (12, {"2": 12}), frozenset("2"): (10, {"4": 10})},
    # The two halves of a grouped convolution must lose as many channels, before and behind it.
    "grouped": {frozenset("01"): (4, {"3": 8}), frozenset("34"): (6, {"6": 12}), frozenset("6"): (6, {"8": 6})},
    "transposed": {frozenset("01"): (6, {"3": 6}), frozenset("34"): (5, {"6": 5})},
    "flatten_linear": {frozenset("01"): (6, {"5": 96}), frozenset("5"): (10, {"7": 10})},
}


def described(groups: Mapping[str, ChannelGroup]) -> dict[frozenset[str], tuple[int, dict[str, int]]]:
    return {
        frozenset(part.module for part in group.producers): (
            group.size,
            {part.module: len(part.positions) for part in group.consumers},
        )
        for group in groups.values()
    }


def part_of(parts: tuple[ChannelSlice, ...], module: str) -> ChannelSlice:
    (part,) = (part for part in parts if part.module == module)
    return part


def test_who_computes_and_who_reads(network: Any) -> None:
    groups = network.groups()
    assert described(groups) == EXPECTED[network.name]
    for name, group in groups.items():
        assert group.name == name
        assert name in {part.module for part in group.producers}
        assert group.reason == ""
        for part in (*group.producers, *group.consumers):
            assert len(part.positions) == len(part.units) == len(part.positions.unique())
            assert sorted(part.units.unique().tolist()) == list(range(group.size))


def test_which_channel_belongs_to_which_unit(make_network: Callable[[str], Any]) -> None:
    def ordered(part: ChannelSlice) -> list[int]:
        return part.units[part.positions.argsort()].tolist()

    concat = {frozenset(p.module for p in g.producers): g for g in make_network("concat").groups().values()}
    left, right = concat[frozenset({"left", "bn"})], concat[frozenset({"right", "bn"})]
    assert part_of(left.consumers, "mix").positions.sort().values.tolist() == [0, 1, 2, 3]
    assert part_of(right.consumers, "mix").positions.sort().values.tolist() == [4, 5, 6, 7, 8, 9]
    assert ordered(part_of(right.producers, "bn")) == ordered(part_of(right.producers, "right")) == list(range(6))

    flatten = make_network("flatten_linear").groups()["0"]
    assert ordered(flatten.consumers[0]) == [channel // 16 for channel in range(96)]
    grouped = make_network("grouped").groups()
    assert ordered(grouped["0"].consumers[0]) == ordered(grouped["0"].producers[0]) == [0, 1, 2, 3] * 2
    assert ordered(grouped["3"].consumers[0]) == list(range(6)) * 2


def test_the_output_layer_is_unsupported(network: Any) -> None:
    others = [group for group in find_groups(network.model, network.inputs) if group.safety != "exact"]
    assert [group.safety for group in others] == ["unsupported"]
    assert "output" in others[0].reason


# Looking leaves no trace ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["nothing", "something", "everything"])
def test_the_model_is_left_as_it_is(frozen: str, network: Any) -> None:
    model = network.model
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(frozen == "nothing" or (frozen == "something" and number % 2 == 0))
    next(iter(model.children())).eval()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    generator = torch.get_rng_state()
    groups = {group.name: group for group in find_groups(model, network.inputs) if group.safety == "exact"}
    assert described(groups) == EXPECTED[network.name]
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in before.items())
    assert ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]) == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_may_be_a_tuple_or_named(dtype: torch.dtype, make_network: Callable[..., Any]) -> None:
    network = make_network("residual", dtype)
    for inputs in ((network.inputs,), [network.inputs], {"x": network.inputs}):
        groups = {g.name: g for g in find_groups(network.model, inputs) if g.safety == "exact"}
        assert described(groups) == EXPECTED["residual"]


def test_a_forward_that_fails_is_named(make_network: Callable[[str], Any]) -> None:
    with pytest.raises(GraphError, match=r"forward fails on the example inputs.*expected input.* to have 3 channels"):
        find_groups(make_network("residual").model, torch.randn(2, 4, 8, 8))
    with pytest.raises((ConfigError, GraphError), match=r"example_inputs is a int|example inputs"):
        find_groups(make_network("residual").model, 3)


# Removing ---------------------------------------------------------------------------------------------------------


def test_removing_units_shrinks_everything_they_touch(network: Any) -> None:
    model = network.model
    flags = {name: number % 2 == 0 for number, (name, _) in enumerate(model.named_parameters())}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    training = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.shape for name, tensor in model.named_parameters()}
    dependency = DependencyGroups(model, network.inputs)
    groups = [group for group in dependency.groups if group.safety == "exact"]
    for group in groups:
        dependency.remove(group.name, torch.tensor([0, group.size - 1]))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == training
    for group in groups:
        for part in group.producers:
            gone = int(torch.isin(part.units, torch.tensor([0, group.size - 1])).sum())
            layer = model.get_submodule(part.module)
            dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            others = sum(  # a batch norm behind a concatenation loses channels of several groups
                int(torch.isin(p.units, torch.tensor([0, g.size - 1])).sum())
                for g in groups
                for p in g.producers
                if g is not group and p.module == part.module
            )
            assert layer.weight.shape[dim] == before[f"{part.module}.weight"][dim] - gone - others
    assert model(network.inputs).shape[-1] == 4
