"""Which unit of which layer reads which: a network's weights as connections between its units, whatever its graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.insight.paths import KERNEL_DIMENSIONS, PathNetwork, run_as_paths

INPUT = "input"
"""The name under which layers read the network's input."""
OUTPUT = "output"
"""The name of the network's outputs in the graph of `pathways`."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One call of a convolution or linear layer, and where what it reads comes from.

    Attributes:
        name: The module's name, with ``#2`` and so on for further calls of it.
        weight: Signed weights, float64, (out channels, in channels, kernel elements); a grouped layer's spread out.
        sources: By the name of every layer that is read without another in between (`INPUT` included), how much of
            each of its units reaches each input channel, (in channels, units): 1 but for norms and pooling.
    """

    name: str
    weight: Tensor
    sources: dict[str, Tensor]

    def kernels(self, source: str) -> Tensor:
        """Return the weights between the units of a source and this layer's, (out channels, units, elements).

        Where several input channels hold one unit (a flattened image), their weights are the elements.
        """
        link = self.sources[source]
        fan = int((link != 0).sum(0).max())
        channels = (link != 0).int().argsort(dim=0, descending=True, stable=True)[:fan].T  # (units, fan)
        reaching = link.gather(0, channels.T).T  # 0 where a unit stands in fewer channels
        return (self.weight[:, channels] * reaching[None, :, :, None]).flatten(2)


@dataclass(frozen=True, eq=False)
class Connections:
    """Every layer of a network and what it reads.

    Attributes:
        layers: In the order of their calls.
        outputs: By the name of a layer, how much of each of its units reaches each output, (outputs, units).
        input_units: How many input units there are: numbers, or channels where a convolution reads the input.
        output_units: How many numbers the network gives for one input.
    """

    layers: list[Layer]
    outputs: dict[str, Tensor]
    input_units: int
    output_units: int


def find_connections(network: nn.Module, input_shape: Sequence[int]) -> Connections:
    """Follow one forward of a network.

    Args:
        network: A plain network of one tensor input; it is left alone.
        input_shape: Shape of one input, without the batch.

    Raises:
        GraphError: If the forward fails, or gives something else than one tensor.
    """
    network = copy.deepcopy(network).cpu().double().eval().requires_grad_(False)
    batch = torch.ones(1, *input_shape, dtype=torch.float64, requires_grad=True)
    recorder = _Recorder(network, batch)
    outputs = run_as_paths(network, batch, recorder).flatten()
    links = recorder.links(outputs, torch.arange(len(outputs)))
    if not recorder.reads_images:
        return Connections(recorder.layers, links, batch.numel(), len(outputs))
    for found in (links, *(layer.sources for layer in recorder.layers)):
        if INPUT in found:  # (values, channels * positions) to (values, channels)
            found[INPUT] = found[INPUT].reshape(len(found[INPUT]), input_shape[0], -1).sum(2)
    return Connections(recorder.layers, links, input_shape[0], len(outputs))


class _Recorder(PathNetwork):
    """Notes what every layer reads, and gives each a fresh output, to find out who reads that."""

    signed = True

    def __init__(self, network: nn.Module, batch: Tensor) -> None:
        super().__init__()
        self.reads_images = False
        weights = ((name, getattr(module, "weight", None)) for name, module in network.named_modules())
        self._names = {id(weight): name for name, weight in weights if weight is not None}
        self._calls: dict[str, int] = {}
        self._leaves: dict[str, tuple[Tensor, int | None]] = {INPUT: (batch, None)}
        self.layers: list[Layer] = []

    def layer(self, func: Callable[..., Any], arguments: dict[str, Any]) -> Tensor:
        x, name = arguments["input"], func.__name__
        kernel = KERNEL_DIMENSIONS[name]
        channel_dim = x.dim() - 1 - kernel
        weight = _spread_out(arguments["weight"].detach(), kernel, arguments.get("groups", 1), "transpose" in name)
        used = torch.nonzero(weight.any(2).any(0)).flatten()
        channels = x.movedim(channel_dim, 0).flatten(1).mean(1)
        self.layers.append(Layer(self._name(arguments["weight"]), weight, self.links(channels, used)))
        self.reads_images |= kernel > 0 and INPUT in self.layers[-1].sources
        output = torch.ones_like(func(**arguments).detach(), requires_grad=True)
        self._leaves[self.layers[-1].name] = (output, channel_dim)
        return output.clone()  # a clone, because the network may work in place

    def links(self, values: Tensor, which: Tensor) -> dict[str, Tensor]:
        """Return how much of each unit reaches some of the values, by layer; layers that do not are left out."""
        if not values.requires_grad:
            return {}
        tensors = [leaf for leaf, _ in self._leaves.values()]
        found: dict[str, Tensor] = {}
        for number in which.tolist():
            gradients = torch.autograd.grad(values[number], tensors, retain_graph=True, allow_unused=True)
            for (name, (_, dim)), gradient in zip(self._leaves.items(), gradients, strict=True):
                if gradient is not None:
                    units = gradient.flatten() if dim is None else gradient.movedim(dim, 0).flatten(1).sum(1)
                    found.setdefault(name, torch.zeros(len(values), len(units), dtype=units.dtype))[number] = units
        return {name: link for name, link in found.items() if bool(link.any())}

    def _name(self, weight: Tensor) -> str:
        name = self._names.get(id(weight), "weight")
        name = f"layer {name}" if name in (INPUT, OUTPUT) else name  # these are the graph's own
        calls = self._calls[name] = self._calls.get(name, 0) + 1
        return name if calls == 1 else f"{name}#{calls}"


def _spread_out(weight: Tensor, kernel: int, groups: int, transposed: bool) -> Tensor:
    """Return a layer's weight as (out channels, in channels, kernel elements), with zeros between its groups."""
    if kernel == 0:
        return weight.unsqueeze(2)
    parts = [part.transpose(0, 1) if transposed else part for part in weight.flatten(2).chunk(groups)]
    rows, columns, elements = parts[0].shape
    spread = weight.new_zeros(groups * rows, groups * columns, elements)
    for number, part in enumerate(parts):
        spread[number * rows : (number + 1) * rows, number * columns : (number + 1) * columns] = part
    return spread
