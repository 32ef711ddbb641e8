"""Constant (input-independent) units: nothing comes into them, so they move into the biases of what reads them.

A unit whose incoming weights are all zero computes act(bias) whatever the input is, through a batch norm in eval mode
too. Adding what its readers make of that to their biases, and zeroing their weights for it, changes no output, and
leaves a unit that nobody reads (`find_dead_units` removes it). It may leave readers with nothing coming in, and so on.

A constant channel under zero padding is no constant: at the border the reader sees zeros. So it is moved into a
convolution's bias only if the constant is 0, or nothing is padded, or the padding repeats what is there (``replicate``,
``reflect``, ``circular``), and into a transposed convolution's only if its kernel, stride and groups are 1. Otherwise
the unit stays.

In exact arithmetic nothing changes; stored in float32, a bias with a constant in it is rounded. `precision.round_to`
remembers what it was, so that `verify_equivalence` can tell that rounding from a mistake.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gumbel_plugin.graph.channel_groups import ChannelGroup, ChannelSlice
from gumbel_plugin.layers.example_inputs import (
    ExampleInputs,
    call_model,
    inputs_on_device_of,
    observing,
    random_inputs_like,
)
from gumbel_plugin.layers.geometry import (
    channel_dimension,
    columns_view,
    groups_of,
    input_channels,
    is_depthwise,
    is_transposed,
    written_channels,
)
from gumbel_plugin.layers.own_forward import has_own_forward
from gumbel_plugin.layers.precision import computing_in
from gumbel_plugin.layers.weights import read_weight
from gumbel_plugin.shrinking.unread_units import unread_units

_ROUNDING = 1e-12  # what a constant may differ by between places, relative to it: kernels round differently at edges
_DRAWS = 2


@torch.no_grad()
def fold_constants(
    model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: ExampleInputs
) -> dict[str, Tensor]:
    """Move the constants of units that nothing comes into to the biases of their readers, to the end of the chain.

    Structure and numbers must agree: all rows that compute the unit are zero, and its channel was the same throughout
    in float64 on two random batches.

    Args:
        model: The masked model, changed in place; its outputs stay. Where something may be folded, all of it becomes
            float64 (`round_to` takes it back).
        groups: Its channel groups; only exact ones are considered.
        example_inputs: What to run it on.

    Returns:
        The units that were folded, by the group's name.
    """
    modules = dict(model.named_modules())
    uses = uses_of_parameters(modules)
    usable = [group for group in groups if _usable(group, modules, uses)]
    if not any(len(_constant_units(modules, group)) for group in usable):
        return {}
    model.double()
    constants = observe(model, {part.module for group in usable for part in group.consumers}, example_inputs)
    folded: dict[str, Tensor] = {}
    changed = True
    while changed:
        changed = False
        for group in usable:
            units = _constant_units(modules, group)
            for part in group.consumers:
                units = units[~torch.isin(units, _bound_units(part, modules[part.module], constants[part.module]))]
            if not len(units):
                continue
            for part in group.consumers:
                _fold(modules[part.module], part.positions[torch.isin(part.units, units)], constants[part.module])
            folded[group.name] = torch.cat([folded.get(group.name, units[:0]), units]).sort().values
            changed = True
    return folded


def uses_of_parameters(modules: Mapping[str, nn.Module]) -> Counter[int]:
    """Return by how many of these modules each parameter is owned, by the parameter's id."""
    return Counter(id(each) for module in modules.values() for each in module._parameters.values() if each is not None)


def _usable(group: ChannelGroup, modules: Mapping[str, nn.Module], uses: Mapping[int, int]) -> bool:
    """Whether all that computes and reads a group's channels is in plain sight: own weights of known layers."""
    weights = [modules[part.module]._parameters.get("weight") for part in (*group.producers, *group.consumers)]
    biases = [modules[part.module]._parameters.get("bias") for part in group.consumers]
    own = all(weight is not None for weight in weights)
    once = all(tensor is None or uses[id(tensor)] == 1 for tensor in (*weights, *biases))
    return group.safety == "exact" and not group.unlisted_weights and own and once


