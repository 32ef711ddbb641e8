"""Hard concrete gates: continuous ones that are exactly 0 or 1 with positive probability."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from gumbel_plugin.masks.base import LearnedMask, LogitOptions, MaskOptions
from gumbel_plugin.masks.functional import at_least_float32


class HardConcreteOptions(LogitOptions):
    """Options of `HardConcreteMask`; the defaults of the first three are the published ones.

    Attributes:
        beta: The temperature of the binary concrete distribution.
        gamma: The lower end of the interval that it is stretched to, below 0.
        zeta: The upper end, above 1.
        l0_weight: What one gate that is expected to be open adds to the loss (λ of the paper, there divided by the
            number of training samples). 0 leaves the sparsity to `sparse_ratio`.
        initial_logit: Where log α starts (see `LogitOptions`).
    """

    beta: float = Field(default=2 / 3, gt=0)
    gamma: float = Field(default=-0.1, lt=0)
    zeta: float = Field(default=1.1, gt=1)
    l0_weight: float = Field(default=0.0, ge=0)


class HardConcreteMask(LearnedMask, name="hard_concrete"):
    """Gates z = min(1, max(0, s·(ζ − γ) + γ)), s = σ((log α + logit u)/β), with the gradient of that formula.

    P(z ≠ 0) = σ(log α − β·log(−γ/ζ)) is what the L0 penalty and the budget count. Source: Louizos, Welling, Kingma,
    ICLR 2018, arXiv 1712.01312, equations 10 to 12. A project choice is the hard gate at extraction, where the paper
    keeps soft ones: open where P(z ≠ 0) is at least ½, or as a budget ranks log α.
    """

    Options: ClassVar[type[MaskOptions]] = HardConcreteOptions
    options: HardConcreteOptions

    @override
    def create_latents(self) -> None:
        options = self.options
        self.log_alpha = nn.Parameter(torch.full(self.shape, options.initial_logit or 0.0))
        self._shift = options.beta * math.log(-options.gamma / options.zeta)

    @override
    def sample(self, weight: Tensor | None) -> Tensor:
        options = self.options
        log_alpha = at_least_float32(self.log_alpha)
        noise = self.uniform_like(log_alpha.detach()).logit() * self.noise_scale
        concrete = torch.sigmoid((log_alpha + noise) / options.beta)
        return (concrete * (options.zeta - options.gamma) + options.gamma).clamp(0.0, 1.0)

    @property
    @override
    def latents(self) -> Tensor:
        return self.log_alpha

    @override
    def scores(self, weight: Tensor | None) -> Tensor:
        return at_least_float32(self.log_alpha) - self._shift

    @override
    def penalty(self, weight: Tensor | None) -> Tensor | None:
        if self.options.l0_weight == 0:
            return None
        return self.options.l0_weight * self.probability(weight).sum()
