"""From a masked network to a small dense one that computes the same."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import TargetError, nearest
from gumbel_plugin.graph.dependency_groups import DependencyGroups
from gumbel_plugin.graph.record import find_kept, kept_after, kept_of, note_kept, note_removed
from gumbel_plugin.layers.example_inputs import ExampleInputs, checked_inputs, random_inputs_like
from gumbel_plugin.layers.model_check import refuse_wrapped
from gumbel_plugin.layers.precision import dtypes_of, round_to
from gumbel_plugin.layers.weights import how_to_keep_weights, plain_copy
from gumbel_plugin.shrinking.closed_blocks import remove_closed_blocks
from gumbel_plugin.shrinking.equivalence import compare
from gumbel_plugin.shrinking.folded_constants import fold_constants
from gumbel_plugin.shrinking.merged_constants import merge_constants
from gumbel_plugin.shrinking.unread_units import find_dead_units
from gumbel_plugin.shrinking.unremovable import warn_if_nothing_left
from gumbel_plugin.storage.mask_format import check_format

_logger = logging.getLogger(__name__)

Engine = Callable[[DependencyGroups, Mapping[str, Tensor], ExampleInputs, Callable[[], nn.Module]], nn.Module]
"""What removes channels in another way than Torch-Pruning's functions do. It gets the groups of a masked network, the
dead units of each by name, example inputs, and those functions: called, they shrink the groups' own network and return
it. It returns the small network."""


def shrink(
    model: nn.Module,
    masks: Mapping[str, Mapping[str, Tensor | None]],
    example_inputs: ExampleInputs,
    verify: bool = True,
    *,
    engine: Engine | None = None,
) -> nn.Module:
    """Return a smaller dense model that computes what the masked model computes.

    The masks are multiplied into a copy of the model. Every unit that nothing reads any more is then removed, together
    with all that the dependency graph ties to it; so is one that nothing comes into, once its constant is in the biases
    of what reads it (a convolution without a bias gets one). A residual block whose branch is closed leaves as a whole.

    Args:
        model: The model; it is left alone. A model whose gates were learned has its closed input columns at zero
            already (`MaskingSession.extract`), so that masks on producers' rows are enough.
        masks: NNI's masks format, ``{module: {"weight": 0/1 tensor, "bias": ...}}``.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
        verify: Whether to compare the outputs before returning.
        engine: What removes the channels, by default Torch-Pruning's functions.

    Raises:
        TargetError: If a mask's module does not exist, its shape does not fit, or it holds anything but 0 and 1.
        ConfigError: If the inputs cannot be used (see `checked_inputs`), or the model (see `refuse_unusable`).
        GraphError: If the model cannot be traced.
        EquivalenceError: If the small model's outputs differ from the masked model's.
    """
    inputs = checked_inputs(example_inputs)
    masked = masked_copy(model, masks)
    small = remove_dead_units(masked, inputs, engine)
    if verify:
        compare(masked, small, inputs).raise_for_failure()
    warn_if_nothing_left(masked, small, masks, inputs)
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


def remove_dead_units(masked: nn.Module, example_inputs: ExampleInputs, engine: Engine | None = None) -> nn.Module:
    """Return a copy of a masked model without the units that nothing reads, or that nothing comes into.

    The constants of the latter are moved into the biases of their readers (`fold_constants`) where that is exact, and
    else into one of them (`merge_constants`). Residual blocks whose branch is zero go as a whole.

    Args:
        masked: A plain model whose closed weights are zero; it is left alone.
        example_inputs: What to trace it with.
        engine: What removes the channels, by default Torch-Pruning's functions.
    """
    small = copy.deepcopy(masked)
    blocks = remove_closed_blocks(small)
    dependency = DependencyGroups(small, example_inputs)
    dtypes = dtypes_of(small)
    folded = fold_constants(small, dependency.groups, example_inputs)
    merge_constants(small, dependency.groups, example_inputs)
    if dtypes_of(small) != dtypes:  # it is float64 from here on, until it is rounded at the end
        example_inputs = random_inputs_like(example_inputs, torch.Generator().manual_seed(0), torch.float64)
    dead = find_dead_units(small, dependency.groups)
    kept = find_kept(small, lambda copied: dependency.remover_of(copied).remove(dead))

    def remove() -> nn.Module:
        dependency.remove_all(dead)
        return small

    result = remove() if engine is None else engine(dependency, dead, example_inputs, remove)
    note_kept(result, kept_after(kept_of(masked), kept))
    note_removed(result, blocks)
    gone, constant = (sum(len(units) for units in found.values()) for found in (dead, folded))
    _logger.info("removed %d units in %d groups; the constants of %d were folded", gone, len(dead), constant)
    return round_to(result, dtypes)
