"""Gates that each sample has of its own while it learns, polarized until all samples agree: the consensus stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from typing_extensions import override

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.masks.base import LearnedMask, MaskOptions, OptimizerSettings
from gumbel_plugin.masks.functional import at_least_float32
from gumbel_plugin.masks.per_sample import PerSample
from gumbel_plugin.sparsity.budgeted import Usage
from gumbel_plugin.sparsity.schedules import Schedule, as_schedule
from gumbel_plugin.sparsity.types import CHANNEL, WHOLE


class ConsensusOptions(MaskOptions):
    """Options of `ConsensusMask`. Nothing of this is published but the idea; the values are this project's choice.

    Attributes:
        unit: ``channel`` gates the channels of each dependency group, ``block`` whole residual blocks.
        hidden: Width of the gating module's hidden layer.
        initial_logit: Where every gate's logit starts, for every sample; above 0, so that the gates start open.
        lambda_act: Weight of the usage loss: the squared distance of the used fraction of the multiply-accumulates from
            1 − sparse_ratio.
        lambda_polar: Weight of the polarization, a number or a schedule over the mask learning. It should start low:
            while nearly all samples agree that a gate is open, it keeps that gate open.
    """

    unit: Literal["channel", "block"] = "channel"
    hidden: int = Field(default=16, ge=1)
    initial_logit: float = Field(default=2.0, gt=0)
    lambda_act: float = Field(default=10.0, ge=0)
    lambda_polar: float | Schedule = Schedule(0.0, 2.0, "linear")

    @field_validator("lambda_polar")
    @classmethod
    def _not_negative(cls, value: float | Schedule) -> float | Schedule:
        if (lowest := as_schedule(value).lowest) < 0:
            raise ValueError(f"the weight of a loss must be at least 0, got {lowest}")
        return value

    @property
    @override
    def gates_blocks(self) -> bool:
        return self.unit == "block"


class ConsensusMask(PerSample, name="consensus"):
    """Binary gates computed from each sample: average pool of what the unit reads → two-layer MLP → σ → ≥ ½.

    The gradient goes straight through the threshold. With ḡ the mean of a gate over the batch, the extra losses are
    λ_polar · mean over all gates of ḡ(1 − ḡ), zero only where all samples agree, and λ_act · (usage(ḡ) −
    (1 − sparse_ratio))², usage being weighted by multiply-accumulates.

    Source: Zhi et al., *Learning a Consensus Sub-Network with Polarization Regularization and One Pass Training*, arXiv
    2302.10798, of which only the abstract's idea is followed; everything in detail is this project's choice.
    """

    Options: ClassVar[type[MaskOptions]] = ConsensusOptions
    manages_own_sparsity: ClassVar[bool] = True
    published_optimizer: ClassVar[OptimizerSettings] = {"name": "adam", "lr": 0.01}
    options: ConsensusOptions

    @override
    def check_units(self) -> None:
        if self.sparsity_type != (WHOLE if self.options.gates_blocks else CHANNEL):
            raise ConfigError(
                f"granularity {self.sparsity_type}: method 'consensus' gates whole channels or blocks (options.unit is "
                f"{self.options.unit!r}); leave the granularity out"
            )

    @override
    def create_latents(self) -> None:
        units = math.prod(self.shape)
        self.output = nn.Parameter(torch.zeros(units, self.options.hidden))
        self.bias = nn.Parameter(torch.full((units,), self.options.initial_logit))
        self._gates_of_network = [units]  # of every mask of the network
        super().create_latents()

    @override
    def read_features(self, count: int) -> None:
        # The layers have no first bias and run over units or features first, so that units can leave one by one.
        uniform = self.initial_uniform(count, self.options.hidden)
        self.input = nn.Parameter((2 * uniform - 1) * math.sqrt(6 / count))  # Kaiming's, for the ReLU that follows

    @override
    def sample_logits(self, features: Tensor) -> Tensor:
        first, second, bias = (at_least_float32(part) for part in (self.input, self.output, self.bias))
        return torch.relu(features.to(first.dtype) @ first) @ second.t() + bias

    @override
    def penalty(self, weight: Tensor | None) -> Tensor | None:
        mean = self.batch_mean()
        if mean is None or self.lambda_polar == 0:
            return None
        return self.lambda_polar * (mean * (1 - mean)).sum() / sum(self._gates_of_network)

    def budget_loss(
        self, masks: Sequence[ConsensusMask], weights: Sequence[Tensor | None], ratio: float, usage: Usage
    ) -> Tensor | None:
        """Return λ_act · (usage(ḡ) − (1 − ratio))² (see `HasBudgetLoss`)."""
        means = [mask.batch_mean() for mask in masks]
        if all(mean is None for mean in means):
            return None  # no training forward yet
        # A unit that this forward left out counts as its samples had it before.
        used = [mask.votes if mean is None else mean for mask, mean in zip(masks, means, strict=True)]
        return self.options.lambda_act * (usage(used) - (1 - ratio)).square()

    @override
    def share(self, first: LearnedMask) -> None:
        if isinstance(first, ConsensusMask):
            first._gates_of_network += self._gates_of_network
            self._gates_of_network = first._gates_of_network

    @override
    def advance(self, progress: float) -> None:
        self.lambda_polar = as_schedule(self.options.lambda_polar)(progress)
