"""Channels that do not depend on the input: zeros are unread, and many constants become one.

A masked row computes no input any more, but what a batch norm and an activation make of it need not be zero, and under
zero padding that constant is no bias (`constants` folds the ones that are). A reader is linear in what it reads,
though: c₁·conv(w₁ ∗ 1) + c₂·conv(w₂ ∗ 1) = c₁·conv((w₁ + c₂/c₁·w₂) ∗ 1). So one channel, the carrier, can stand for all
constant ones, and the others leave the network without a change of its outputs.

What depends on the input is found by running the network on NaN: what is still a number afterwards does not. That
holds for dead rows, for a batch norm whose weights are zero (SlimPruner masks those), and for whatever follows them,
without a list of operations that would have to be known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.layers.example_inputs import ExampleInputs, call_model, inputs_on_device_of, observing
from gumbel_plugin.layers.geometry import columns_view, input_channels, output_dimension, read_channels
from gumbel_plugin.layers.precision import computing_in, dtypes_of, round_to
from gumbel_plugin.shrinking.folded_constants import ReadValues, observe

_SMALLEST_CARRIER = 1e-2
"""A carrier's constant, relative to the largest: dividing by less would blow the reader's weights up."""


@torch.no_grad()
def merge_constants(
    model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: ExampleInputs
) -> dict[str, Tensor]:
    """Let the readers of channels that do not depend on the input read zeros not at all, and one constant for many.

    Args:
        model: The masked model, changed in place; its outputs stay. Where something changes, all of it becomes float64
            (`round_to` takes it back).
        groups: Its channel groups: a group's readers agree on the unit that carries.
        example_inputs: What to run it on; floating tensors, or what an embedding reads.

    Returns:
        By reader, which of its input channels are read no more.
    """
    modules = dict(model.named_modules())
    readers = _readers(modules, groups)
    if not any(_has_silent_units(modules, group) for group in groups if group.safety == "exact"):
        return {}
    dtypes = dtypes_of(model)
    model.double()
    independent = _independent(model, readers, example_inputs)
    seen = observe(model, set(readers), example_inputs)
    carriers: set[tuple[str, int]] = set()
    unread: dict[str, Tensor] = {}
    for name, channels in readers.items():
        usable = independent[name] & seen[name].same & read_channels(modules[name]).cpu()
        gone = _merge(modules[name], torch.nonzero(usable).flatten(), seen[name], channels, carriers)
        if len(gone):
            unread[name] = gone
    if not unread:
        round_to(model, dtypes)
    return unread


Channels = Mapping[int, tuple[str, int]]
"""The group and the unit behind each of a reader's input channels."""


def _readers(modules: Mapping[str, nn.Module], groups: Sequence[ChannelGroup]) -> dict[str, Channels]:
    """Return the layers that read exact groups, and own their weights."""
    shared = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
    readers: dict[str, dict[int, tuple[str, int]]] = {}
    for group in groups:
        for part in group.consumers if group.safety == "exact" else ():
            weight = modules[part.module]._parameters.get("weight")
            if weight is not None and shared[id(weight)] == 1:
                pairs = zip(part.positions.tolist(), part.units.tolist(), strict=True)
                readers.setdefault(part.module, {}).update({place: (group.name, unit) for place, unit in pairs})
    return dict(readers)


def _has_silent_units(modules: Mapping[str, nn.Module], group: ChannelGroup) -> bool:
    """Whether something reads a unit that one of its layers computes without looking at its input."""
    silent, read = torch.zeros(group.size, dtype=torch.bool), torch.zeros(group.size, dtype=torch.bool)
    for part in group.producers:
        found = _silent(modules[part.module])
        if found is not None:
            silent[part.units[found[0].cpu()[part.positions]]] = True
    for part in group.consumers if bool(silent.any()) else ():
        read[part.units[read_channels(modules[part.module]).cpu()[part.positions]]] = True
    return bool((silent & read).any())


