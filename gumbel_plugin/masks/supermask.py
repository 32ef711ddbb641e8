"""Supermasks: Bernoulli gates whose gradient goes through their probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from gumbel_plugin.masks.base import LearnedMask, LogitOptions, MaskOptions, NoiseSource
from gumbel_plugin.masks.functional import at_least_float32, straight_through
from gumbel_plugin.sparsity.types import Granularity


class Supermask(LearnedMask):
    """Gates drawn from Bernoulli(σ(m)), one sample per forward; the backward passes the gradient on to σ(m).

    Source: Zhou, Lan, Liu, Yosinski, NeurIPS 2019, arXiv 1905.01067, for frozen weights, where m starts at 0. Its
    dynamic weight rescale is ``pruning.rescale: dynamic``, its signed constants are ``pruning.weight_init:
    signed_constant``.
    """

    Options: ClassVar[type[MaskOptions]] = LogitOptions

    def __init__(
        self,
        shape: Sequence[int],
        options: LogitOptions,
        noise: NoiseSource,
        stream: int,
        granularity: Granularity | None = None,
    ) -> None:
        super().__init__(shape, options, noise, stream, granularity)
        self.logit = nn.Parameter(torch.full(self.shape, options.initial_logit or 0.0))

    @override
    def sample(self, weight: Tensor | None) -> Tensor:
        probability = torch.sigmoid(at_least_float32(self.logit))
        drawn = self.noise.uniform_like(probability.detach(), self.stream) < probability
        return straight_through(drawn, probability)

    @override
    def scores(self, weight: Tensor | None) -> Tensor:
        return self.logit

    @override
    def probability(self, weight: Tensor | None) -> Tensor:
        return torch.sigmoid(at_least_float32(self.logit))
