"""Repair of NNI's masks on weights that are (in, out / groups, ...): of transposed convolutions, and GPT-2's layers."""

from __future__ import annotations

from typing import Any

from nni.compression.base import compressor
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.pruning.tools import sparse_gen
from nni.compression.utils.scaling import Scaling
from torch import Tensor

from gumbel_nni.compat.patching import replaces
from gumbel_plugin.layers.geometry import groups_of, is_transposed

_SOURCE_GROUPS = "_groups_of_transposed_source"
"""The attribute of an aligned target space that holds the groups of the transposed convolution it follows."""


def _ordinary(weight: Tensor, groups: int) -> Tensor:
    """Return (in, out / groups, ...) as (out, in / groups, ...), or the other way round."""
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return split.transpose(1, 2).flatten(0, 1)


class _TransposedScaling(Scaling):  # type: ignore[misc]
    """NNI's scaling of a transposed weight by a kernel for an ordinary one."""

    def __init__(self, kernel_size: list[int], groups: int) -> None:
        super().__init__(kernel_size, kernel_padding_mode="back", kernel_padding_val=-1)
        self._groups = groups

    def _shrink(self, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shrunk: Tensor = super()._shrink(_ordinary(target, self._groups), *args, **kwargs)
        return shrunk

    def _expand(self, target: Tensor, kernel_size: list[int], expand_size: list[int], *args: Any, **kw: Any) -> Tensor:
        inputs, outputs, *kernel = expand_size
        ordinary = [outputs * self._groups, inputs // self._groups, *kernel]
        expanded = super()._expand(target, kernel_size, ordinary, *args, **kw)
        channels = expanded.expand(*ordinary[:2], *expanded.shape[2:])  # (out, 1, ...) could not be put in order
        return _ordinary(channels, self._groups)  # its own inverse


@replaces(compressor, "register_scalers")
def channels_of_transposed_convolutions(original: Any, target_spaces: Any, set_default_granularity: Any) -> None:
    """Let ``out_channel`` mean the output channels of transposed convolutions, and ``in_channel`` their inputs.

    Cause (microsoft/nni#5805, whatever the versions): NNI takes dimension 0 of every weight for the outputs. There lie
    the inputs of a transposed convolution: its bias gets a mask of the inputs' number, which fails, or, with as many
    outputs, closes the wrong channels without a word; tied layers share the wrong ones. Remedy: such weights are
    measured, masked and followed in the order of an ordinary convolution, (out, in / groups, ...).
    """
    original(target_spaces, set_default_granularity)
    for name, spaces in target_spaces.items():
        for target, space in spaces.items():
            if not isinstance(space, PruningTargetSpace):
                continue
            module = space._wrapper.module
            if target == "weight" and is_transposed(module):
                if space.granularity == "out_channel":
                    space._scaler = _TransposedScaling([1], groups_of(module))
                elif space.granularity == "in_channel":
                    space._scaler = _TransposedScaling([-1, 1], 1)  # all inputs lie in dimension 0, whatever the groups
            if space.align is not None:
                source = target_spaces.get(space.align["module_name"] or name, {}).get(space.align["target_name"])
                followed = None if source is None else source._wrapper.module
                by_outputs = space.align["target_name"] == "weight" and list(space.align["dims"]) == [0]
                if by_outputs and followed is not None and is_transposed(followed):
                    setattr(space, _SOURCE_GROUPS, groups_of(followed))


@replaces(sparse_gen, "_generate_align_sparsity", part_of=channels_of_transposed_convolutions)
def _generate_align_sparsity(original: Any, masks: Any, target_spaces: Any) -> Any:
    """Show NNI the masks of transposed weights in the order of ordinary ones."""
    shown = {name: dict(targets) for name, targets in masks.items()}
    groups = {
        space.align["module_name"] or name: getattr(space, _SOURCE_GROUPS)
        for name, spaces in target_spaces.items()
        for space in spaces.values()
        if hasattr(space, _SOURCE_GROUPS)
    }
    for name, number in groups.items():
        if name in shown:
            shown[name]["weight"] = _ordinary(shown[name]["weight"], number)
    return original(shown, target_spaces)
