"""Weight reparametrization: gates that are a function of the weight, trained to meet a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.masks.base import LearnedMask, MaskOptions, OptimizerSettings, Phase
from gumbel_plugin.masks.weight_dependent import WeightDependent
from gumbel_plugin.sparsity.budgeted import Usage
from gumbel_plugin.sparsity.types import Unstructured

_FAR = 1e3
"""Where t·x ends, so that nothing overflows: there the gate is 1 in float32, and its derivative below 1e-14."""


def soft_gate(weight: Tensor, t: Tensor | float) -> Tensor:
    """Return h_t(w) = C₁·(exp{−1/((t·w)⁴ + 1)} − e⁻¹), C₁ = 1/(1 − e⁻¹): 0 at w = 0, and 1 far from it.

    h is 0.378, 0.910 and 0.994 at |t·w| = 1, 2 and 4. Values and gradients are stable in float32 for every w.

    Args:
        weight: Any shape, float32 or float64.
        t: The inverse width.

    Returns:
        The gates, in [0, 1].
    """
    fourth = (t * weight).clamp(-_FAR, _FAR).square().square()
    # C₁·(exp(−r) − e⁻¹) = expm1(1 − r)/(e − 1) with r = 1/((t·w)⁴ + 1): exactly 0 at w = 0, and its derivative has no
    # difference of nearly equal numbers.
    gate = torch.expm1(1 - (fourth + 1).reciprocal()) / (math.e - 1)
    # How expm1 is rounded depends on torch's release and the processor; a gate just above 1 keeps its gradient.
    gate.detach().clamp_(max=1.0)
    return gate


class ReparametrizationOptions(MaskOptions):
    """Options of `ReparametrizationMask`.

    Attributes:
        strength: The weight λ of the budget loss. It must be large: far from the threshold the gates have hardly any
            gradient, and what the budget has not closed by the end is cut off.
        initial_t: Where the learned t starts; 100 puts the half-height of the gate at |w| ≈ 0.0113.
    """

    strength: float = Field(default=1000.0, gt=0)
    initial_t: float = Field(default=100.0, gt=0)


class ReparametrizationMask(WeightDependent, name="reparametrization"):
    """Soft gates h_t(w) on every weight w, with one learned t a network and no other parameter: ŵ = w·h_t(w).

    Budget loss: λ·((C − C_target)/C_initial)², C = Σ h_t(w) over all masks that share a budget, C_target the number of
    weights to keep and C_initial = Σ h_t(w) before the first step. For the paper's budget over the whole network, with
    weights ranked by |ŵ| over all its layers at the end, give all entries one ``global_group_id``; else each layer has
    its own. When the masks are decided, ŵ takes the place of w, so that nothing but the removed weights changes.

    Source: Dupont, Sahbi, Michel, ICIP 2021, arXiv 2107.03909. Project choices: one t a network; λ = 1000; before the
    masks are decided, an evaluation closes the weights whose gates are below ½.
    """

    Options: ClassVar[type[MaskOptions]] = ReparametrizationOptions
    manages_own_sparsity: ClassVar[bool] = True
    published_optimizer: ClassVar[OptimizerSettings] = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
    options: ReparametrizationOptions
    initial_kept: Tensor

    @override
    def check_units(self) -> None:
        super().check_units()
        if not isinstance(self.sparsity_type, Unstructured):
            raise ConfigError(
                f"granularity {list(self.shape)} gates: method 'reparametrization' gates single weights; use 'element'"
            )

    @override
    def create_latents(self) -> None:
        self.t = nn.Parameter(torch.tensor(self.options.initial_t))
        self.register_buffer("initial_kept", torch.zeros(()))  # 0 until the budget loss is asked for first

    @override
    def share(self, first: LearnedMask) -> None:
        if isinstance(first, ReparametrizationMask):
            self.t = first.t

    @override
    def sample(self, weight: Tensor | None) -> Tensor:
        return soft_gate(self.read(weight), self.t)

    @override
    def scores(self, weight: Tensor | None) -> Tensor:
        # |ŵ| grows with |w|, by the same function in all layers, so both rank alike; but the ŵ of small weights are 0.
        return self.read(weight).detach().abs()

    @override
    def probability(self, weight: Tensor | None) -> Tensor:
        return self.sample(weight)

    @override
    def decide(self, weight: Tensor | None) -> Tensor:
        return self.sample(weight).detach() >= 0.5

    @override
    def gates(self, weight: Tensor | None = None) -> Tensor:
        gates = super().gates(weight)
        soft = self.phase is Phase.LEARNING and not self.training
        return gates * self.sample(weight) if soft else gates

    @override
    @torch.no_grad()
    def fix(self, hard: Tensor, weight: Tensor | None = None) -> None:
        if self.phase is Phase.LEARNING and weight is not None:
            weight.mul_(self.sample(weight).to(weight.dtype))
        super().fix(hard, weight)

    def budget_loss(
        self, masks: Sequence[LearnedMask], weights: Sequence[Tensor | None], ratio: float, usage: Usage
    ) -> Tensor | None:
        """Return λ·((C − C_target)/C_initial)² (see `HasBudgetLoss`)."""
        kept = torch.stack([m.probability(weight).sum() for m, weight in zip(masks, weights, strict=True)]).sum()
        self.initial_kept.copy_(torch.where(self.initial_kept > 0, self.initial_kept, kept.detach()))
        target = (1 - ratio) * sum(math.prod(mask.shape) for mask in masks)
        distance = (kept - target) / self.initial_kept.clamp_min(1.0)  # fewer than one weight's worth is no scale
        return self.options.strength * distance.square()
