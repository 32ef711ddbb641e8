"""The floors that a learned mask has to beat: remove the smallest weights, or any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from gumbel_plugin.masks.base import LearnedMask, MaskOptions, NoiseSource, Phase
from gumbel_plugin.sparsity.types import Granularity


class _Baseline(LearnedMask):
    """Gates that nothing is learned about: open until they are decided, at extraction or where `phases.fixed` begins."""

    manages_own_sparsity: ClassVar[bool] = True
    needs_trained_weights: ClassVar[bool] = True

    @override
    def sample(self, weight: Tensor | None) -> Tensor:
        return torch.ones(self.shape, device=self.hard.device)

    @override
    def decide(self, weight: Tensor | None) -> Tensor:
        return torch.ones_like(self.hard)

    @override
    def probability(self, weight: Tensor | None) -> Tensor:
        return torch.ones(self.shape, device=self.hard.device)

    @override
    def mask_weight(self, weight: Tensor) -> Tensor:
        return super().mask_weight(weight) if self.phase is Phase.FIXED else weight


class MagnitudeMask(_Baseline):
    """Keeps the units of the largest weights; the network trains dense until then.

    A unit's score is the root mean square of its weights: |w| for a single weight, and comparable between units of
    different sizes that share a budget.
    """

    reads_weight: ClassVar[bool] = True

    @override
    def scores(self, weight: Tensor | None) -> Tensor:
        return self._mean(self._read(weight).detach().square()).sqrt()


class RandomMask(_Baseline):
    """Keeps units at random, but the same ones for the same seed; the network trains dense until then."""

    score: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        options: MaskOptions,
        noise: NoiseSource,
        stream: int,
        granularity: Granularity | None = None,
    ) -> None:
        super().__init__(shape, options, noise, stream, granularity)
        self.register_buffer("score", noise.uniform_like(torch.empty(self.shape), stream, bits=32))

    @override
    def scores(self, weight: Tensor | None) -> Tensor:
        return self.score
