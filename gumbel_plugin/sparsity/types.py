"""Sparsity types: which elements of a weight share a gate, and which gates stay when a fraction of them has to go."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from typing_extensions import override

from gumbel_plugin.errors import ConfigError, nearest, shown
from gumbel_plugin.sparsity.ranking import keep_highest

FULL = -1
"""A step that covers a whole dimension, as in NNI's granularity lists."""


@dataclass(frozen=True)
class SparsityType:
    """How gates spread over a weight: one for every element, unless a type says otherwise."""

    @property
    def density(self) -> float | None:
        """The fraction of the gates that always stays; None where a ratio decides."""
        return None

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the gates of a weight of this shape.

        Raises:
            ConfigError: If the type does not fit such a weight.
        """
        return tuple(shape)

    def unit_size(self, shape: Sequence[int]) -> int:
        """Return how many elements of a weight of this shape one gate opens and closes."""
        return prod(shape) // prod(self.latent_shape(shape))

    def expand(self, gates: Tensor, shape: Sequence[int]) -> Tensor:
        """Expand gates to a mask that broadcasts against a weight of this shape, copied only where it must be.

        Args:
            gates: One value a unit, of shape `latent_shape(shape)`.
            shape: The weight's shape.
        """
        return gates

    def reduce(self, values: Tensor) -> Tensor:
        """Sum values of a weight's shape over each unit; the result has `latent_shape(values.shape)`."""
        return values

    def project(self, scores: Tensor, ratio: float) -> Tensor:
        """Return which gates stay, bool, when this fraction of them goes: the highest, but at least one.

        Args:
            scores: One score a gate; of equal ones the first go.
            ratio: The fraction to remove; a type that has a `density` of its own keeps to that.
        """
        return keep_highest(scores, ratio)


@dataclass(frozen=True)
class Unstructured(SparsityType):
    """A gate for every weight."""


@dataclass(frozen=True)
class Channel(SparsityType):
    """A gate for every channel, across all layers that compute or read it; it has no weight of its own."""


@dataclass(frozen=True)
class NofM(Unstructured):
    """A gate for every weight, of which n of every m consecutive ones along the input dimension stay, as in 2:4.

    Attributes:
        n: How many stay.
        m: Of how many.
        dimension: The dimension of the weight that runs over the layer's inputs.
    """

    n: int
    m: int
    dimension: int = 1

    @property
    @override
    def density(self) -> float:
        return self.n / self.m

    @override
    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        size = shape[self.dimension] if self.dimension < len(shape) else 1
        if size % self.m:
            fitting = [m for m in range(self.n + 1, size + 1) if size % m == 0]
            best = min(fitting, key=lambda m: abs(m - self.m), default=None)
            advice = "exclude the layer" if best is None else f"the nearest m is {best} ('{self.n}:{best}')"
            raise ConfigError(
                f"granularity '{self.n}:{self.m}' does not fit a weight of shape {tuple(shape)}: m must divide its "
                f"input dimension, which is {size}; {advice}"
            )
        return tuple(shape)

    @override
    def project(self, scores: Tensor, ratio: float) -> Tensor:
        rows = scores.detach().movedim(self.dimension, -1)
        groups = rows.reshape(*rows.shape[:-1], -1, self.m)
        lowest = groups.argsort(dim=-1, stable=True)[..., : self.m - self.n]
        keep = torch.ones_like(groups, dtype=torch.bool).scatter(-1, lowest, False)
        return keep.flatten(-2).movedim(-1, self.dimension)


@dataclass(frozen=True)
class Block(SparsityType):
    """A gate for every block of a weight, in NNI's terms (`nni.compression.utils.Scaling`).

    Attributes:
        steps: The size of a block along the last dimensions, one along the others; `FULL` spans the dimension.
        leading: Whether `steps` are those of the first dimensions instead, and the others are spanned.
    """

    steps: tuple[int, ...]
    leading: bool = False

    @override
    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        missing = len(shape) - len(self.steps)
        if missing < 0:
            raise ConfigError(
                f"granularity {list(self.steps)} has {len(self.steps)} dimensions, the tensor {tuple(shape)} fewer"
            )
        steps = self.steps + (FULL,) * missing if self.leading else (1,) * missing + self.steps
        block = tuple(size if step == FULL else step for step, size in zip(steps, shape, strict=True))
        if any(step < 1 or size % step for step, size in zip(block, shape, strict=True)):
            raise ConfigError(
                f"granularity {list(self.steps)} does not tile a tensor of shape {tuple(shape)}: "
                "every step must be -1 or divide its dimension"
            )
        return tuple(size // step for size, step in zip(shape, block, strict=True))

    @override
    def expand(self, gates: Tensor, shape: Sequence[int]) -> Tensor:
        counts = self.latent_shape(shape)
        if all(count in (1, size) for count, size in zip(counts, shape, strict=True)):
            return gates
        # (n0, n1) with steps (s0, s1): view (n0, 1, n1, 1), expand to (n0, s0, n1, s1), read as (n0*s0, n1*s1).
        ones = [part for count in counts for part in (count, 1)]
        return gates.reshape(ones).expand(self._interleaved(shape)).reshape(tuple(shape))

    @override
    def reduce(self, values: Tensor) -> Tensor:
        return values.reshape(self._interleaved(values.shape)).sum(dim=tuple(range(1, 2 * values.dim(), 2)))

    def _interleaved(self, shape: Sequence[int]) -> list[int]:
        counts = self.latent_shape(shape)
        return [part for count, size in zip(counts, shape, strict=True) for part in (count, size // count)]


ELEMENT = Unstructured()
CHANNEL = Channel()
KERNEL = Block((1, 1), leading=True)
OUT_CHANNEL = Block((1,), leading=True)
IN_CHANNEL = Block((FULL, 1), leading=True)
WHOLE = Block((FULL,), leading=True)

_NAMED: dict[str, SparsityType] = {
    "element": ELEMENT,
    "kernel": KERNEL,
    "out_channel": OUT_CHANNEL,
    "in_channel": IN_CHANNEL,
    "default": OUT_CHANNEL,
}


def granularity_of(word: str | Sequence[int], input_dimension: int = 1) -> SparsityType:
    """Return the sparsity type that a configuration names, inside of one weight.

    Args:
        word: ``element``, ``kernel``, ``in_channel``, ``out_channel``, ``default`` (as NNI: out_channel), ``n:m`` as in
            ``2:4``, or a block's size along the last dimensions, for example ``[4, 4]`` (-1 spans a dimension).
        input_dimension: The dimension of the weight that runs over the layer's inputs.

    Raises:
        ConfigError: If the word is unknown, a size is neither positive nor -1, or n is not between 0 and m.
    """
    if not isinstance(word, str):
        if not word or any(step == 0 or step < FULL for step in word):
            raise ConfigError(
                f"granularity {shown(list(word))}: a block has at least one size, each positive or -1 (all)"
            )
        return ELEMENT if tuple(word) == (1,) else Block(tuple(word))
    if counts := re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", word):
        n, m = int(counts[1]), int(counts[2])
        if not 0 < n < m:
            raise ConfigError(f"granularity {shown(word)}: n of every m weights stay, so 0 < n < m")
        return NofM(n, m, input_dimension)
    if word not in _NAMED:
        raise ConfigError(
            f"granularity {shown(word)} is unknown{nearest(word, _NAMED)} (or n:m, or a list of block sizes)"
        )
    return _NAMED[word]
