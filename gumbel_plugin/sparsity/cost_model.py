"""Budgets in what a deployer pays: MACs, parameters or latency, as functions of how many channels stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from typing_extensions import override

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.layers.example_inputs import ExampleInputs, batch_size_of, call_model, observing
from gumbel_plugin.layers.geometry import is_depthwise, is_matrix, is_transposed, layer_channels
from gumbel_plugin.sparsity.budget import Budget

Gates = Mapping[str, Tensor]
"""Gates or their probabilities, by mask name."""


@dataclass(eq=False)
class Width:
    """How many channels a layer has on one side, as a function of the gates.

    Attributes:
        channels: Channels of the dense layer.
        feeds: For each mask that gates some of them, how many channels each of its units stands for.
        fixed: How many channels no mask gates.
    """

    channels: int
    feeds: dict[str, Tensor] = field(default_factory=dict)
    fixed: float = field(init=False)

    def __post_init__(self) -> None:
        self.fixed = float(self.channels)

    def add(self, name: str, size: int, units: Tensor) -> None:
        """Note that channels of this side belong to units of a mask."""
        counts = torch.bincount(units, minlength=size).float()
        self.feeds[name] = self.feeds[name] + counts if name in self.feeds else counts
        self.fixed -= len(units)

    def kept(self, gates: Gates) -> Tensor:
        """Return the (expected) number of channels that stay."""
        kept = next(iter(gates.values())).new_tensor(self.fixed)
        for name, counts in self.feeds.items():
            kept = kept + (gates[name] * counts.to(gates[name].device)).sum()
        return kept


_REOPEN = 64
"""How many units at the edge of a cut are tried again."""

LayerFunction = Callable[[Tensor, Tensor], Tensor]
"""A layer's cost as a function of how many input and output channels stay."""


@dataclass(eq=False)
class LayerCost:
    """One layer's part of the cost."""

    name: str
    inputs: Width
    outputs: Width
    cost: LayerFunction

    def __call__(self, gates: Gates) -> Tensor:
        """Return the cost under gates or their probabilities."""
        return self.cost(self.inputs.kept(gates), self.outputs.kept(gates))


@dataclass(eq=False)
class CostModel:
    """The cost of a network as a differentiable function of its gates; exact for 0/1 gates.

    Attributes:
        unit: What is counted, for messages.
        layers: The layers whose cost depends on gates.
        constant: The cost of everything else.
    """

    unit: str
    layers: list[LayerCost]
    constant: float

    def __call__(self, gates: Gates) -> Tensor:
        """Return the cost under gates (or, in expectation, under independent probabilities)."""
        total = next(iter(gates.values())).new_tensor(self.constant)
        for layer in self.layers:
            total = total + layer(gates)
        return total


