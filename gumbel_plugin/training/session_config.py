"""What a session is given, in all forms that it may have, and when its masks are learned by that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gumbel_plugin.config import ConfigLike, PruningConfig, PruningSection
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.graph.dependency_groups import find_groups
from gumbel_plugin.layers.example_inputs import checked_inputs, inputs_on_device_of
from gumbel_plugin.sparsity.controller import USUAL_LENGTH
from gumbel_plugin.training.planner import needs_groups


def read_config(config: PruningSection | ConfigLike, seed: int | None) -> tuple[PruningSection, int, Any]:
    """Return what is pruned, the seed, and inputs of the shape that a configuration may give.

    Args:
        config: A section, or a whole configuration.
        seed: The seed, if it is given beside the configuration, whose own it replaces.

    Raises:
        ConfigError: If the configuration breaks a rule.
    """
    if isinstance(config, PruningSection):
        return config, seed or 0, None
    whole = PruningConfig.load(config)
    inputs = None if whole.example_shape is None else torch.zeros(whole.example_shape)
    return whole.pruning, whole.seed if seed is None else seed, inputs


def groups_for(model: nn.Module, config: PruningSection, example_inputs: Any) -> Sequence[ChannelGroup]:
    """Return the channel groups of a model, if any rule removes whole channels.

    Raises:
        ConfigError: If so, and there is nothing to trace the model with.
    """
    if not needs_groups(config):
        return ()
    if example_inputs is None:
        raise ConfigError(
            "removing whole channels needs inputs to trace the model with: pass example_inputs=, or set example_shape "
            "in the configuration"
        )
    return find_groups(model, inputs_on_device_of(model, checked_inputs(example_inputs)))


def mask_learning_span(config: PruningSection, total_steps: int | None) -> tuple[int, int]:
    """Return the steps at which the mask learning begins and ends.

    The gates stay open for the first steps where a prior needs their gradients; a dense phase that is long enough
    serves for it. That is at most a fifth of the time that there is to learn in.

    Args:
        config: What is pruned.
        total_steps: Optimizer steps of the whole training; `USUAL_LENGTH` of mask learning where nobody knows.
    """
    begin, end = 0, USUAL_LENGTH
    if total_steps is not None:
        begin, end = int(total_steps * config.phases.dense), total_steps - int(total_steps * config.phases.fixed)
    if config.gates.prior == "taylor":
        begin = max(begin, min(config.gates.warmup, max(1, (end - begin) // 5)))
    return begin, end
