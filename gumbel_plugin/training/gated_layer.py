"""Where gates act: on one layer's weight, or equivalently on its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gumbel_plugin.graph.channel_groups import ChannelSlice
from gumbel_plugin.graph.residual_blocks import ResidualBlock
from gumbel_plugin.layers.geometry import channel_dimension, columns_view, input_channels
from gumbel_plugin.layers.weights import Attached, read_bias, read_weight, unhide_weight, write_weight
from gumbel_plugin.masks.base import LearnedMask, Phase
from gumbel_plugin.masks.per_sample import PerSample
from gumbel_plugin.training.rescale import Rescale, dynamic_scale

# Layers whose weights the parent's forward reads instead of calling them, by the parent's class; torch's fused kernels
# and their fallbacks both get the weight from the layer's attribute.
_READ_BY_PARENT = {
    "MultiheadAttention": ("out_proj",),
    "TransformerEncoderLayer": ("linear1", "linear2"),  # in eval mode
    "ShiftedWindowAttention": ("qkv", "proj"),  # torchvision's
    "CompactWindowAttention": ("qkv",),
}


def reader_of(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    """Return the module whose forward reads a layer's weight: the layer itself, or a parent that never calls it.

    Args:
        modules: All modules of the model by name, the model itself as ``""``.
        name: The layer's name.
    """
    parent, _, child = name.rpartition(".")
    kinds = {kind.__name__ for kind in type(modules[parent]).__mro__}
    read = any(kind in kinds and child in children for kind, children in _READ_BY_PARENT.items())
    return modules[parent] if read else modules[name]


@dataclass(eq=False)
class ColumnGates:
    """The gates of one layer's input channels, fed by one or several channel groups (a concatenation has several)."""

    masks: Sequence[LearnedMask]
    index: Tensor
    """For every input channel, its place in the concatenated gates of `masks`; the last place is an open gate."""

    @classmethod
    def join(cls, module: nn.Module, feeds: Sequence[tuple[LearnedMask, ChannelSlice]]) -> ColumnGates:
        """Join the groups that feed a layer.

        Args:
            module: The layer.
            feeds: Each group's mask, and which of the layer's input channels it feeds.
        """
        masks = [mask for mask, _ in feeds]
        offsets = [0]
        for mask in masks:
            offsets.append(offsets[-1] + mask.shape[0])
        index = torch.full((input_channels(module),), offsets[-1])
        for (_, part), offset in zip(feeds, offsets, strict=False):
            index[part.positions] = part.units + offset
        return cls(masks, index)

    def vector(self) -> Tensor:
        """Return one gate per input channel, shape (in_channels,)."""
        gates = [mask.gates() for mask in self.masks]
        if self._in_order:
            return gates[0]
        one = torch.ones(1, device=gates[0].device, dtype=gates[0].dtype)
        return torch.cat([*gates, one])[self.index.to(gates[0].device)]

    @cached_property
    def _in_order(self) -> bool:
        """Whether the channels are one mask's gates as they come, so that nothing needs to be gathered."""
        return len(self.masks) == 1 and torch.equal(self.index.cpu(), torch.arange(self.masks[0].shape[0]))


