"""Gates that each sample has of its own: they multiply activations, where a decided gate would act on weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gumbel_plugin.errors import LifecycleError
from gumbel_plugin.layers.geometry import channel_dimension
from gumbel_plugin.layers.weights import Attached
from gumbel_plugin.masks.base import LearnedMask, Phase
from gumbel_plugin.masks.per_sample import PerSample
from gumbel_plugin.training.gated_layer import ColumnGates, GatedLayer


class SampleHooks(Attached):
    """Hooks by which masks gate each sample by itself: a layer's input channels, or a block's whole branch.

    A block's gate acts at the output of its branch's last layer in every phase, decided or not, so that the layer's
    bias is gated with its weight.
    """

    def __init__(self, gated: GatedLayer) -> None:
        self.gated = gated
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Start acting."""
        gated = self.gated
        if gated.columns is not None:
            self._handles.append(gated.module.register_forward_pre_hook(self._gate_input))
        if gated.block is not None:
            block = gated.block.module
            self._handles.append(block.register_forward_pre_hook(self._read_block, with_kwargs=True))
            self._handles.append(gated.module.register_forward_hook(self._gate_output))

    def detach(self) -> None:
        """Stop acting."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _gate_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.gated.follows_samples:
            return None
        if not args or not isinstance(args[0], Tensor):
            raise LifecycleError(f"{self.gated.name!r} must get its input as its first positional argument to be gated")
        assert self.gated.columns is not None
        return (gate_columns(self.gated.columns, args[0], module), *args[1:])

    def _read_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask, block = self.gated.mask, self.gated.block
        assert isinstance(mask, PerSample)
        assert block is not None
        if mask.follows_samples:
            inputs = args[0] if args else next(iter(kwargs.values()))
            mask.gates_of_samples(lambda: channel_means(inputs, block.channels_last), module)

    def _gate_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        mask = self.gated.mask
        assert isinstance(mask, PerSample)
        if mask.phase is Phase.OPEN and not mask.evaluated_per_sample:
            return output
        if not mask.follows_samples:
            return output * mask.gates().flatten().to(output.dtype)
        gates = mask.gates_of_samples(_unread, module)  # (samples, 1)
        return output * gates.to(output.dtype).reshape(-1, *(1,) * (output.dim() - 1))


def gate_columns(columns: ColumnGates, inputs: Tensor, layer: nn.Module) -> Tensor:
    """Return a layer's input, each sample's channels multiplied by its own gates.

    Args:
        columns: The gates of the layer's input channels.
        inputs: Of a convolution (samples, channels, ...), or of a linear layer (samples, ..., channels); without the
            samples' dimension it is one sample.
        layer: The layer.
    """
    dimension = channel_dimension(layer)
    last = dimension == -1
    batch = inputs if inputs.dim() > -dimension else inputs.unsqueeze(0)
    means = cache(lambda: channel_means(batch, last))
    gates, start = [], 0
    for mask in columns.masks:
        assert isinstance(mask, PerSample)
        places = (columns.index >= start) & (columns.index < start + mask.shape[0])
        gates.append(mask.gates_of_samples(_unit_means(means, places, columns.index[places] - start, mask), layer))
        start += mask.shape[0]
    one = gates[0].new_ones(len(batch), 1)
    factors = torch.cat([*gates, one], 1)[:, columns.index.to(inputs.device)].to(inputs.dtype)
    middle = (1,) * (batch.dim() - 2)
    factors = factors.reshape(len(batch), *middle, -1) if last else factors.reshape(len(batch), -1, *middle)
    return (batch * factors).reshape(inputs.shape)


def channel_means(inputs: Tensor, channels_last: bool) -> Tensor:
    """Return each sample's channels averaged over all positions, (samples, channels): the global average pool."""
    positions = inputs.transpose(1, -1) if channels_last else inputs
    return positions.flatten(2).mean(2) if positions.dim() > 2 else positions


def _unit_means(means: Callable[[], Tensor], places: Tensor, units: Tensor, mask: LearnedMask) -> Callable[[], Tensor]:
    """Return what computes each unit's mean over the channels at `places` that belong to it, (samples, units)."""

    def compute() -> Tensor:
        channels = means()
        index = units.to(channels.device)
        sums = channels.new_zeros(len(channels), mask.shape[0]).index_add(
            1, index, channels[:, places.to(index.device)]
        )
        counts = torch.bincount(index, minlength=mask.shape[0]).clamp_min(1)
        return sums / counts.to(sums.dtype)

    return compute


def _unread() -> Tensor:
    raise LifecycleError("a residual block's layers were called without the block: its gates read the block's input")
