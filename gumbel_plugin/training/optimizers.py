"""Optimizers of gates and scales, from their configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from gumbel_plugin.config import OptimizerConfig

_logger = logging.getLogger(__name__)

_HIGHEST = 1.0
"""No learning rate above this is meant for an optimizer that normalizes gradients, as Adam does."""
_NORMALIZED = OptimizerConfig(name="adam", lr=0.05)
"""What gates learn with where the configured settings fit plain SGD only."""


def make_optimizer(parameters: Sequence[nn.Parameter], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Build an optimizer from its configuration."""
    family, arguments = family_and_arguments(settings)
    return family(parameters, **arguments)


def family_and_arguments(settings: OptimizerConfig) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, float]]:
    """Return the class of an optimizer and its keyword arguments, for those who build it themselves."""
    arguments = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.name == "sgd":
        return torch.optim.SGD, {**arguments, "momentum": settings.momentum}
    return (torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW), arguments


def settings_for(
    settings: OptimizerConfig, optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer] | None
) -> OptimizerConfig:
    """Return learning settings that fit the optimizer that will use them; a log message says where they are others.

    Args:
        settings: The configured ones.
        optimizer: The optimizer, or its class; None if it is not known.
    """
    family = optimizer if isinstance(optimizer, type) or optimizer is None else type(optimizer)
    if settings.name != "sgd" or settings.lr <= _HIGHEST or (family and issubclass(family, torch.optim.SGD)):
        return settings
    if family is None:
        _logger.warning(
            "parameter_groups(): the learning rate %g of the gates is SGD's; pass the optimizer that will use it, "
            "parameter_groups(optimizer), to get one that fits",
            settings.lr,
        )
        return settings
    fitting = _NORMALIZED.model_copy(update={"weight_decay": settings.weight_decay})
    _logger.warning(
        "the learning rate %g of the gates is SGD's; for %s they get %g", settings.lr, family.__name__, fitting.lr
    )
    return fitting
