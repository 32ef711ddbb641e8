"""What a mask covers: the granularity of its units inside one tensor, and channel groups that span several layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import Tensor

from gumbel_plugin.errors import ConfigError, nearest, shown

FULL = -1
"""A step that covers a whole dimension, as in NNI's granularity lists."""


@dataclass(frozen=True)
class Granularity:
    """How a tensor is cut into units, in NNI's terms (`nni.compression.utils.Scaling`).

    Attributes:
        steps: The size of a unit along the dimensions named; `FULL` spans the dimension.
        padding: Where dimensions that `steps` does not name are added.
        fill: The step of the added dimensions.
    """

    steps: tuple[int, ...]
    padding: Literal["front", "back"] = "front"
    fill: int = 1

    def unit_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the size of one unit in every dimension of a tensor of this shape.

        Raises:
            ConfigError: If the units do not tile the tensor.
        """
        missing = len(shape) - len(self.steps)
        if missing < 0:
            raise ConfigError(
                f"granularity {list(self.steps)} has {len(self.steps)} dimensions, the tensor {tuple(shape)} fewer"
            )
        added = (self.fill,) * missing
        steps = added + self.steps if self.padding == "front" else self.steps + added
        unit = tuple(size if step == FULL else step for step, size in zip(steps, shape, strict=True))
        if any(step < 1 or size % step for step, size in zip(unit, shape, strict=True)):
            raise ConfigError(
                f"granularity {list(self.steps)} does not tile a tensor of shape {tuple(shape)}: "
                "every step must be -1 or divide its dimension"
            )
        return unit

    def gate_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return how many units there are along every dimension of a tensor of this shape."""
        return tuple(size // step for size, step in zip(shape, self.unit_shape(shape), strict=True))

    def unit_size(self, shape: Sequence[int]) -> int:
        """Return how many elements one unit has."""
        return prod(self.unit_shape(shape))

    def spread(self, gates: Tensor, shape: Sequence[int]) -> Tensor:
        """Spread gates over a tensor's shape; the result broadcasts against it and is expanded only where it must be.

        Args:
            gates: One value a unit, of shape `gate_shape(shape)`.
            shape: The tensor's shape.
        """
        unit = self.unit_shape(shape)
        if all(step in (1, size) for step, size in zip(unit, shape, strict=True)):
            return gates
        # (n0, n1) with steps (s0, s1): view (n0, 1, n1, 1), expand to (n0, s0, n1, s1), read as (n0*s0, n1*s1).
        interleaved = [part for pair in zip(gates.shape, unit, strict=True) for part in pair]
        ones = [part for count in gates.shape for part in (count, 1)]
        return gates.reshape(ones).expand(interleaved).reshape(tuple(shape))

    def reduce(self, values: Tensor) -> Tensor:
        """Sum a tensor over each unit; the result has `gate_shape(values.shape)`."""
        unit = self.unit_shape(values.shape)
        interleaved = [part for size, step in zip(values.shape, unit, strict=True) for part in (size // step, step)]
        return values.reshape(interleaved).sum(dim=tuple(range(1, 2 * len(unit), 2)))


ELEMENT = Granularity((1,))
KERNEL = Granularity((1, 1), "back", FULL)
OUT_CHANNEL = Granularity((1,), "back", FULL)
IN_CHANNEL = Granularity((FULL, 1), "back", FULL)
WHOLE = Granularity((FULL,), "front", FULL)

_NAMED = {
    "element": ELEMENT,
    "kernel": KERNEL,
    "out_channel": OUT_CHANNEL,
    "in_channel": IN_CHANNEL,
    "default": OUT_CHANNEL,
}


def granularity_of(word: str | Sequence[int]) -> Granularity:
    """Return the granularity that a configuration names.

    Args:
        word: ``element``, ``kernel``, ``in_channel``, ``out_channel``, ``default`` (as NNI: out_channel), or a block's
            size along the last dimensions, for example ``[4, 4]`` (-1 spans a dimension).

    Raises:
        ConfigError: If the word is unknown, or a size is neither positive nor -1.
    """
    if not isinstance(word, str):
        if not word or any(step == 0 or step < FULL for step in word):
            raise ConfigError(
                f"granularity {shown(list(word))}: a block has at least one size, each positive or -1 (all)"
            )
        return Granularity(tuple(word))
    if word not in _NAMED:
        raise ConfigError(f"granularity {shown(word)} is unknown{nearest(word, _NAMED)} (or a list of block sizes)")
    return _NAMED[word]