@dataclass(eq=False)
class GatedLayer:
    """One layer's weight and everything that multiplies it.

    Attributes:
        name: The layer's name.
        module: The layer.
        mask: The mask over this weight's own units, if any.
        columns: The gates of the layer's input channels, if any.
        scale: The learned scalar of smart rescale, if any.
        rescale: Which rescale applies.
        folded: Whether mask and scale are in the parameter already, so that the scale must not act again.
        reader: Whose forward reads the weight (see `reader_of`), by default the layer's own.
        block: The residual block that the mask opens and closes, if the layer is the last one of its branch.
    """

    name: str
    module: nn.Module
    mask: LearnedMask | None = None
    columns: ColumnGates | None = None
    scale: nn.Parameter | None = None
    rescale: Rescale = "none"
    folded: bool = False
    reader: nn.Module | None = None
    block: ResidualBlock | None = None

    @property
    def weight(self) -> Tensor:
        """The weight parameter, also while the gated weight of a forward hides it (see `GatedLayerHooks`)."""
        return read_weight(self.module)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias parameter, if it has one."""
        return read_bias(self.module)

    @property
    def read_by_parent(self) -> bool:
        """Whether another module's forward reads the weight, so that the layer itself is never called."""
        return self.reader is not None and self.reader is not self.module

    @property
    def masks(self) -> list[LearnedMask]:
        """All masks that act here."""
        return [*([self.mask] if self.mask else ()), *(self.columns.masks if self.columns else ())]

    @property
    def phases(self) -> set[Phase]:
        """The phases of all masks that act here."""
        return {mask.phase for mask in self.masks}

    @property
    def acts(self) -> bool:
        """Whether there is anything to do to the weight now, or open gates to watch."""
        return self.phases != {Phase.OPEN} or any(mask.is_probed for mask in self.masks)

    @property
    def follows_samples(self) -> bool:
        """Whether each sample has gates of its own now, which act on activations (see `SampleHooks`)."""
        return any(isinstance(mask, PerSample) and mask.follows_samples for mask in self.masks)

    def unhide(self) -> None:
        """Let the layer have its own weight again, if the gated one of a forward hides it (see `GatedLayerHooks`).

        torch calls the hook that does so whatever exception ends a forward, but for those that are no `Exception`, such
        as Ctrl-C: what such a forward leaves goes before the next one, and before anything is written.
        """
        unhide_weight(self.module)

    def multiplier(self, weight: Tensor) -> Tensor:
        """Return the product of all gates here, in a shape that broadcasts against the weight."""
        product = torch.ones((1,) * weight.dim(), device=weight.device)
        if self.mask is not None:
            product = product * self.mask.spread(self.mask.gates(weight), weight)
        if self.columns is not None:
            product = product * columns_view(self.module, self.columns.vector())
        return product.to(weight.dtype)

    def apply(self, weight: Tensor) -> Tensor:
        """Return the weight as the layer sees it now: gated, and rescaled."""
        if not self.acts or self.follows_samples:
            return weight
        if self.phases == {Phase.OPEN}:
            return weight * self.multiplier(weight)
        if self.rescale == "dynamic" and not self.folded:
            gates = self.multiplier(weight)
            return weight * gates * dynamic_scale(gates, weight)
        if self.mask is not None:
            weight = self.mask.mask_weight(weight)
        if self.columns is not None:
            columns = columns_view(self.module, self.columns.vector()).to(weight.dtype)
            one_row = columns.shape[0] == 1  # not so in a grouped or transposed convolution
            weight = scale_channels(weight, columns.flatten(), weight.dim() - 2) if one_row else weight * columns
        if self.scale is not None and not self.folded:
            weight = weight * self.scale
        return weight

    def apply_to_input(self, inputs: Tensor) -> Tensor:
        """Return the layer's input with closed channels zeroed: the same as masking the weight's columns."""
        assert self.columns is not None
        gates = self.columns.vector().to(inputs.dtype)
        return scale_channels(inputs, gates, -1 - channel_dimension(self.module))

    @torch.no_grad()
    def fold(self) -> None:
        """Write gates and scale into the parameter; what was closed is exactly zero afterwards.

        With 0/1 gates s·(w·m) and (s·w)·m are the same floating-point numbers, so nothing changes but the storage.
        """
        self.unhide()
        write_weight(self.module, self.apply(self.weight))
        if self.block is not None and self.mask is not None and self.bias is not None:
            self.bias.mul_(self.mask.hard.all())
        self.folded = True


class GatedLayerHooks(Attached):
    """Hooks that let a gated layer act in a plain model, without touching its parameters, names or state dict."""

    def __init__(self, gated: GatedLayer) -> None:
        self.gated = gated
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Start acting in the forward that reads the weight."""
        reader = self.gated.module if self.gated.reader is None else self.gated.reader
        self._handles = [
            reader.register_forward_pre_hook(self._before),
            reader.register_forward_hook(self._after, always_call=True),
        ]

    def detach(self) -> None:
        """Stop acting."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.gated.unhide()

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        gated = self.gated
        gated.unhide()
        if gated.follows_samples:
            return None
        weight = gated.weight
        only_columns = gated.mask is None and gated.rescale == "none" and gated.columns is not None
        # Masking the input is the same function; it is cheaper where the input is the smaller tensor of the two.
        if only_columns and module is gated.module and args and _smaller(args[0], weight):
            return (gated.apply_to_input(args[0]), *args[1:]) if gated.acts else None
        # An instance attribute hides the parameter of the same name for the length of this forward.
        gated.module.__dict__["weight"] = gated.apply(weight)
        return None

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.gated.unhide()


def scale_channels(tensor: Tensor, factors: Tensor, spatial: int) -> Tensor:
    """Multiply every channel by its factor.

    Args:
        tensor: Shape (..., channels, *spatial dimensions).
        factors: Shape (channels,).
        spatial: How many dimensions follow the channels.
    """
    if spatial and tensor.is_contiguous():
        # One long row a sample: torch's kernels are several times slower where the innermost dimension is short.
        row = factors.unsqueeze(-1).expand(-1, tensor.shape[-spatial:].numel()).flatten()
        return (tensor.flatten(-1 - spatial) * row).view(tensor.shape)
    return tensor * factors.reshape(-1, *(1,) * spatial)


def _smaller(inputs: Any, weight: Tensor) -> bool:
    return isinstance(inputs, Tensor) and not inputs.is_nested and inputs.numel() < weight.numel()
