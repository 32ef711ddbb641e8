"""Residual blocks whose branch is zero: what is left of them is the skip, and what follows the addition."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from gumbel_plugin.graph.residual_blocks import ResidualBlock, residual_block

_logger = logging.getLogger(__name__)


def remove_closed_blocks(model: nn.Module) -> list[str]:
    """Replace every residual block whose branch is exactly zero by what is left of it; in place.

    Args:
        model: A plain model.

    Returns:
        The names of the blocks that went.
    """
    removed: list[str] = []
    while found := find_closed_blocks(model):  # a block around it may be found only once the inner one is gone
        for name, block in found.items():
            model.set_submodule(name, block.remainder())
        removed += found
    if removed:
        _logger.info("removed %d residual blocks: %s", len(removed), ", ".join(removed))
    return removed


def find_closed_blocks(model: nn.Module) -> dict[str, ResidualBlock]:
    """Return the innermost residual blocks of a model whose branch is exactly zero, by name."""
    modules = dict(model.named_modules())
    around = [_block_around(name, modules) for name, module in modules.items() if _is_zero(module)]
    return dict(found for found in around if found is not None)


def _block_around(layer: str, modules: Mapping[str, nn.Module]) -> tuple[str, ResidualBlock] | None:
    """Return the residual block that a layer closes, with its name."""
    name = layer
    while "." in name:
        name = name.rpartition(".")[0]
        block = residual_block(modules[name])
        if isinstance(block, ResidualBlock) and f"{name}.{block.last}" == layer:
            return name, block
    return None


def _is_zero(module: nn.Module) -> bool:
    has_weight = module._parameters.get("weight") is not None
    return has_weight and not any(bool(own.detach().any()) for own in module.parameters(recurse=False))
