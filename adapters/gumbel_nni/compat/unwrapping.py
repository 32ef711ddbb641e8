"""Plain copies of wrapped models."""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from nni.compression.base.target_space import TargetType
from nni.compression.base.wrapper import ModuleWrapper
from torch import Tensor, nn

from gumbel_nni.compat.compressors import with_slim_factor
from gumbel_nni.compat.patching import innermost
from gumbel_nni.compat.stacking import spaces_of
from gumbel_plugin.layers.model_check import WRAPPER
from gumbel_plugin.layers.weights import remove_gates
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.training.gated_layer import GatedLayer

GATED_LAYER = "gumbel_site"
"""The attribute of a target space under which a `GumbelPruner` keeps the gated layer that acts there."""


def wrappers_of(model: nn.Module) -> dict[str, ModuleWrapper]:
    """Return the wrappers that a compressor has put around a model's layers, by the layer's name."""
    wrapped = {name: module._modules.get(WRAPPER) for name, module in model.named_modules()}
    return {name: wrapper for name, wrapper in wrapped.items() if isinstance(wrapper, ModuleWrapper)}


def unwrapped_copy(model: nn.Module) -> nn.Module:
    """Return a plain deep copy of a wrapped model: no wrappers, no gates; the model itself stays as it is.

    What compressors hold beside the model (evaluators, teachers, data) is not copied.
    """
    wrappers = wrappers_of(model)
    memo: dict[int, Any] = {id(wrapper): nn.Identity() for wrapper in wrappers.values()}
    for wrapper in wrappers.values():
        for buffer in wrapper.module._buffers.values():
            if buffer is not None and buffer.grad_fn is not None:  # the masked weight of the last forward
                memo[id(buffer)] = buffer.detach()
    duplicate = copy.deepcopy(model, memo)
    for name, wrapper in wrappers.items():
        _unwrap(duplicate.get_submodule(name), wrapper)
    remove_gates(duplicate)
    return duplicate


@torch.no_grad()
def _unwrap(layer: nn.Module, wrapper: ModuleWrapper) -> None:
    """Do for a copied layer what the wrapper would do for its own."""
    forward = getattr(wrapper.module_forward, "__func__", None)
    stand_in = copy.copy(wrapper)
    object.__setattr__(stand_in, "module", layer)
    stand_in.module_forward = types.MethodType(forward, layer) if forward else wrapper.module_forward
    innermost(ModuleWrapper.unwrap)(stand_in)  # the repairs around it are for the wrapper's own layer
    if forward is getattr(type(layer), "forward", None):
        del layer.forward
    for target, space in wrapper.pruning_target_spaces.items():
        if space.type is TargetType.PARAMETER and isinstance(space.target, Tensor):
            getattr(layer, target).copy_(_decided(wrapper, target, space.target))


def _decided(wrapper: ModuleWrapper, target: str, tensor: Tensor) -> Tensor:
    """Return a tensor with what a wrapper does to it for good: learned factors, and gates that were decided."""
    tensor = with_slim_factor(wrapper, target, tensor)
    for space in spaces_of(wrapper, target):
        gated: GatedLayer | None = getattr(space, GATED_LAYER, None)
        if gated is not None and gated.phases == {Phase.FIXED}:
            tensor = gated.apply(tensor)
    return tensor
