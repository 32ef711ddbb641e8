"""Masks that close something of a network, of which nothing can leave: which layers, and why."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.graph.dependency_groups import find_groups
from gumbel_plugin.layers.geometry import output_dimension
from gumbel_plugin.sparsity.counting import count_parameters

_logger = logging.getLogger(__name__)
_NAMED = 8
"""How many layers a warning names."""


def warn_if_nothing_left(
    model: nn.Module, small: nn.Module, masks: Mapping[str, Mapping[str, Tensor | None]], example_inputs: Any
) -> None:
    """Warn if masks close something and the small network is as large as the model.

    Args:
        model: The plain model.
        small: What was made of it.
        masks: NNI's masks format.
        example_inputs: What to trace the model with.
    """
    closing = [
        name for name, targets in masks.items() if any(m is not None and (m == 0).any() for m in targets.values())
    ]
    if not closing or count_parameters(small) < count_parameters(model):
        return
    groups = find_groups(model, example_inputs)
    modules = dict(model.named_modules(remove_duplicate=False))
    reasons: dict[str, list[str]] = {}
    for name in closing:
        reasons.setdefault(_reason(name, modules[name], masks[name].get("weight"), groups), []).append(name)
    text = "; ".join(f"{_listed(names)}: {reason}" for reason, names in reasons.items())
    _logger.warning("no channel can leave, the network that is returned is as large as before (%s)", text)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


def _reason(name: str, module: nn.Module, mask: Tensor | None, groups: Sequence[ChannelGroup]) -> str:
    """Return why nothing leaves one layer, whose mask closes something."""
    if mask is None or not _closes_channels(module, mask):
        return "the mask closes no whole channel (granularity 'out_channel' does)"
    part = next(((group, part) for group in groups for part in group.producers if part.module == name), None)
    if part is None:
        return "no group of channels that could leave begins there"
    group, own = part
    if group.safety != "exact":
        return group.reason
    if len(own.positions) > group.size:
        together = len(own.positions) // group.size
        return f"its channels leave {together} at a time (a head, a group), and none of these is closed as a whole"
    return (
        "the layers that read its closed channels need them still, other layers compute into the same channels or what "
        "is between makes constants of them (give tied layers one dependency_group_id)"
    )


def _closes_channels(module: nn.Module, mask: Tensor) -> bool:
    """Return whether a weight's mask closes a whole output channel, or a whole input channel."""
    if mask.dim() == 1:
        return bool((mask == 0).any())
    rows = output_dimension(module)
    dimensions = (0, 1) if rows is None else (rows, 1 - rows)
    return any(bool((mask == 0).transpose(0, each).flatten(1).all(1).any()) for each in dimensions)
