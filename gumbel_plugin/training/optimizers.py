"""Optimizers from their configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gumbel_plugin.config import OptimizerConfig


def make_optimizer(parameters: Sequence[nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Build an optimizer from its configuration."""
    if settings.name == "sgd":
        return torch.optim.SGD(parameters, settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    family = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return family(parameters, settings.lr, weight_decay=settings.weight_decay)
