"""Empirical check: units are removed from a float64 copy of the model, which must return what it returned before.

The analysis knows what the forward does to channels, but not what its code takes for granted: a size written into a
reshape, a scale that depends on the number of channels.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.graph.exactness.channel_labels import Safety
from gumbel_plugin.layers.example_inputs import call_model, named_tensors, observing, random_inputs_like
from gumbel_plugin.layers.geometry import columns_view, input_channels, output_dimension, rows_view
from gumbel_plugin.layers.kept_tensors import forgetting_tensors, kept_tensors
from gumbel_plugin.layers.precision import computing_in

_TOLERANCE = 1e-10
"""The largest difference, relative to the largest output, that counts as rounding: float64 rounds at 1e-16."""


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
        copies: Makes a new float64 copy of the model to try on (see `double_copy`).
        example_inputs: They give the shapes of the inputs.
        groups: The groups to try.

    Returns:
        By name, the groups whose units cannot be removed exactly, marked.
    """
    if not groups:
        return {}
    try:
        duplicate = copies()
    except Exception as error:
        reason = f"the model cannot be copied to be checked: {type(error).__name__}: {error}"
        return {group.name: replace(group, safety="unsupported", reason=reason) for group in groups}
    safety, reason = _check(duplicate, example_inputs, groups)
    if safety == "exact":
        return {}
    if len(groups) == 1:
        return {groups[0].name: replace(groups[0], safety=safety, reason=reason)}
    halves = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    return {name: group for half in halves for name, group in check_empirically(copies, example_inputs, half).items()}


def double_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model in float64, tensors in plain attributes included, computed from others or not."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        kept = (tensor for _, tensor in kept_tensors(module))
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values(), *kept):
            if type(value) is OrderedDict and not value:
                memo[id(value)] = OrderedDict()  # the many tables of hooks, which are most of a small model's copy
            elif isinstance(value, Tensor) and value.is_floating_point() and id(value) not in memo:
                wide = torch.empty(value.shape, dtype=torch.float64, device=value.device).copy_(value.detach())
                memo[id(value)] = nn.Parameter(wide, value.requires_grad) if isinstance(value, nn.Parameter) else wide
    return copy.deepcopy(model, memo)


def _check(copy: Removable, example_inputs: Any, groups: Sequence[ChannelGroup]) -> tuple[Safety, str]:
    """Remove about half of the units of some groups; return how safe that is, and why it is not exact."""
    generator = torch.Generator().manual_seed(0)
    perturb(copy.model, generator)
    inputs = random_inputs_like(example_inputs, generator, torch.float64)
    seen: Counter[int] = Counter()
    units = {}
    for group in groups:
        units[group.name] = _odd_half(group.size, seen[group.size], generator)
        seen[group.size] += 1
    try:
        for group in groups:
            _close(copy.model, group, units[group.name])
    except Exception as error:
        return "unsupported", f"its channels are not where they are looked for: {error}"
    try:
        before = _run(copy.model, inputs)
    except Exception as error:
        return "unsupported", f"the model does not run in float64, in which it would be checked: {error}"
    try:
        copy.remove(units)
        after = _run(copy.model, inputs)
    except Exception as error:
        return "unsupported", f"the model does not run without some of its units: {error}"
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return "unsupported", "without some of its units the outputs have another form"
    if all(map(_equal_but_for_rounding, before, after)):
        return "exact", ""
    return "inexact", "something mixes these channels before they are read"


def _run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with forgetting_tensors(model), observing(model), computing_in(torch.float64), _DepthwiseByTaps():
        return [tensor for _, tensor in named_tensors(call_model(model, inputs))]


def _equal_but_for_rounding(before: Tensor, after: Tensor) -> bool:
    if not before.is_floating_point():
        return True  # the rounding of a comparison or an argmax may turn it over
    scale = before[before.isfinite()].abs().amax() if bool(before.isfinite().any()) else before.new_zeros(())
    return torch.allclose(before, after, rtol=0.0, atol=_TOLERANCE * float(scale), equal_nan=True)