def _constant_units(modules: Mapping[str, nn.Module], group: ChannelGroup) -> Tensor:
    """Return the units that something reads, and whose rows are all zero, int64.

    Norms and depthwise convolutions do not count: they make a constant of a constant.
    """
    computed = torch.zeros(group.size, dtype=torch.bool)
    depends = computed.clone()
    for part in group.producers:
        module = modules[part.module]
        rows = written_channels(module)
        if rows is not None and read_weight(module).dim() > 1 and not is_depthwise(module):
            computed[part.units] = True
            depends[part.units[rows.cpu()[part.positions]]] = True
    units = torch.nonzero(computed & ~depends).flatten()
    return units[~torch.isin(units, unread_units(modules, group))]


class ReadValues:
    """What a layer reads, channel by channel: the values, and whether they are the same throughout."""

    def __init__(self, module: nn.Module) -> None:
        self.low = torch.full((input_channels(module),), torch.inf, dtype=torch.float64)
        self.high = -self.low

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Take in one input, as a forward pre-hook."""
        values = args[0].detach().movedim(channel_dimension(module), 0).flatten(1).double().cpu()
        self.low, self.high = torch.minimum(self.low, values.amin(1)), torch.maximum(self.high, values.amax(1))

    @property
    def values(self) -> Tensor:
        """The constants, float64, where `same`."""
        return (self.low + self.high) / 2

    @property
    def same(self) -> Tensor:
        """Which channels are constants, bool; none if the layer was not called."""
        largest = torch.maximum(self.low.abs(), self.high.abs())
        return (self.high - self.low <= _ROUNDING * largest) & largest.isfinite()


def observe(model: nn.Module, readers: set[str], example_inputs: ExampleInputs) -> dict[str, ReadValues]:
    """Run a float64 model on random batches and watch what some layers read."""
    found = {name: ReadValues(model.get_submodule(name)) for name in readers}
    generator = torch.Generator().manual_seed(0)
    hooks = [model.get_submodule(name).register_forward_pre_hook(seen.see) for name, seen in found.items()]
    run_in_float64(model, (random_inputs_like(example_inputs, generator, torch.float64) for _ in range(_DRAWS)), hooks)
    return found


def run_in_float64(model: nn.Module, batches: Iterable[ExampleInputs], hooks: Sequence[RemovableHandle]) -> None:
    """Run a float64 model in eval mode on some inputs, and then remove the hooks that watch it."""
    try:
        with observing(model), computing_in(torch.float64):
            for inputs in batches:
                call_model(model, inputs_on_device_of(model, inputs))
    finally:
        for hook in hooks:
            hook.remove()


def _bound_units(part: ChannelSlice, module: nn.Module, seen: ReadValues) -> Tensor:
    """Return the units that cannot be folded into this reader."""
    free = seen.same if _repeats_constants(module) else seen.same & (seen.values == 0)
    return part.units[~free[part.positions]]


def _repeats_constants(module: Any) -> bool:
    """Whether a constant channel adds the same everywhere in a layer's output."""
    if has_own_forward(module):  # it may pad, or change what it reads in another way; of zeros it makes zeros
        return False
    if channel_dimension(module) == -1:  # a linear layer
        return True
    kernel, padding = module.kernel_size, module.padding
    if is_transposed(module):
        pointwise = all(size == step == 1 for size, step in zip(kernel, module.stride, strict=True))
        return pointwise and not any(padding) and groups_of(module) == 1
    if padding == "same":
        padding = [step * (size - 1) for size, step in zip(kernel, module.dilation, strict=True)]
    return padding == "valid" or not any(padding) or bool(module.padding_mode != "zeros")


def _fold(module: nn.Module, channels: Tensor, seen: ReadValues) -> None:
    """Move some channels' constants into a float64 layer's bias."""
    weight, bias = read_weight(module), module._parameters["bias"]
    chosen = torch.zeros_like(seen.low).index_fill_(0, channels, 1.0)
    constants = torch.where(chosen > 0, seen.values, 0.0)
    products = weight * columns_view(module, constants.to(weight.device))
    weight.mul_(columns_view(module, (1 - chosen).to(weight.device)))
    if not bool(constants.any()):
        return
    added = (products.transpose(0, 1) if is_transposed(module) else products).flatten(1).sum(1)
    if bias is not None:
        bias.add_(added)
    else:
        module.bias = nn.Parameter(added, requires_grad=weight.requires_grad)
