"""From a masked network to a small dense one that computes the same."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError, GraphError, TargetError, nearest
from gumbel_plugin.graph.dependency_groups import DependencyGroups
from gumbel_plugin.graph.record import find_kept, kept_after, kept_of, note_kept
from gumbel_plugin.layers.example_inputs import checked_inputs, random_inputs_like
from gumbel_plugin.layers.model_check import refuse_wrapped
from gumbel_plugin.layers.precision import dtypes_of, round_to
from gumbel_plugin.layers.weights import how_to_keep_weights, plain_copy
from gumbel_plugin.shrinking.closed_blocks import note_removed, remove_closed_blocks
from gumbel_plugin.shrinking.equivalence import EquivalenceReport, verify_equivalence
from gumbel_plugin.shrinking.folded_constants import fold_constants
from gumbel_plugin.shrinking.merged_constants import merge_constants
from gumbel_plugin.shrinking.unread_units import column_masks, find_dead_units
from gumbel_plugin.storage.mask_format import check_format

_logger = logging.getLogger(__name__)

Backend = Literal["torch_pruning", "nni"]


def shrink(
    model: nn.Module,
    masks: Mapping[str, Mapping[str, Tensor | None]],
    example_inputs: Any,
    backend: Backend = "torch_pruning",
    verify: bool = True,
) -> nn.Module:
    """Return a smaller dense model that computes what the masked model computes.

    The masks are multiplied into a copy of the model. Every unit that nothing reads any more is then removed, together
    with all that the dependency graph ties to it; so is one that nothing comes into, once its constant is in the biases
    of what reads it (a convolution without a bias gets one). A residual block whose branch is closed leaves as a whole.

    Args:
        model: The model; it is left alone. A model whose gates were learned has its closed input columns at zero already
            (`MaskingSession.extract`), so that masks on producers' rows are enough.
        masks: NNI's masks format, ``{module: {"weight": 0/1 tensor, "bias": ...}}``.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
        backend: What removes the channels: Torch-Pruning, or NNI's ModelSpeedup. Both give the same network.
        verify: Whether to compare the outputs before returning.

    Raises:
        TargetError: If a mask's module does not exist, its shape does not fit, or it holds anything but 0 and 1.
        ConfigError: If the inputs cannot be used (see `checked_inputs`), or the model (see `refuse_unusable`).
        GraphError: If the model cannot be traced.
        EquivalenceError: If the small model's outputs differ from the masked model's.
    """
    checked_inputs(example_inputs)
    masked = masked_copy(model, masks)
    small = remove_dead_units(masked, example_inputs, backend)
    if verify:
        verify_equivalence(masked, small, example_inputs).raise_for_failure()
    return small


@torch.no_grad()
def masked_copy(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor | None]]) -> nn.Module:
    """Return a plain copy of a model with the masks multiplied into its parameters.

    Raises:
        TargetError: If a mask's module or tensor does not exist, its shape does not fit, or it holds anything but 0 and
            1.
        LifecycleError: If the model is wrapped by a compressor of NNI's.
    """
    refuse_wrapped(model, "shrinking")
    check_format(masks)
    masked = plain_copy(model)
    modules = dict(masked.named_modules(remove_duplicate=False))
    for name, targets in masks.items():
        if name not in modules:
            raise TargetError(f"mask for module {name!r}, which the model does not have{nearest(name, modules)}")
        for target, mask in targets.items():
            tensor = getattr(modules[name], target, None)
            if mask is None or (tensor is None and target == "bias"):
                continue
            if not isinstance(tensor, Tensor):
                raise TargetError(f"mask for {name}.{target}, which is no tensor of that module")
            if target not in {**modules[name]._parameters, **modules[name]._buffers}:  # frozen norms have buffers
                raise TargetError(
                    f"mask for {name}.{target}, which is computed from other parameters: make it a parameter first "
                    f"with {how_to_keep_weights(modules[name]) or 'what takes its parametrization off'}"
                )
            if tensor.shape != mask.shape:
                raise TargetError(f"{name}.{target}: mask {tuple(mask.shape)}, tensor {tuple(tensor.shape)}")
            tensor.mul_(mask.to(tensor))
    return masked


def remove_dead_units(masked: nn.Module, example_inputs: Any, backend: Backend = "torch_pruning") -> nn.Module:
    """Return a copy of a masked model without the units that nothing reads, or that nothing comes into.

    The constants of the latter are moved into the biases of their readers (`fold_constants`) where that is exact, and
    else into one channel that carries them (`merge_constants`).
    Residual blocks whose branch is zero go as a whole.

    Args:
        masked: A plain model whose closed weights are zero; it is left alone.
        example_inputs: What to trace it with.
        backend: What removes the channels.
    """
    if backend not in ("torch_pruning", "nni"):
        raise ConfigError(f"backend {backend!r} is unknown{nearest(backend, ['torch_pruning', 'nni'])}")
    small = copy.deepcopy(masked)
    blocks = remove_closed_blocks(small)
    dependency = DependencyGroups(small, example_inputs)
    dtypes = dtypes_of(small)
    folded = fold_constants(small, dependency.groups, example_inputs)
    merged = merge_constants(small, dependency.groups, example_inputs)
    wide = bool(folded or merged)
    if wide:  # the model is float64 from here on, until it is rounded at the end
        example_inputs = random_inputs_like(example_inputs, torch.Generator().manual_seed(0), torch.float64)
    dead = find_dead_units(small, dependency.groups)
    kept = find_kept(small, lambda copied: dependency.remover_of(copied).remove(dead))
    by_nni = _removed_by_nni(small, dependency, dead, example_inputs) if backend == "nni" else None
    if by_nni is None:
        dependency.remove_all(dead)
    small = by_nni or small
    note_kept(small, kept_after(kept_of(masked), kept))
    note_removed(small, blocks)
    gone, constant = (sum(len(units) for units in found.values()) for found in (dead, folded))
    _logger.info("removed %d units in %d groups; the constants of %d were folded", gone, len(dead), constant)
    return round_to(small, dtypes) if wide else small


def _removed_by_nni(
    model: nn.Module, dependency: Any, dead: Mapping[str, Tensor], example_inputs: Any
) -> nn.Module | None:
    """Return what NNI's ModelSpeedup makes of a masked model; None, with a warning, if it leaves units in it."""
    from gumbel_nni.model_speedup import remove_channels

    masks = column_masks(model, dependency.groups, dead)
    wanted = copy.deepcopy(model)
    dependency.remover_of(wanted).remove(dead)
    try:
        small = remove_channels(model, {name: {"weight": mask} for name, mask in masks.items()}, example_inputs)
    except GraphError as error:
        problem = str(error)
    else:
        left, right = (sum(parameter.numel() for parameter in each.parameters()) for each in (small, wanted))
        if left == right:
            return small
        problem = f"it leaves {left - right} parameters that can go"
    _logger.warning("NNI's ModelSpeedup cannot shrink this model (%s); Torch-Pruning's functions do it", problem)
    return None


__all__ = ["Backend", "EquivalenceReport", "masked_copy", "remove_dead_units", "shrink", "verify_equivalence"]
