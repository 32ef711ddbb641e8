"""Supermasks: Bernoulli gates whose gradient goes through their probability."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from gumbel_plugin.masks.base import LearnedMask
from gumbel_plugin.masks.functional import straight_through


class Supermask(LearnedMask, name="supermask"):
    """Gates drawn from Bernoulli(σ(m)), one sample per forward; the backward passes the gradient on to σ(m).

    Source: Zhou, Lan, Liu, Yosinski, NeurIPS 2019, arXiv 1905.01067, for frozen weights, where m starts at 0. Its
    dynamic weight rescale is ``pruning.rescale: dynamic``, its signed constants are ``pruning.weight_init:
    signed_constant``.
    """

    @override
    def sample(self, weight: Tensor | None) -> Tensor:
        probability = self.probability(weight)
        return straight_through(self.uniform_like(probability.detach()) < probability, probability)
