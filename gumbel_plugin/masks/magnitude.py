"""The baselines that a learned mask has to beat: remove the smallest weights, or any."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from gumbel_plugin.masks.base import LearnedMask, MaskOptions, Phase
from gumbel_plugin.masks.weight_dependent import WeightDependent


class _Baseline(LearnedMask):
    """Gates that nothing is learned about: open until they are decided, at extraction or when `phases.fixed` begins."""

    Options: ClassVar[type[MaskOptions]] = MaskOptions
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
        return self.sample(weight)

    @override
    def mask_weight(self, weight: Tensor) -> Tensor:
        return super().mask_weight(weight) if self.phase is Phase.FIXED else weight


class MagnitudeMask(_Baseline, WeightDependent, name="magnitude"):
    """Keeps the units of the largest weights; the network trains dense until then.

    A unit's score is the root mean square of its weights: |w| for a single weight, and comparable between units of
    different sizes that share a budget.
    """

    @override
    def scores(self, weight: Tensor | None) -> Tensor:
        return self.mean(self.read(weight).detach().square()).sqrt()


class RandomMask(_Baseline, name="random"):
    """Keeps units at random, but the same ones for the same seed; the network trains dense until then."""

    score: Tensor

    @override
    def create_latents(self) -> None:
        self.register_buffer("score", self.initial_uniform(*self.shape))

    @override
    def scores(self, weight: Tensor | None) -> Tensor:
        return self.score
