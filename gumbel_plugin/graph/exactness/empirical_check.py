"""A check: units are removed from a copy of the model, which must run and return what it returned before.

The analysis knows what the forward does to channels, but not what its code takes for granted: a size written into a
reshape, a scale that depends on the number of channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.graph.exactness.channel_labels import Safety
from gumbel_plugin.layers.example_inputs import call_model, named_tensors, observing, random_inputs_like
from gumbel_plugin.layers.geometry import columns_view, input_channels, output_dimension, rows_view


class Removable(Protocol):
    """A model of which units can be removed."""

    model: nn.Module

    def remove(self, units: Mapping[str, Tensor]) -> None:
        """Remove units of groups, by name."""


def check_empirically(
    copies: Callable[[], Removable], example_inputs: Any, groups: Sequence[ChannelGroup]
) -> dict[str, ChannelGroup]:
    """Try groups together, and where that fails half of them at a time.

    Args:
        copies: Makes a new copy of the model to try on.
        example_inputs: They give the shapes of the inputs.
        groups: The groups to try.

    Returns:
        By name, the groups whose units cannot be removed exactly, marked.
    """
    safety, reason = _check(copies(), example_inputs, groups) if groups else ("exact", "")
    if safety == "exact":
        return {}
    if len(groups) == 1:
        return {groups[0].name: replace(groups[0], safety=safety, reason=reason)}
    halves = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    return {name: group for half in halves for name, group in check_empirically(copies, example_inputs, half).items()}


def _check(copy: Removable, example_inputs: Any, groups: Sequence[ChannelGroup]) -> tuple[Safety, str]:
    """Remove about half of the units of some groups; return how safe that is, and why it is not exact."""
    generator = torch.Generator().manual_seed(0)
    _shake(copy.model, generator)
    inputs = random_inputs_like(example_inputs, generator)
    closed = {group.name: _odd_half(group.size, generator) for group in groups}
    for group in groups:
        _close(copy.model, group, closed[group.name])
    before = _run(copy.model, inputs)
    try:
        copy.remove(closed)
        after = _run(copy.model, inputs)
    except Exception as error:
        return "unsupported", f"the model does not run without some of its units: {error}"
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return "unsupported", "without some of its units the outputs have another form"
    if all(map(_alike, before, after)):
        return "exact", ""
    return "inexact", "something mixes these channels before they are read"


def _run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with observing(model):
        return [tensor for _, tensor in named_tensors(call_model(model, inputs))]


def _alike(before: Tensor, after: Tensor) -> bool:
    """Whether two outputs differ by no more than rounding explains; a fault in structure makes a large difference."""
    if not before.is_floating_point():
        return True  # the rounding of a comparison or an argmax may turn it over
    tolerance = torch.finfo(before.dtype).eps ** 0.5
    scale = before[before.isfinite()].abs().amax() if bool(before.isfinite().any()) else before.new_zeros(())
    return torch.allclose(before, after, rtol=0.0, atol=tolerance * float(scale), equal_nan=True)


def _odd_half(size: int, generator: torch.Generator) -> Tensor:
    """Return about half of the units, at random.

    Their number has no factor in common with the size, so that units which really belong together in pairs or triples
    (the parts of a `chunk`) are torn apart.
    """
    numbers = [number for number in range(1, size) if math.gcd(number, size) == 1]
    return torch.randperm(size, generator=generator)[: min(numbers, key=lambda number: abs(number - size / 2))]


@torch.no_grad()
def _shake(model: nn.Module, generator: torch.Generator) -> None:
    """Add noise to every parameter: one that starts at zero or is constant would hide what it multiplies."""
    block = torch.randn(10007, generator=generator)  # drawing as many numbers as there are weights would take seconds
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() > 0:
            scale = 0.3 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            noise = block.to(parameter).repeat(parameter.numel() // len(block) + 1)[: parameter.numel()]
            parameter.add_(noise.reshape(parameter.shape), alpha=scale)


@torch.no_grad()
def _close(model: nn.Module, group: ChannelGroup, units: Tensor) -> None:
    """Zero what the consumers read of these units, and make the units themselves loud: nobody else should hear."""
    for part in (*group.producers, *group.consumers):
        module = model.get_submodule(part.module)
        weight, chosen = module.weight, part.positions[torch.isin(part.units, units)]
        assert isinstance(weight, Tensor)
        if part in group.consumers:
            factors = torch.ones(input_channels(module)).index_fill(0, chosen, 0.0)
            weight.mul_(columns_view(module, factors).to(weight))
        else:
            dimension = output_dimension(module)
            assert dimension is not None
            factors = torch.ones(weight.shape[dimension]).index_fill(0, chosen, 4.0)
            weight.mul_(rows_view(module, factors).to(weight))
