"""Which gates stay when a fraction of them has to go."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def count_to_prune(count: int, ratio: float) -> int:
    """Return ⌊count·ratio⌋, immune to the rounding of the ratio (0.29·100 is 29, not 28)."""
    return math.floor(count * ratio + 1e-9 * count)


def removed_count(count: int, ratio: float) -> int:
    """Return how many of a layer's gates go: ⌊count·ratio⌋, but the last one stays."""
    return min(count_to_prune(count, ratio), count - 1)


def keep_highest(scores: Tensor, ratio: float) -> Tensor:
    """Return which gates stay, bool, of the scores' shape: the lowest go; of equal ones, the first go.

    The gates are the same ones that a budget's final cut keeps, found without sorting.

    Args:
        scores: One score a gate, any shape.
        ratio: The fraction to remove.
    """
    gone = removed_count(scores.numel(), ratio)
    if gone == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.detach().flatten()
    edge = flat.kthvalue(gone).values
    keep = flat > edge
    equal = torch.nonzero(flat == edge).flatten()
    keep[equal[gone - int((flat < edge).sum()) :]] = True
    return keep.view(scores.shape)


def cut_point(values: Tensor, ratio: float) -> Tensor:
    """Return the quantile at which a fraction of the values lies below, a scalar tensor.

    It is half-way between the largest value that goes and the smallest that stays, so that the number of values above
    it is exactly what the budget keeps; -inf if none goes.
    """
    gone = removed_count(values.numel(), ratio)
    flat = values.detach().flatten()
    if gone == 0:
        return flat.new_tensor(-math.inf)
    return (flat.kthvalue(gone).values + flat.kthvalue(gone + 1).values) / 2
