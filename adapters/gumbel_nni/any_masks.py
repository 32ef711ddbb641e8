"""A small network from the masks of any pruner of NNI's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gumbel_nni.model_speedup import remove_channels
from gumbel_nni.unremovable import warn_if_nothing_left
from gumbel_plugin.errors import ConfigError, GraphError, nearest
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.graph.dependency_groups import DependencyGroups
from gumbel_plugin.layers.example_inputs import ExampleInputs
from gumbel_plugin.layers.geometry import columns_view, input_channels
from gumbel_plugin.layers.model_check import refuse_wrapped
from gumbel_plugin.shrinking.mask_file import load_masks
from gumbel_plugin.shrinking.shrink import Engine, shrink

_logger = logging.getLogger(__name__)

Backend = Literal["torch_pruning", "nni"]
"""What removes channels: Torch-Pruning's functions, or NNI's ModelSpeedup. Both give the same network."""


def speedup(
    model: nn.Module,
    masks: Mapping[str, Mapping[str, Tensor | None]] | str | Path,
    example_inputs: ExampleInputs,
    *,
    backend: Backend = "torch_pruning",
    verify: bool = True,
) -> nn.Module:
    """Return a smaller dense model that computes what a pruner's wrapped model computes.

    What ``ModelSpeedup(model, example_inputs, masks).speedup_model()`` is meant to be, for the masks of any pruner:
    Level, L1Norm, L2Norm, FPGM, Taylor, Slim (on weights, or on the scales of batch norms), Movement, Gumbel. NNI's
    own takes a masked channel for zero wherever it is read, which it is not after a batch norm, an addition or a
    sigmoid. Here a channel leaves if it is read as zero; several that are read as constants become one; a channel that
    a residual connection fills from elsewhere stays (give its layers one ``dependency_group_id``).

    Example::

        pruner = L1NormPruner(model, config_list)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        small = gumbel_nni.speedup(model, masks, example_inputs)

    Args:
        model: The plain model, unwrapped. It is left alone, and so are its train/eval flags.
        masks: The pruner's `get_masks`, or the path of a masks file; left alone too.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs, batch first.
        backend: What removes the channels: Torch-Pruning, or NNI's own ModelSpeedup, which takes about three times as
            long. Both give the same network; where NNI's leaves channels in it, a warning says so and Torch-Pruning
            takes over.
        verify: Whether to compare the outputs before returning.

    Returns:
        The smaller model. Where masks close something of which nothing can leave, it is as large as the given one, and
        a warning names the layers and the reasons.

    Raises:
        ConfigError: If the backend is unknown, or a parallel wrapper holds the model.
        LifecycleError: If the model is wrapped.
        TargetError: If a mask's module or tensor does not exist, or its shape does not fit.
        GraphError: If the model cannot be traced.
        EquivalenceError: If the small model's outputs differ from the masked model's.
        DataError: If the masks file cannot be read.
    """
    refuse_wrapped(model, "speedup")
    given = load_masks(masks) if isinstance(masks, str | Path) else masks
    small = shrink(model, given, example_inputs, verify, engine=engine_of(backend))
    warn_if_nothing_left(model, small, given, example_inputs)
    return small


def engine_of(backend: Backend) -> Engine | None:
    """Return what removes channels under this name; None for Torch-Pruning's functions, which `shrink` calls itself.

    Raises:
        ConfigError: If there is no such backend.
    """
    engines: dict[str, Engine | None] = {"torch_pruning": None, "nni": _remove_by_nni}
    if backend not in engines:
        raise ConfigError(f"backend {backend!r} is unknown{nearest(backend, engines)}")
    return engines[backend]


def _remove_by_nni(
    dependency: DependencyGroups,
    dead: Mapping[str, Tensor],
    example_inputs: ExampleInputs,
    remove: Callable[[], nn.Module],
) -> nn.Module:
    """Let NNI's ModelSpeedup remove dead units; where it leaves some, warn, and let Torch-Pruning's functions do it."""
    columns = column_masks(dependency.model, dependency.groups, dead)
    masks = {name: {"weight": mask} for name, mask in columns.items()}
    try:
        by_nni = remove_channels(dependency.model, masks, example_inputs)
    except GraphError as error:
        small, problem = remove(), str(error)
    else:
        small = remove()
        left, right = (sum(parameter.numel() for parameter in each.parameters()) for each in (by_nni, small))
        if left == right:
            return by_nni
        problem = f"it leaves {left - right} parameters that can go"
    _logger.warning("NNI's ModelSpeedup cannot shrink this model (%s); Torch-Pruning's functions do it", problem)
    return small


def column_masks(model: nn.Module, groups: Sequence[ChannelGroup], dead: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, by consumer, the mask of its weight that closes the input channels of dead units."""
    columns: dict[str, Tensor] = {}
    for group in groups:
        for part in group.consumers if group.name in dead else ():
            layer = model.get_submodule(part.module)
            open_channels = columns.setdefault(part.module, torch.ones(input_channels(layer)))
            open_channels[part.positions[torch.isin(part.units, dead[group.name])]] = 0.0
    masks = {}
    for name, open_channels in columns.items():
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        masks[name] = columns_view(layer, open_channels.to(weight.device)).expand_as(weight).clone()
    return masks