class _DepthwiseByTaps(TorchFunctionMode):
    """Computes depthwise 2-d convolutions tap by tap: in float64 torch loops over channels, up to four times as slow.

    On large feature maps it does not matter, and with a stride it is the other way round.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d and len(args) == 7 and not kwargs and _is_slow(args[0], args[1], args[4], args[6]):
            with torch._C.DisableTorchFunction():  # other modes need not see every tap
                return _convolve_by_taps(*args[:6])
        return func(*args, **(kwargs or {}))


def _is_slow(x: Tensor, weight: Tensor, padding: Any, groups: int) -> bool:
    depthwise = x.dim() == 4 and groups == x.shape[1] == weight.shape[0] > 1 and x.shape[2:].numel() < 100**2
    return depthwise and not isinstance(padding, str) and x.dtype == torch.float64 and x.device.type == "cpu"


def _convolve_by_taps(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """Convolve every channel by itself: the sum over the kernel's taps of shifted inputs."""
    (up, left), steps, gaps = _pair(padding), _pair(stride), _pair(dilation)
    x = F.pad(x, (left, left, up, up))
    kernel = weight.shape[2:]
    sizes = [(x.shape[2 + d] - gaps[d] * (kernel[d] - 1) - 1) // steps[d] + 1 for d in (0, 1)]
    total = x.new_zeros(*x.shape[:2], *sizes) if bias is None else bias[:, None, None].repeat(len(x), 1, *sizes)
    for row, column in torch.cartesian_prod(*map(torch.arange, kernel)).tolist():
        starts = row * gaps[0], column * gaps[1]
        ranges = [slice(starts[d], starts[d] + (sizes[d] - 1) * steps[d] + 1, steps[d]) for d in (0, 1)]
        total.addcmul_(x[:, :, ranges[0], ranges[1]], weight[:, 0, row, column, None, None])
    return total


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def _odd_half(size: int, turn: int, generator: torch.Generator) -> Tensor:
    """Return about half of the units, at random.

    Their number has no factor in common with the size, so that units which really belong together in pairs or triples
    (the parts of a `chunk`) are torn apart. It changes with each turn, so that groups that must be of one size are not.
    """
    numbers = [number for number in range(1, size) if math.gcd(number, size) == 1]
    nearest = sorted(numbers, key=lambda number: abs(number - size / 2))[:3]
    return torch.randperm(size, generator=generator)[: nearest[turn % len(nearest)]]


@torch.no_grad()
def perturb(model: nn.Module, generator: torch.Generator) -> None:
    """Add noise to every parameter: one that starts at zero or is constant would hide what it multiplies."""
    block = torch.randn(10007, generator=generator)  # drawing as many numbers as there are weights would take seconds
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() > 0:
            scale = 0.3 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            noise, flat = block.to(parameter), parameter.view(-1)
            whole = len(flat) // len(noise) * len(noise)
            flat[:whole].view(-1, len(noise)).add_(noise, alpha=scale)
            flat[whole:].add_(noise[: len(flat) - whole], alpha=scale)


@torch.no_grad()
def _close(model: nn.Module, group: ChannelGroup, units: Tensor) -> None:
    """Zero what the consumers read of these units, and scale the units up, so that leaks show."""
    closed = torch.zeros(group.size, dtype=torch.bool).index_fill(0, units, True)
    for part in (*group.producers, *group.consumers):
        module = model.get_submodule(part.module)
        weight, chosen = module.weight, part.positions[closed[part.units]]
        assert isinstance(weight, Tensor)
        if part in group.consumers:
            factors = torch.ones(input_channels(module)).index_fill(0, chosen, 0.0)
            weight.mul_(columns_view(module, factors).to(weight))
        else:
            dimension = output_dimension(module)
            assert dimension is not None
            factors = torch.ones(weight.shape[dimension]).index_fill(0, chosen, 4.0)
            weight.mul_(rows_view(module, factors).to(weight))