@dataclass(eq=False)
class CostBudget(Budget):
    """A budget over the whole network, in a cost that is a product of what stays before and after each layer."""

    model: CostModel | None = None

    def __post_init__(self) -> None:
        whole = {term.name: torch.ones(term.mask.shape, dtype=torch.float64) for term in self.terms}
        self._dense = float(self._cost(whole))
        self._check_floor()

    @property
    def achievable(self) -> float:
        """The ratio itself: one that cannot be met was refused."""
        return self.ratio or 0.0

    @property
    def total(self) -> float:
        """The dense network's cost."""
        return self._dense

    @override
    def usage(self, gates: Sequence[Tensor]) -> Tensor:
        return self._cost({m.name: gate for m, gate in zip(self.terms, gates, strict=True)}) / self.total

    @torch.no_grad()
    def cut(self) -> dict[str, Tensor]:
        """Return hard gates whose cost is at most the budget, and short of it by less than the units at the edge.

        As few of the lowest-scored units as meet the budget are closed; then those of them that still fit open again,
        the highest-scored first: a costly unit at the edge would leave a gap that cheaper ones can fill.
        """
        scores = {m.name: m.mask.scores(m.weight).float().flatten().cpu() for m in self.terms}
        order = self._removal_order(scores)
        low, high = 0, len(order)
        while low < high:  # the cost falls with every unit: bisect for the fewest that meet the budget
            middle = (low + high) // 2
            if self._meets(self._rounded(self._without(order[:middle]), scores)):
                high = middle
            else:
                low = middle + 1
        gates = self._without(order[:low])
        for name, unit in reversed(order[max(0, low - _REOPEN) : low]):
            gates[name][unit] = True
            gates[name][unit] = self._meets(self._rounded(gates, scores))
        return {m.name: self._rounded(gates, scores)[m.name].to(m.mask.hard.device) for m in self.terms}

    def _meets(self, gates: Mapping[str, Tensor]) -> bool:
        cost = float(self._cost({name: gate.double() for name, gate in gates.items()}))
        return cost <= self.total * (1 - (self.ratio or 0.0)) * (1 + 1e-9)

    def _cost(self, gates: Gates) -> Tensor:
        if self.model is None:
            raise ConfigError("a cost budget needs a cost model")
        return self.model(gates)

    def _removal_order(self, scores: Mapping[str, Tensor]) -> list[tuple[str, int]]:
        """Return (mask, unit) pairs, the lowest score first; units that must stay are left out.

        Among equal scores every mask loses its share in turn: gates that were not learned do not empty one layer first.
        """
        candidates = []
        for term in self.terms:
            score = scores[term.name]
            units = torch.argsort(score, stable=True)[: term.prunable_range()[1]]
            for place, (value, unit) in enumerate(zip(score[units].tolist(), units.tolist(), strict=True)):
                candidates.append((value, place / term.units, term.name, unit))
        return [(name, unit) for _, _, name, unit in sorted(candidates)]

    def _without(self, units: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        """Return gates that are open but for these units."""
        closed: dict[str, list[int]] = {term.name: [] for term in self.terms}
        for name, unit in units:
            closed[name].append(unit)
        gates = {}
        for term in self.terms:
            gates[term.name] = torch.ones(term.units, dtype=torch.bool)
            gates[term.name][closed[term.name]] = False
        return gates

    def _rounded(self, gates: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gates with as many more closed as `BudgetTerm.multiple` wants."""
        rounded = {name: gate.clone() for name, gate in gates.items()}
        for term in self.terms:
            term.round_down(rounded[term.name], scores[term.name])
        return rounded

    def _check_floor(self) -> None:
        """Refuse a budget below what is left when every group keeps as little as it may."""
        smallest: dict[str, Tensor] = {}
        for term in self.terms:
            gates = torch.zeros(term.units, dtype=torch.float64)
            gates[: term.units - term.prunable_range()[1]] = 1.0
            smallest[term.name] = gates
        floor = float(self._cost(smallest)) / self.total
        if self.model is not None and floor > 1 - (self.ratio or 0.0) + 1e-9:
            fixed = self.model.constant / self.total
            worst = max(self.model.layers, key=lambda layer: float(layer(smallest)))
            raise ConfigError(
                f"pruning_ratio {self.ratio:g} of the {self.model.unit} cannot be met: {floor:.1%} stay when every "
                f"group keeps its minimum ({fixed:.1%} cannot be gated at all, the largest gated layer left is "
                f"{worst.name!r}); the largest possible ratio is {1 - floor:.3f}"
            )


def count_cost(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    example_inputs: ExampleInputs,
    unit: str,
    total: float,
) -> CostModel:
    """Return the MACs or parameters of a network as a function of its gates.

    Args:
        model: The plain model.
        groups: The gated groups, by mask name.
        example_inputs: One batch, to see how often each layer is applied.
        unit: ``"macs"`` or ``"parameters"``.
        total: The dense network's whole cost, in that unit.
    """
    widths = layer_widths(model, groups)
    positions = applications(model, widths, example_inputs) if unit == "macs" else {}
    layers = []
    for name, (inputs, outputs) in widths.items():
        module = model.get_submodule(name)
        function = _parameters_of(module) if unit == "parameters" else _macs_of(module, positions.get(name, 0.0))
        if function is not None:
            layers.append(LayerCost(name, inputs, outputs, function))
    if unit == "parameters":
        unlisted = {name: group for name, group in groups.items() if group.unlisted_weights}
        layers += [unit_cost(name, group.size, float(group.unlisted_weights)) for name, group in unlisted.items()]
    dense = {name: torch.ones(group.size, dtype=torch.float64) for name, group in groups.items()}
    gated = sum(float(layer(dense)) for layer in layers)
    return CostModel(unit, layers, total - gated)


def unit_cost(name: str, units: int, cost: float) -> LayerCost:
    """Return a cost that every unit of a group has, whatever else stays.

    Args:
        name: The group's name.
        units: How many units it has.
        cost: What one of them costs.
    """
    width = Width(units)
    width.add(name, units, torch.arange(units))
    return LayerCost(name, width, width, lambda kept, _: kept * cost)


def layer_widths(model: nn.Module, groups: Mapping[str, ChannelGroup]) -> dict[str, tuple[Width, Width]]:
    """Return the input and output widths of every layer that some group reads or computes."""
    widths: dict[str, tuple[Width, Width]] = {}

    def of(name: str) -> tuple[Width, Width]:
        if name not in widths:
            module = model.get_submodule(name)
            inputs, outputs = layer_channels(module)
            widths[name] = (Width(inputs), Width(outputs))
        return widths[name]

    for name, group in groups.items():
        for part in group.producers:
            of(part.module)[1].add(name, group.size, part.units)
        for part in group.consumers:
            of(part.module)[0].add(name, group.size, part.units)
    return widths


def _parameters_of(module: nn.Module) -> LayerFunction:
    """Return weight and bias sizes as a function of the widths; a normalization has per-channel parameters only."""
    own = list(module.parameters(recurse=False))
    if not is_matrix(module):
        per_channel = sum(parameter.numel() / max(1, parameter.shape[-1]) for parameter in own)
        return lambda inputs, outputs: outputs * per_channel
    weight = module.weight
    assert isinstance(weight, Tensor)
    in_width, out_width = layer_channels(module)
    bias = 1.0 if getattr(module, "bias", None) is not None else 0.0
    if is_depthwise(module):
        per_output = weight.numel() / out_width + bias
        return lambda inputs, outputs: outputs * per_output
    per_pair = weight.numel() / (in_width * out_width)
    return lambda inputs, outputs: inputs * outputs * per_pair + outputs * bias


def _macs_of(module: nn.Module, applications: float) -> LayerFunction | None:
    if not is_matrix(module):
        return None
    weight = module.weight
    assert isinstance(weight, Tensor)
    in_width, out_width = layer_channels(module)
    if is_depthwise(module):
        per_output = applications * weight.numel() / out_width
        return lambda inputs, outputs: outputs * per_output
    per_pair = applications * weight.numel() / (in_width * out_width)
    return lambda inputs, outputs: inputs * outputs * per_pair


def applications(model: nn.Module, layers: Iterable[str], example_inputs: ExampleInputs) -> dict[str, float]:
    """Return at how many positions the weight of each of these convolutions or linear layers is applied to a sample.

    A layer's positions times the number of its weights are its multiply-accumulates.
    """
    positions: dict[str, float] = {}
    batch = batch_size_of(example_inputs)

    def record(name: str, channels: int, transposed: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # A transposed convolution applies its kernel at every input position, the others at every output position.
            where = args[0].numel() / layer_channels(module)[0] if transposed else output.numel() / channels
            positions[name] = positions.get(name, 0.0) + where / batch

        return hook

    handles = []
    for name in layers:
        module = model.get_submodule(name)
        if is_matrix(module):
            handles.append(module.register_forward_hook(record(name, layer_channels(module)[1], is_transposed(module))))
    try:
        with observing(model):
            call_model(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return positions