def _merge(
    module: nn.Module, constant: Tensor, seen: ReadValues, channels: Channels, carriers: set[tuple[str, int]]
) -> Tensor:
    """Change a reader's float64 weight; return which of the constant channels it does not read any more."""
    values = seen.values
    zeros, others = constant[values[constant] == 0], constant[values[constant] != 0]
    gone = [channel for channel in zeros.tolist() if channel in channels]
    mergeable = [channel for channel in others.tolist() if channel in channels]
    weight = module._parameters["weight"]
    assert weight is not None
    if getattr(module, "groups", 1) == 1 and len(mergeable) > 1:
        carrier = _carrier(mergeable, values, channels, carriers)
        columns = weight if getattr(module, "transposed", False) else weight.transpose(0, 1)
        for channel in mergeable:
            if channel != carrier:
                columns[carrier] += columns[channel] * float(values[channel] / values[carrier])
                gone.append(channel)
    closed = torch.zeros(input_channels(module), dtype=weight.dtype)
    closed[gone] = 1.0
    weight.mul_(columns_view(module, (1 - closed).to(weight.device)))
    return torch.tensor(sorted(gone), dtype=torch.int64)


def _carrier(channels: list[int], values: Tensor, units: Channels, carriers: set[tuple[str, int]]) -> int:
    """Choose the channel that carries: one that another reader has chosen already, else the largest constant."""
    largest = float(values[channels].abs().max())
    known = [channel for channel in channels if units[channel] in carriers]
    known = [channel for channel in known if float(values[channel].abs()) >= _SMALLEST_CARRIER * largest]
    chosen = max(known or channels, key=lambda channel: float(values[channel].abs()))
    carriers.add(units[chosen])
    return chosen


def _silent(module: nn.Module) -> tuple[Tensor, int] | None:
    """Return which of a layer's output channels are its bias whatever it reads, bool, and their dimension."""
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
        silent, dimension = weight == 0, 1
    elif isinstance(module, nn.Linear) or hasattr(module, "kernel_size"):
        rows = output_dimension(module)
        if rows is None or (rows == 1 and getattr(module, "groups", 1) > 1):  # a grouped transposed convolution
            return None
        silent = (weight == 0).movedim(rows, 0).flatten(1).all(1)
        dimension = -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)  # type: ignore[arg-type]
    else:
        return None
    return (silent, dimension) if bool(silent.any()) else None


def _independent(model: nn.Module, readers: Mapping[str, Any], example_inputs: ExampleInputs) -> dict[str, Tensor]:
    """Run a float64 model on NaN; return, by reader, which of its input channels are numbers nevertheless, bool."""
    found: dict[str, Tensor] = {}

    def silence(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        silent = _silent(module)
        if silent is None:
            return output
        channels, dimension = silent
        own = module._parameters.get("bias")
        bias = torch.zeros_like(channels, dtype=output.dtype) if own is None else own.to(output.dtype)
        view = [1] * output.dim()
        view[dimension] = -1
        return torch.where(channels.view(view), bias.view(view), output)

    def forget(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.full_like(output, torch.nan)

    def read(name: str, module: nn.Module, inputs: Tensor) -> None:
        dimension = -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)  # type: ignore[arg-type]
        number = ~inputs.isnan().movedim(dimension, 0).flatten(1).any(1).cpu()
        found[name] = found.get(name, number) & number

    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if _silent(module) is not None:
            handles.append(module.register_forward_hook(silence))
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            handles.append(module.register_forward_hook(forget))
        if name in readers:
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: read(name, m, args[0])))
    try:
        with observing(model), computing_in(torch.float64):
            call_model(model, inputs_on_device_of(model, tree_map(_nan_like, example_inputs)))
    finally:
        for handle in handles:
            handle.remove()
    unseen = {name: torch.zeros(input_channels(model.get_submodule(name)), dtype=torch.bool) for name in readers}
    return {**unseen, **found}


def _nan_like(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.full_like(value, torch.nan, dtype=torch.float64)
    return value
