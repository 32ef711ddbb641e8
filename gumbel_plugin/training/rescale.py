"""Initial weights, and factors that keep a masked layer's scale."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError

WeightInit = Literal["keep", "kaiming_normal", "signed_constant"]
Rescale = Literal["none", "learned", "dynamic"]


@torch.no_grad()
def initialize_weight(
    weight: Tensor, how: WeightInit, generator: torch.Generator | None = None, fan_factor: float = 1.0
) -> None:
    """Initialize a weight in place before its mask is learned.

    Args:
        weight: A convolution's or linear layer's weight; one of a single dimension (a normalization's) is left.
        how: ``keep`` leaves it; ``kaiming_normal`` draws N(0, 2 / fan_in); ``signed_constant`` draws the same and keeps
            sign(w)·std(w), one magnitude a layer (Dupont et al. 2022; Zhou et al. 2019).
        generator: Where the numbers come from; a CPU generator, so that every device starts from the same.
        fan_factor: What the fan is multiplied by first, for instance the fraction of the weights that will be kept.

    Raises:
        ConfigError: If there is such a factor, but no weights are drawn.
    """
    if how == "keep" and fan_factor != 1:
        raise ConfigError(
            "options.scaled: weights are scaled as they are drawn, but pruning.weight_init 'keep' draws none; use "
            "'kaiming_normal' or 'signed_constant'"
        )
    if how == "keep" or weight.dim() < 2:
        return
    fresh = torch.empty(weight.shape)
    nn.init.kaiming_normal_(fresh, mode="fan_in", nonlinearity="relu", generator=generator)
    fresh /= math.sqrt(fan_factor)
    if how == "signed_constant":
        spread = fresh.std() if fresh.numel() > 1 else fresh.abs()  # one number has no spread
        fresh = torch.sign(fresh) * spread
    weight.copy_(fresh)


def dynamic_scale(mask: Tensor, weight: Tensor) -> Tensor:
    """Return numel / Σ mask for a mask that broadcasts against the weight, with its gradient (Zhou et al. 2019).

    A mask that closed everything gives 1, so that an empty sample stays finite.
    """
    kept = mask.sum(dtype=torch.promote_types(mask.dtype, torch.float32)) * (weight.numel() / mask.numel())
    return torch.where(kept > 0, weight.numel() / kept.clamp_min(1.0), torch.ones_like(kept))
