"""What a network costs as a function of its channels' gates: MACs, parameters or latency; exact for 0/1 gates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gumbel_plugin.graph.attention_heads import kind_of, remove_heads
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.layers.example_inputs import ExampleInputs
from gumbel_plugin.layers.geometry import is_depthwise, is_matrix, layer_channels
from gumbel_plugin.sparsity.counting import count_macs, count_parameters, macs_of_layers

Gates = Mapping[str, Tensor]
"""Gates or their probabilities, by mask name."""

WidthCosts = Callable[[Tensor, Tensor], Tensor]
"""The cost of each layer, shape (..., layers), from the numbers of its input and output channels that stay."""


@dataclass(eq=False)
class Widths:
    """How many channels the layers have on both sides, as a function of the gates of all groups, in one vector.

    Attributes:
        names: The groups, in the order of the vector.
        sizes: How many units each has.
        layers: The layers that some group reads or computes.
        full: Input channels of all layers, then their output channels, shape (2 · layers,).
        rows: For every gated channel, its place in `full`.
        units: For every gated channel, its unit's place in the vector.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    layers: Sequence[str]
    full: Tensor
    rows: Tensor
    units: Tensor

    @classmethod
    def of(cls, model: nn.Module, groups: Mapping[str, ChannelGroup]) -> Widths:
        """Return the widths of every layer that some of the groups reads or computes."""
        layers = list(dict.fromkeys(part.module for g in groups.values() for part in (*g.consumers, *g.producers)))
        place = {name: number for number, name in enumerate(layers)}
        channels = [layer_channels(model.get_submodule(name)) for name in layers]
        full = torch.tensor([before for before, _ in channels] + [after for _, after in channels], dtype=torch.float64)
        rows, units, start = [], [], 0
        for group in groups.values():
            for side, parts in enumerate((group.consumers, group.producers)):
                for part in parts:
                    rows.append(torch.full((len(part.units),), place[part.module] + side * len(layers)))
                    units.append(part.units + start)
            start += group.size
        empty = torch.zeros(0, dtype=torch.int64)
        sizes = [group.size for group in groups.values()]
        return cls(list(groups), sizes, layers, full, torch.cat([empty, *rows]), torch.cat([empty, *units]))

    def per_unit(self, names: Sequence[str]) -> Tensor:
        """Return how many channels of each layer a unit of each group is on average, shape (groups, 2 · layers)."""
        sizes = torch.tensor(self.sizes)
        owner = torch.arange(len(sizes)).repeat_interleave(sizes)[self.units]
        channels = torch.bincount(owner * len(self.full) + self.rows, minlength=len(sizes) * len(self.full))
        order = [list(self.names).index(name) for name in names]
        return (channels.view(len(sizes), -1) / sizes[:, None])[order]

    def kept(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many input and output channels of each layer stay (in expectation, under probabilities)."""
        full, rows, units = (part.to(gates.device) for part in (self.full.to(gates.dtype), self.rows, self.units))
        inputs, outputs = full.index_add(0, rows, gates[units] - 1).chunk(2)
        return inputs, outputs


@dataclass(eq=False)
class CostModel:
    """The cost of a network as a differentiable function of its gates.

    Attributes:
        metric: What is counted, for messages.
        widths: The widths of the layers whose cost depends on gates.
        costs: Their costs, from their widths.
        constant: The cost of everything else.
        unit_costs: What every unit costs by itself, whatever else stays, shape (units of all groups,).
    """

    metric: str
    widths: Widths
    costs: WidthCosts
    constant: float
    unit_costs: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def __call__(self, gates: Gates | Tensor) -> Tensor:
        """Return the cost under gates (or, in expectation, under independent probabilities).

        Args:
            gates: By group, or of all groups in one vector.
        """
        if not isinstance(gates, Tensor):
            parts = [gates[name] for name in self.widths.names]
            gates = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        cost = self.constant + self.costs(*self.widths.kept(gates)).sum()
        return cost + gates @ self.unit_costs.to(gates) if len(self.unit_costs) else cost

    def of_counts(self, names: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """Return the cost as a function of how many units of each group stay, as if units of one group were alike.

        It takes counts of shape (..., groups) and returns costs of shape (...).

        Args:
            names: The groups, in the order of the counts.
        """
        sizes = dict(zip(self.widths.names, self.widths.sizes, strict=True))
        units = self.unit_costs if len(self.unit_costs) else torch.zeros(sum(self.widths.sizes))
        each = dict(zip(self.widths.names, torch.split(units, list(self.widths.sizes)), strict=True))
        parts = [
            self.widths.full.float(),
            torch.tensor([float(sizes[name]) for name in names]),
            self.widths.per_unit(names).float(),
            torch.stack([each[name].mean() for name in names]).float(),
        ]

        def cost(counts: Tensor) -> Tensor:
            parts[:] = [part.to(counts.device) for part in parts]
            full, whole, channels, unit_costs = parts
            widths = full - (whole - counts) @ channels
            return self.constant + self.costs(*widths.chunk(2, -1)).sum(-1) + counts @ unit_costs

        return cost

    def by_layer(self, gates: Gates) -> dict[str, float]:
        """Return the cost of every layer that depends on gates."""
        vector = torch.cat([gates[name] for name in self.widths.names])
        return dict(zip(self.widths.layers, self.costs(*self.widths.kept(vector)).tolist(), strict=True))

    def all_open(self) -> dict[str, Tensor]:
        """Return open gates, by group, float64."""
        pairs = zip(self.widths.names, self.widths.sizes, strict=True)
        return {name: torch.ones(size, dtype=torch.float64) for name, size in pairs}


def count_cost(
    model: nn.Module, groups: Mapping[str, ChannelGroup], example_inputs: ExampleInputs, metric: str
) -> CostModel:
    """Return the MACs or parameters of a network as a function of its gates.

    Args:
        model: The plain model.
        groups: The gated groups, by mask name.
        example_inputs: One batch, to see how often each layer is applied.
        metric: ``"macs"`` or ``"parameters"``.
    """
    widths = Widths.of(model, groups)
    modules = [model.get_submodule(name) for name in widths.layers]
    if metric == "macs":
        macs = macs_of_layers(model, example_inputs)
        total = macs.total
        costs = [_products(module, macs.of(name), 0.0) for name, module in zip(widths.layers, modules, strict=True)]
    else:
        total = count_parameters(model)
        costs = [_parameters_of(module) for module in modules]
    of_pairs, of_outputs = torch.tensor(costs, dtype=torch.float64).reshape(-1, 2).unbind(1)

    def of_widths(inputs: Tensor, outputs: Tensor) -> Tensor:
        return (inputs * of_pairs.to(inputs) + of_outputs.to(inputs)) * outputs

    outside = [float(group.unlisted_weights if metric == "parameters" else 0) for group in groups.values()]
    units = torch.tensor(outside, dtype=torch.float64).repeat_interleave(torch.tensor(widths.sizes, dtype=torch.int64))
    cost = CostModel(metric, widths, of_widths, 0.0, units)
    cost.constant = total - float(cost(cost.all_open()))
    if metric == "macs":
        _count_heads(cost, model, groups, example_inputs)
    return cost


def _products(module: nn.Module, product: float, addend: float) -> tuple[float, float]:
    """Return (a, b) of a·inputs·outputs + b·outputs for a product of a layer's full widths, and what each output adds.

    A depthwise convolution has one width, a layer that is no matrix no product.
    """
    inputs, outputs = layer_channels(module)
    if not is_matrix(module):
        return 0.0, addend
    if is_depthwise(module):
        return 0.0, product / outputs + addend
    return product / (inputs * outputs), addend


def _parameters_of(module: nn.Module) -> tuple[float, float]:
    """Return weight and bias sizes as `_products` does; a normalization has per-channel parameters only."""
    if not is_matrix(module):
        own = module.parameters(recurse=False)
        return 0.0, sum(parameter.numel() / max(1, parameter.shape[-1]) for parameter in own)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return _products(module, weight.numel(), 0.0 if getattr(module, "bias", None) is None else 1.0)


def _count_heads(
    cost: CostModel, model: nn.Module, groups: Mapping[str, ChannelGroup], example_inputs: ExampleInputs
) -> None:
    """Add, in place, what an attention layer spends on each head beside its listed layers: scores, packed projections.

    That is what the layer's MACs fall by when a head leaves, less what the cost model has already.
    """
    heads = {name: group for name, group in groups.items() if kind_of(model.get_submodule(group.root)) is not None}
    if not heads:
        return
    smaller = copy.deepcopy(model)
    before, gates = count_macs(smaller, example_inputs), cost.all_open()
    starts = dict(zip(groups, torch.tensor([0, *cost.widths.sizes]).cumsum(0).tolist(), strict=False))
    for name, group in heads.items():
        last = torch.tensor([group.size - 1])
        remove_heads(smaller, name, last)
        after = count_macs(smaller, example_inputs)
        fewer = {**gates, name: gates[name].index_fill(0, last, 0.0)}
        rest = before - after - float(cost(gates) - cost(fewer))
        cost.unit_costs[starts[name] : starts[name] + group.size] += rest
        cost.constant -= rest * group.size
        before = after
