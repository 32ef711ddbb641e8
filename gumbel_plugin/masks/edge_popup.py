"""Edge-popup: the gates with the highest scores are open, in every forward."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from gumbel_plugin.masks.base import LearnedMask, MaskOptions, OptimizerSettings
from gumbel_plugin.masks.functional import straight_through


class EdgePopupOptions(MaskOptions):
    """Options of `EdgePopupMask`.

    Attributes:
        scaled: Draw the weights as if the fan were smaller by the fraction kept: Kaiming-normal with a standard
            deviation of √(2 / (fan·(1 − sparse_ratio))), or signed constants of that size. It needs a
            ``pruning.weight_init`` that draws weights.
    """

    scaled: bool = False


class EdgePopupMask(LearnedMask, name="edge_popup"):
    """One score a gate; those with the highest |score| of their layer are open, 1 − sparse_ratio of them.

    The gradient of a gate goes straight through to |score|. The number of open gates follows the layer's sparse_ratio
    at every forward. Scores start Kaiming-uniform with a = √5, that is, uniform within ±1/√fan_in. Source: Ramanujan,
    Wortsman, Kembhavi, Farhadi, Rastegari, CVPR 2020, arXiv 1911.13299, for frozen weights; its `prune_rate` is the
    fraction *kept*. Project choice: where a gate is coarser than a weight, which the paper has not, the fan is that of
    the gates' own tensor.
    """

    Options: ClassVar[type[MaskOptions]] = EdgePopupOptions
    manages_own_sparsity: ClassVar[bool] = True
    shares_budget: ClassVar[bool] = False
    published_optimizer: ClassVar[OptimizerSettings] = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    options: EdgePopupOptions

    @override
    def create_latents(self) -> None:
        bound = 1 / math.sqrt(math.prod(self.shape[1:]))
        self.score = nn.Parameter((2 * self.initial_uniform(*self.shape) - 1) * bound)

    @override
    def sample(self, weight: Tensor | None) -> Tensor:
        return straight_through(self.decide(weight), self.score.abs())

    @override
    def scores(self, weight: Tensor | None) -> Tensor:
        return self.score.abs()

    @override
    def decide(self, weight: Tensor | None) -> Tensor:
        return self.sparsity_type.project(self.score.abs(), self.sparsity or 0.0)

    @override
    def probability(self, weight: Tensor | None) -> Tensor:
        return self.sample(weight)

    @property
    @override
    def fan_factor(self) -> float:
        return 1 - (self.sparsity or 0.0) if self.options.scaled else 1.0
