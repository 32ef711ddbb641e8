"""Which channels of a layer are one unit: those that the forward ties, and those that coupled parts lose together."""

from __future__ import annotations

import torch
from torch import Tensor


def number_units(parts: int, labels: Tensor) -> Tensor:
    """Return the unit of each of a layer's output channels.

    Ghost modules join channels with others that are computed from them (i with i + n): what is added to them must lose
    both at once. Grouped layers lose the same members of every part.

    Args:
        parts: Into how many equal parts the channels fall that lose the same members.
        labels: The root label of each channel, int64; channels of one label leave together.

    Returns:
        Unit numbers from 0 on, without gaps, ascending with each unit's first channel, int64.
    """
    members = torch.arange(len(labels)) % (len(labels) // parts)
    classes = torch.unique(labels, return_inverse=True)[1]
    units = members
    while True:  # the smallest number goes around until nothing changes
        lowest = torch.full_like(members, len(labels))
        spread = lowest.scatter_reduce(0, classes, units, "amin")[classes]
        spread = lowest.scatter_reduce(0, members, spread, "amin")[members]
        if torch.equal(spread, units):
            numbers: Tensor = torch.unique(units, return_inverse=True)[1]
            return numbers
        units = spread
