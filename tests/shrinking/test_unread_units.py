from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gumbel_plugin.graph.channel_groups import ChannelGroup, ChannelSlice
from gumbel_plugin.layers.geometry import columns_view, input_channels, read_channels
from gumbel_plugin.shrinking.equivalence import verify_equivalence
from gumbel_plugin.shrinking.unread_units import find_dead_units, removable_units, unread_units
from gumbel_torch_pruning import find_groups

LAYERS = {
    "linear": lambda: nn.Linear(4, 6),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, 3),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2),
    "grouped transposed": lambda: nn.ConvTranspose2d(4, 6, 2, groups=2),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_channel_is_read_if_the_output_depends_on_it(kind: str) -> None:
    """The oracle is the gradient of the output with respect to the input."""
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < 0.8] = 0.0
        if kind == "grouped":
            layer.weight[:3, 1] = 0.0  # rows of the first group: input channel 1
        elif kind == "grouped transposed":
            layer.weight[3] = 0.0
    assert input_channels(layer) == 4
    spatial = {"linear": (), "conv1d": (5,)}.get(kind, (5, 5))
    inputs = torch.randn(2, 4, *spatial, requires_grad=True)
    output = layer(inputs)
    (gradient,) = torch.autograd.grad((output * torch.randn_like(output)).sum(), inputs)
    expected = gradient.transpose(0, 1).flatten(1).any(1)
    assert torch.equal(read_channels(layer), expected)
    if kind.startswith("grouped"):
        assert not expected.all()


def slice_of(module: str, *positions: int, units: tuple[int, ...] | None = None) -> ChannelSlice:
    return ChannelSlice(module, torch.tensor(positions), torch.tensor(units or tuple(range(len(positions)))))


def test_a_unit_is_unread_if_no_reader_needs_any_of_its_channels() -> None:
    first, second = nn.Linear(4, 2), nn.Linear(8, 2)
    group = ChannelGroup(
        "g", 4, (), (slice_of("first", 0, 1, 2, 3), slice_of("second", *range(8), units=(0, 0, 1, 1, 2, 2, 3, 3)))
    )
    with torch.no_grad():
        first.weight[:, [0, 1, 3]] = 0.0
        second.weight[:, [0, 1, 2, 6, 7]] = 0.0
    assert unread_units({"first": first, "second": second}, group).tolist() == [0, 3]  # 1 is half read, 2 is read twice


def chain() -> tuple[nn.Sequential, list[ChannelGroup], torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)
    )
    inputs = torch.randn(7, 3)
    return model, find_groups(model, inputs), inputs


def test_the_dead_are_found_to_the_end_of_the_chain() -> None:
    """Unit 1 of the third layer is unread; only it reads unit 2 of the second; only that reads unit 3 of the first."""
    model, groups, inputs = chain()
    with torch.no_grad():
        model[6].weight[:, 1] = 0.0
        model[4].weight[[0, 2, 3], 2] = 0.0
        model[2].weight[[0, 1, 3, 4], 3] = 0.0
    before, biases = model(inputs), [model[n].bias.detach().clone() for n in (0, 2, 4)]
    dead = find_dead_units(model, groups)
    assert {name: units.tolist() for name, units in dead.items()} == {"4": [1], "2": [2], "0": [3]}
    assert torch.equal(model(inputs), before)
    assert not any(model[layer].weight[unit].any() for layer, unit in ((0, 3), (2, 2), (4, 1)))
    assert all(torch.equal(model[n].bias, bias) for n, bias in zip((0, 2, 4), biases, strict=True))


def test_nothing_is_dead_in_a_dense_network(network: Any) -> None:
    before = copy.deepcopy(network.model.state_dict())
    assert find_dead_units(network.model, list(network.groups().values())) == {}
    after = network.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_group_always_keeps_a_unit() -> None:
    model, groups, inputs = chain()
    with torch.no_grad():
        model[4].weight.zero_()
    before = model(inputs)
    dead = find_dead_units(model, groups)
    assert dead["2"].tolist() == [1, 2, 3, 4]
    assert dead["0"].tolist() == [1, 2, 3, 4, 5]  # nobody reads the one that stays, so what only it reads goes too
    assert torch.equal(model(inputs), before)


def test_every_layer_keeps_a_channel() -> None:
    modules: dict[str, nn.Module] = {"left": nn.Linear(3, 2), "right": nn.Linear(3, 3), "reader": nn.Linear(5, 2)}
    producers = (slice_of("left", 0, 1), slice_of("right", 0, 1, 2, units=(2, 3, 4)))
    group = ChannelGroup("left", 5, producers, (slice_of("reader", 0, 1, 2, 3, 4),))
    assert removable_units(modules, group, torch.tensor([0, 1, 3])).tolist() == [1, 3]
    assert removable_units(modules, group, torch.arange(5)).tolist() == [1, 3, 4]
    assert removable_units(modules, group, torch.tensor([2, 4])).tolist() == [2, 4]


def test_groups_that_are_not_exact_are_left() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)), torch.randn(4, 3)
    with torch.no_grad():
        model[2].weight[:, 1] = 0.0
    assert find_dead_units(model, find_groups(model, inputs)) == {}


def test_zeroing_the_dead_changes_no_output(network: Any) -> None:
    """Random columns die everywhere at once, through depthwise, grouped and transposed layers and concatenations."""
    groups = network.groups()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for group in groups.values():
            units = torch.randperm(group.size, generator=generator)[: group.size // 2]
            for part in group.consumers:
                layer = network.model.get_submodule(part.module)
                closed = part.positions[torch.isin(part.units, units)]
                columns = torch.ones(input_channels(layer)).index_fill(0, closed, 0.0)
                layer.weight.mul_(columns_view(layer, columns))
    before = copy.deepcopy(network.model)
    dead = find_dead_units(network.model, list(groups.values()))
    assert all(len(dead[name]) >= group.size // 2 for name, group in groups.items())
    report = verify_equivalence(before, network.model, network.inputs)
    assert max(report.absolute_errors.values()) == 0.0


def test_an_embeddings_dead_channels_are_zeroed_not_its_words() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.positions = nn.Embedding(6, 4), nn.Linear(3, 4)
            self.head = nn.Linear(4, 2)

    model = Tokens()
    group = ChannelGroup(
        "positions",
        4,
        (slice_of("positions", 0, 1, 2, 3), slice_of("table", 0, 1, 2, 3)),
        (slice_of("head", 0, 1, 2, 3),),
    )
    with torch.no_grad():
        model.head.weight[:, 2] = 0.0
    find_dead_units(model, [group])
    assert model.table.weight.bool().all(0).tolist() == [True, True, False, True]
    assert model.table.weight[:, [0, 1, 3]].all()
