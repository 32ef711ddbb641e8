"""What was removed from a network, in the numbering before: the one record that all else is derived from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.layers.geometry import groups_of, input_dimension, output_dimension
from gumbel_plugin.storage.mask_format import Masks

Kept = Mapping[str, tuple[Tensor | None, ...]]
"""By tensor name, for every dimension: the indices that stayed, int64, ascending; None where all did."""

_ATTRIBUTE = "_gumbel_removed"


class Record:
    """What left a network since the record began, read off its parameters (see `optimizer_state.tracked`).

    Attributes:
        kept: What is left of each parameter that lost something.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        """Begin with a network of which this record knows no removal.

        Args:
            model: The network.
            groups: The groups whose units may leave.
        """
        self.kept: Kept = {}
        self._before = kept_of(model)
        self._groups = list(groups)
        self._shapes = {part.module: _row_shapes(model, part.module) for g in groups for part in g.producers}

    def add(self, model: nn.Module, kept: Kept) -> None:
        """Note what another removal kept of each parameter, here and on the network itself."""
        self.kept = kept_after(self.kept, kept)
        note_kept(model, kept_after(self._before, self.kept))

    def masks(self, model: nn.Module) -> Masks:
        """Return NNI's masks on the shapes at the beginning: 0 where a producer's row has left.

        Args:
            model: The network as it is now.
        """
        masks: Masks = {}
        for name, shapes in self._shapes.items():
            module: Any = model.get_submodule(name)
            device = module.weight.device
            masks[name] = {target: torch.ones(shape, device=device) for target, shape in shapes.items()}
        for group in self._groups:
            left = units_left(model, group, self.kept)
            for part in group.producers:
                rows = part.positions[~left[part.units]]
                dim = output_dimension(model.get_submodule(part.module)) or 0
                for target, mask in masks[part.module].items():
                    mask.index_fill_(dim if target == "weight" else 0, rows.to(mask.device), 0.0)
        return masks


def _row_shapes(model: nn.Module, name: str) -> dict[str, torch.Size]:
    tensors = {target: getattr(model.get_submodule(name), target, None) for target in ("weight", "bias")}
    return {target: tensor.shape for target, tensor in tensors.items() if isinstance(tensor, Tensor)}


def units_left(model: nn.Module, group: ChannelGroup, kept: Kept) -> Tensor:
    """Return which units of a group a removal left in a network, bool, (group.size,).

    Args:
        model: The network; whether before or after the removal does not matter.
        group: The group as it was before.
        kept: What the removal kept.
    """
    left = torch.ones(group.size, dtype=torch.bool)
    for part in (*group.producers, *group.consumers):
        module = model.get_submodule(part.module)
        dims = kept.get(f"{part.module}.weight")
        if part not in group.consumers:
            dim = output_dimension(module)
        else:  # of a grouped convolution no one dimension runs over the input channels
            dim = input_dimension(module) if groups_of(module) == 1 else None
        stayed = None if dims is None or dim is None else dims[dim]
        if stayed is not None:
            left[part.units] = torch.isin(part.positions, stayed)
    return left


# On networks ----------------------------------------------------------------------------------------------------------


def kept_of(model: nn.Module) -> Kept:
    """Return what a small network kept of the dense one; nothing where that was not noted."""
    kept: Kept = _noted(model).get("kept", {})
    return kept


def note_kept(small: nn.Module, kept: Kept) -> None:
    """Note on a small network what it kept; copies of it know it too."""
    small.__dict__[_ATTRIBUTE] = {**_noted(small), "kept": dict(kept)}


def removed_blocks(model: nn.Module) -> tuple[str, ...]:
    """Return which residual blocks of the dense network a small one has lost; none where that was not noted."""
    blocks: tuple[str, ...] = _noted(model).get("blocks", ())
    return blocks


def note_removed(small: nn.Module, blocks: Sequence[str]) -> None:
    """Note on a small network which residual blocks have left; copies of it know it too."""
    small.__dict__[_ATTRIBUTE] = {**_noted(small), "blocks": tuple(blocks)}


def _noted(model: nn.Module) -> dict[str, Any]:
    """Return what is noted on a network: plain types, so that a pickled network needs nothing of this package."""
    noted: dict[str, Any] = model.__dict__.get(_ATTRIBUTE, {})
    return noted


# Kept indices ---------------------------------------------------------------------------------------------------------


def kept_after(first: Kept, then: Kept) -> Kept:
    """Return what two removals, one after the other, kept of the network before both."""
    both = dict(first)
    for name, dims in then.items():
        before = first.get(name, (None,) * len(dims))
        both[name] = tuple(
            old if new is None else new if old is None else old[new] for old, new in zip(before, dims, strict=True)
        )
    return both


@torch.no_grad()
def find_kept(dense: nn.Module, remove: Callable[[nn.Module], None]) -> Kept:
    """Find out which entries of parameters and buffers survive a removal, whatever cuts them.

    Every entry of a copy is given its own number, the removal is done to the copy, and what is left is read.

    Args:
        dense: The network before.
        remove: Removes channels from a copy of it, in place.
    """
    numbered = copy.deepcopy(dense)
    shapes = {}
    for name, tensor in [*numbered.named_parameters(), *numbered.named_buffers()]:
        if tensor.is_floating_point():
            shapes[name] = tuple(tensor.shape)
            numbers = torch.arange(tensor.numel(), dtype=torch.float64)  # whole to 2^53
            tensor.data = numbers.reshape(tensor.shape)
    remove(numbered)
    left = dict([*numbered.named_parameters(), *numbered.named_buffers()])
    kept = {}
    for name, shape in shapes.items():
        if name in left and left[name].dtype == torch.float64 and tuple(left[name].shape) != shape:
            dimensions = indices_left(left[name].long(), shape)
            if dimensions is not None:
                kept[name] = dimensions
    return kept


def indices_left(numbers: Tensor, shape: Sequence[int]) -> tuple[Tensor | None, ...] | None:
    """Return the indices that stayed along each dimension.

    Args:
        numbers: The places in the flattened tensor before of what is left, whole numbers, in the shape that is left.
        shape: The tensor's shape before.

    Returns:
        For each dimension the indices, None where all stayed; None for all if what is left is no grid.
    """
    if numbers.dim() != len(shape) or numbers.numel() == 0:
        return None
    found: list[Tensor | None] = []
    grid, stride = torch.zeros_like(numbers[(slice(0, 1),) * len(shape)]), 1
    for dim in reversed(range(len(shape))):
        line = numbers[tuple(slice(None) if d == dim else slice(0, 1) for d in range(len(shape)))]
        indices = line // stride % shape[dim]
        grid = grid + indices * stride
        stride *= shape[dim]
        found.insert(0, None if indices.numel() == shape[dim] else indices.flatten().long().cpu())
    return tuple(found) if torch.equal(grid, numbers) else None
