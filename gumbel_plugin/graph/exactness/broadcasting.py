"""Channels that are broadcast over the channels of others: one map that scales all (attention gates, experts' weights).

Such a channel is not one of those that it meets. It cannot leave by itself, and they can without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gumbel_plugin.graph.exactness.channel_labels import ChannelLabels, varying


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor that meets others, element by element, and the labels that it carries (None: none)."""

    tensor: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Broadcast:
    """What was broadcast in one operation, so that the graph's node of it is found again.

    Attributes:
        operation: Its name, such as "aten::mul".
        shapes: Those of the floating tensors that met.
        spread: Which of them were broadcast over the channels of others.
    """

    operation: str
    shapes: tuple[tuple[int, ...], ...]
    spread: tuple[int, ...]


def spread_operands(operands: Sequence[Operand], labels: ChannelLabels) -> list[int]:
    """Return which operands' channels are broadcast over those of others."""
    return [
        place
        for place, operand in enumerate(operands)
        if operand.labels is not None and _is_spread(operand, operands, labels)
    ]


def _is_spread(operand: Operand, others: Sequence[Operand], labels: ChannelLabels) -> bool:
    """Whether an operand has one element where another has one for each of its channels."""
    along = {
        dim - other.labels.dim()
        for other in others
        if other is not operand and other.labels is not None
        for dim in varying(other.labels)
    }
    own = operand.labels
    assert own is not None
    if any(_is_single(operand.tensor, dim) for dim in along):
        return True
    return bool(along) and not varying(own) and labels.is_lone(own)  # repeated before they met


def _is_single(tensor: Tensor, dim: int) -> bool:
    """Whether a tensor has the same element everywhere along a dimension (counted from the end)."""
    return tensor.dim() < -dim or tensor.shape[dim] == 1 or tensor.stride(dim) == 0


def autograd_numbers(func: Any) -> tuple[int, ...]:
    """Return which numbers the autograd node of the operation may have that is running below autograd."""
    last = int(torch._C._autograd._get_sequence_nr()) - 1
    return (last, last - 1) if func._schema.is_mutable else (last,)  # in place, autograd may keep a copy first
