"""Which entries of the dense network's tensors a small network kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor, nn

Kept = Mapping[str, tuple[Tensor | None, ...]]
"""By tensor name, for every dimension: the indices that stayed, int64, ascending; None where all did."""

_ATTRIBUTE = "_gumbel_kept"


def kept_of(model: nn.Module) -> Kept:
    """Return what a small network kept of the dense one; nothing where that was not noted."""
    kept: Kept = model.__dict__.get(_ATTRIBUTE, {})
    return kept


def note_kept(small: nn.Module, kept: Kept) -> None:
    """Note on a small network what it kept; copies of it know it too."""
    small.__dict__[_ATTRIBUTE] = dict(kept)


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
    """Find out which entries survive a removal, whatever cuts them.

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
            dimensions = indices_left(left[name], shape)
            if dimensions is not None:
                kept[name] = dimensions
    return kept


def indices_left(numbers: Tensor, shape: tuple[int, ...]) -> tuple[Tensor | None, ...] | None:
    """Return the indices that stayed along each dimension.

    Args:
        numbers: The places, in the flattened tensor before, of the elements that are left.
        shape: The tensor's shape before.

    Returns:
        For each dimension the indices, None where all stayed; None for all if what is left is no grid.
    """
    places = torch.unravel_index(numbers.flatten().long(), shape)
    found = [torch.unique(place) for place in places]
    if prod(len(indices) for indices in found) != numbers.numel():
        return None
    return tuple(None if len(i) == size else i for i, size in zip(found, shape, strict=True))
