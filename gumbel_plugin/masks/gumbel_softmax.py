"""Straight-through Gumbel-Softmax gates (ASLP, and joint training of weights and topology)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import field_validator
from torch import Tensor
from typing_extensions import override

from gumbel_plugin.masks.base import LearnedMask, LogitOptions, MaskOptions, Phase
from gumbel_plugin.masks.functional import at_least_float32, straight_through_gumbel
from gumbel_plugin.sparsity.schedules import Schedule, as_schedule
from gumbel_plugin.sparsity.types import Unstructured


class GumbelSoftmaxOptions(LogitOptions):
    """Options of `GumbelSoftmaxMask`.

    Attributes:
        temperature: The Gumbel-Softmax temperature, a positive number or a schedule over the mask learning.
        initial_logit: Where the latent m̂ of every gate starts (see `LogitOptions`).
    """

    temperature: float | Schedule = 1.0

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: float | Schedule) -> float | Schedule:
        schedule = as_schedule(value)
        if schedule.lowest <= 0:
            raise ValueError(f"the temperature must stay above 0, got {schedule.lowest}")
        if schedule.end > schedule.start:
            raise ValueError(
                f"masks are annealed: the temperature may not rise, as from {schedule.start} to {schedule.end}"
            )
        return value


class GumbelSoftmaxMask(LearnedMask, name="gumbel_softmax"):
    """Gates sampled by a straight-through Gumbel-Softmax over [m̂, 0], one sample per forward for the whole batch.

    P(keep) = σ(m̂); y = σ((m̂ + logit u)/τ); the forward uses [y > ½], the backward y. Sources: Dupont, Alaoui, Sahbi,
    Lebois, ICIP 2022, arXiv 2202.12986 (one latent a weight, frozen weights); Zhang, Tao, Zhang, arXiv 2311.12526
    (weights and gates together).
    """

    Options: ClassVar[type[MaskOptions]] = GumbelSoftmaxOptions
    options: GumbelSoftmaxOptions

    @override
    def sample(self, weight: Tensor | None) -> Tensor:
        return self._gated(torch.ones_like(at_least_float32(self.logit), requires_grad=False))

    @override
    def mask_weight(self, weight: Tensor) -> Tensor:
        if self.phase is Phase.LEARNING and self.training and isinstance(self.sparsity_type, Unstructured):
            return self._gated(weight)
        return super().mask_weight(weight)

    def _gated(self, tensor: Tensor) -> Tensor:
        logit = at_least_float32(self.logit)
        return straight_through_gumbel(tensor, logit, self.uniform_like(logit), self.temperature, self.noise_scale)

    @override
    def advance(self, progress: float) -> None:
        self.temperature = as_schedule(self.options.temperature)(progress)
