"""Constant (input-independent) channels: zeros are unread, and one constant channel stands for many.

A masked row computes no input any more, but what a batch norm and an activation make of it need not be zero, and under
zero padding that constant is no bias (`fold_constants` folds the ones that are). A reader is linear in what it reads,
though: c₁·conv(w₁ ∗ 1) + c₂·conv(w₂ ∗ 1) = c₁·conv((w₁ + c₂/c₁·w₂) ∗ 1). So one representative channel can stand for
all constant ones, and the others leave the network without a change of its outputs.

What depends on the input is found by running the network on NaN: what is still a number afterwards does not. That
holds for dead rows, for a batch norm whose weights are zero (SlimPruner masks those), and for whatever follows them,
without a list of operations that would have to be known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.layers.example_inputs import ExampleInputs
from gumbel_plugin.layers.geometry import (
    channel_dimension,
    columns_view,
    groups_of,
    input_channels,
    is_transposed,
    read_channels,
    written_channels,
)
from gumbel_plugin.layers.own_forward import has_own_forward
from gumbel_plugin.layers.weights import read_weight
from gumbel_plugin.shrinking.folded_constants import ReadValues, observe, run_in_float64, uses_of_parameters
from gumbel_plugin.shrinking.unread_units import unread_units

_SMALLEST = 1e-2
"""A representative's constant, relative to the largest: dividing by less would blow the reader's weights up."""


@torch.no_grad()
def merge_constants(
    model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: ExampleInputs
) -> dict[str, Tensor]:
    """Let the readers of channels that do not depend on the input read zeros not at all, and one constant for many.

    Args:
        model: The masked model, changed in place; its outputs stay. Where something may change, all of it becomes
            float64 (`round_to` takes it back).
        groups: Its channel groups: a group's readers agree on the representative unit.
        example_inputs: What to run it on; floating tensors, or what an embedding reads.

    Returns:
        By reader, which of its input channels are read no more.
    """
    modules = dict(model.named_modules())
    exact = [group for group in groups if group.safety == "exact"]
    if not any(_has_constant_units(modules, group) for group in exact):
        return {}
    readers = _readers(modules, exact)
    model.double()
    independent = _independent(model, readers, example_inputs)
    seen = observe(model, set(readers), example_inputs)
    representatives: set[tuple[str, int]] = set()
    unread: dict[str, Tensor] = {}
    for name, channels in readers.items():
        usable = independent[name] & seen[name].same & read_channels(modules[name]).cpu()
        gone = _merge(modules[name], torch.nonzero(usable).flatten(), seen[name], channels, representatives)
        if len(gone):
            unread[name] = gone
    return unread


Channels = Mapping[int, tuple[str, int]]
"""The group and the unit behind each of a reader's input channels."""


def _readers(modules: Mapping[str, nn.Module], groups: Sequence[ChannelGroup]) -> Mapping[str, Channels]:
    """Return the layers that read groups, and own their weights."""
    uses = uses_of_parameters(modules)
    readers: dict[str, dict[int, tuple[str, int]]] = {}
    for group in groups:
        for part in group.consumers:
            weight = modules[part.module]._parameters.get("weight")
            if weight is not None and uses[id(weight)] == 1:
                pairs = zip(part.positions.tolist(), part.units.tolist(), strict=True)
                readers.setdefault(part.module, {}).update({place: (group.name, unit) for place, unit in pairs})
    return readers


def _has_constant_units(modules: Mapping[str, nn.Module], group: ChannelGroup) -> bool:
    """Whether something reads a unit that one of its layers computes without looking at its input."""
    constant = torch.zeros(group.size, dtype=torch.bool)
    for part in group.producers:
        channels = _constant_channels(modules[part.module])
        if channels is not None:
            constant[part.units[channels.cpu()[part.positions]]] = True
    return bool(constant.any()) and bool(constant.index_fill(0, unread_units(modules, group), False).any())


def _merge(
    module: nn.Module, constant: Tensor, seen: ReadValues, units: Channels, representatives: set[tuple[str, int]]
) -> Tensor:
    """Change a reader's float64 weight; return which of the constant channels it does not read any more."""
    values, weight = seen.values, read_weight(module)
    known = [channel for channel in constant.tolist() if channel in units]
    gone = [channel for channel in known if values[channel] == 0]
    mergeable = [channel for channel in known if values[channel] != 0]
    if groups_of(module) == 1 and len(mergeable) > 1 and not has_own_forward(module):  # nor need that be linear
        chosen = _representative(mergeable, values, units, representatives)
        columns = weight if is_transposed(module) else weight.transpose(0, 1)
        for channel in mergeable:
            if channel != chosen:
                columns[chosen] += columns[channel] * float(values[channel] / values[chosen])
                gone.append(channel)
    closed = torch.zeros(input_channels(module), dtype=weight.dtype)
    closed[gone] = 1.0
    weight.mul_(columns_view(module, (1 - closed).to(weight.device)))
    return torch.tensor(sorted(gone), dtype=torch.int64)


def _representative(channels: list[int], values: Tensor, units: Channels, representatives: set[tuple[str, int]]) -> int:
    """Choose the channel that stays: one that another reader has chosen already, else the largest constant."""
    smallest = _SMALLEST * float(values[channels].abs().max())
    known = [each for each in channels if units[each] in representatives and float(values[each].abs()) >= smallest]
    chosen = max(known or channels, key=lambda channel: float(values[channel].abs()))
    representatives.add(units[chosen])
    return chosen


def _constant_channels(module: nn.Module) -> Tensor | None:
    """Return which of a layer's output channels are its bias whatever it reads, bool; None if there are none."""
    norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm)
    known = norm or isinstance(module, nn.Linear) or hasattr(module, "kernel_size")
    written = written_channels(module) if known and module._parameters.get("weight") is not None else None
    return None if written is None or bool(written.all()) else ~written


def _independent(model: nn.Module, readers: Mapping[str, Any], example_inputs: ExampleInputs) -> dict[str, Tensor]:
    """Run a float64 model on NaN; return, by reader, which of its input channels are numbers nevertheless, bool."""
    unseen = {name: torch.zeros(input_channels(model.get_submodule(name)), dtype=torch.bool) for name in readers}
    found: dict[str, Tensor] = {}

    def put_constants(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        channels = _constant_channels(module)
        assert channels is not None
        own = module._parameters.get("bias")
        bias = torch.zeros_like(channels, dtype=output.dtype) if own is None else own.to(output.dtype)
        view = [1] * output.dim()
        view[channel_dimension(module)] = -1
        return torch.where(channels.view(view), bias.view(view), output)

    def forget(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.full_like(output, torch.nan)

    def read(name: str, module: nn.Module, inputs: Tensor) -> None:
        number = ~inputs.isnan().movedim(channel_dimension(module), 0).flatten(1).any(1).cpu()
        found[name] = found.get(name, number) & number

    hooks = []
    for name, module in model.named_modules():
        if _constant_channels(module) is not None:
            hooks.append(module.register_forward_hook(put_constants))
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            hooks.append(module.register_forward_hook(forget))
        if name in readers:
            hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: read(name, m, args[0])))
    run_in_float64(model, [tree_map(_nan_like, example_inputs)], hooks)
    return {**unseen, **found}


def _nan_like(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.full_like(value, torch.nan, dtype=torch.float64)
    return value
