"""Repairs of NNI's pruners and quantizers, and of how they share a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from nni.compression.base import apply_method, compressor, config
from nni.compression.base.compressor import Pruner
from nni.compression.base.target_space import TargetType
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.pruning.basic_pruner import _NormPruner
from nni.compression.pruning.tools import sparse_gen
from torch import Tensor, nn

from gumbel_nni.compat import stacking
from gumbel_nni.compat.patching import replaces

_logger = logging.getLogger(__name__)
_OWN = "_own_parameters"
_HOOK = "_unfusing_hook"


@replaces(config, "trans_legacy_config_list", compressor)
def total_sparsity_of_old_lists(original: Any, config_list: Any) -> Any:
    """Let config lists of NNI 2 share a budget by ``total_sparsity``.

    Cause (a slip, whatever the versions): they are translated with a key ``group_id``, which NNI's own schema rejects;
    it is called ``global_group_id``.
    """
    translated = original(config_list)
    for entry in translated or ():
        settings = (entry.get("target_settings") or {}).get("weight", {}) if isinstance(entry, dict) else {}
        if "group_id" in settings and entry not in config_list:
            settings["global_group_id"] = settings.pop("group_id")
    return translated


@replaces(Pruner, "update_masks")
def masks_of_unknown_modules(original: Any, self: Any, masks: Mapping[str, Mapping[str, Tensor | None]]) -> None:
    """Let update_masks ignore masks of modules that a pruner does not wrap, as its docstring says.

    Cause (a slip, whatever the versions): it warns that they will be ignored, and goes on to a KeyError.
    """
    known = {name: targets for name, targets in masks.items() if name in self._module_wrappers}
    for name in masks.keys() - known.keys():
        _logger.warning("masks of %s are ignored: this pruner does not wrap it", name)
    original(self, known)


@replaces(ModuleWrapper, "unwrap")
@torch.no_grad()
def slim_factors_in_weights(original: Any, self: Any) -> None:
    """Let SlimPruner's learned factors outlive its wrappers.

    Cause (a gap, whatever the versions): the network is trained with weight times factor, but unwrapping gives back
    the weight alone: another network. Remedy: unwrapping multiplies the factor in, and leaves ones.
    """
    for name, space in self.pruning_target_spaces.items():
        factor = getattr(self, f"{name}_slim_factor", None)
        if factor is not None:
            space.target.copy_(with_slim_factor(self, name, space.target))
            factor.fill_(1.0)
    original(self)


def with_slim_factor(wrapper: Any, target: str, tensor: Tensor) -> Tensor:
    """Return a tensor times the factor that a SlimPruner has learned for it, if there is one."""
    factor = getattr(wrapper, f"{target}_slim_factor", None)
    for space in stacking.spaces_of(wrapper, target):
        if factor is not None and space.apply_method == "slim_mul":
            spread = factor if space._scaler is None else space._scaler.expand(factor, space.shape, keepdim=True)
            scaled: Tensor = tensor * spread.detach()
            return scaled
    return tensor


@replaces(sparse_gen, "_generate_align_sparsity")
def biases_of_norms(original: Any, masks: Any, target_spaces: Any) -> Any:
    """Let the bias of a batch norm follow its weight's mask, as that of a convolution does.

    Cause: a mask is summed over the dimensions that the bias does not have; a batch norm has none of those, and
    ``tensor.sum([])`` sums over all of them. SlimPruner on batch norms then masks scales and no shifts, and channels
    that it closes still send their shift. Remedy: NNI is shown such a mask with a last dimension of size one.
    """
    shown = {
        name: {key: m.unsqueeze(-1) if m is not None and m.dim() == 1 else m for key, m in targets.items()}
        for name, targets in masks.items()
    }
    return original(shown, target_spaces)


@replaces(_NormPruner, "_fuse_preprocess")
def norm_pruners_in_fusion(original: Any, self: Any, evaluator: Any) -> None:
    """Let Level, L1Norm, L2Norm and FPGM pruners prune when they are fused with something that trains.

    Cause (a gap, whatever the versions): their trigger waits for step ``interval_steps``, which is -1 unless a
    scheduler sets it: ``from_compressor`` and ``compress`` then train, and leave every mask open. Remedy: without
    a schedule, and if they have none yet, they make their masks at the start, as they do when they are alone.
    """
    original(self, evaluator)
    masks = [space.mask for targets in self._target_spaces.values() for space in targets.values()]
    untouched = all(mask is None or bool((mask == 1).all()) for mask in masks)
    if self.interval_steps < 0 and untouched:
        self.update_masks(self.generate_masks())


@replaces(ModuleWrapper, "wrap")
def layers_survive_unwrapping(original: Any, self: Any) -> None:
    """Give a layer its own parameters back when it is unwrapped, in their order, and its class's forward.

    Cause (a gap, whatever the versions): unwrapping makes new Parameters, and appends them. An optimizer that was made
    before, and an evaluator that holds one, then train parameters that are no longer the model's, without a word;
    and a saved optimizer state no longer fits. A bound method stays behind as the layer's forward.
    """
    own, forward = dict(self.module._parameters), vars(self.module).get("forward")
    original(self)
    self.__dict__[_OWN] = own, forward


@replaces(ModuleWrapper, "unwrap", part_of=layers_survive_unwrapping)
def _unwrap_and_restore(original: Any, self: Any) -> None:
    original(self)
    new = self.module._parameters
    own, forward = self.__dict__.pop(_OWN, ({}, None))
    if forward is None:
        vars(self.module).pop("forward", None)
    for name, parameter in own.items():
        if isinstance(parameter, nn.Parameter) and isinstance(new.get(name), nn.Parameter):
            parameter.data = new[name].data
            parameter.requires_grad_(new[name].requires_grad)
            new[name] = parameter
    for name in own:  # in the old order
        if name in new:
            new[name] = new.pop(name)


@replaces(ModuleWrapper, "wrap")
def wrapped_layers_in_fused_kernels(original: Any, self: Any) -> None:
    """Let ``nn.TransformerEncoderLayer`` call its wrapped layers in eval mode, too.

    Cause: its fused kernel (from torch 1.12) reads the weights of its linear layers without calling them: a masked
    model is evaluated as if it was dense. Any hook inside of it switches the kernel off. Remedy: one that does nothing
    on every wrapped layer.
    """
    original(self)
    self.__dict__[_HOOK] = self.module.register_forward_pre_hook(_do_nothing)


@replaces(ModuleWrapper, "unwrap", part_of=wrapped_layers_in_fused_kernels)
def _unwrap_without_hook(original: Any, self: Any) -> None:
    if _HOOK in self.__dict__:
        self.__dict__.pop(_HOOK).remove()
    original(self)


def _do_nothing(module: nn.Module, args: Any) -> None:
    """Be there."""


@replaces(apply_method.QATClampRound, "backward")
def gradients_of_quantized_values(original: Any, ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    """Let QAT and BNN quantizers run backward.

    Cause: ``ctx.saved_variables`` is deprecated since torch 0.4 and warns; and both write into the gradient that they
    are given, which belongs to whatever else reads it. Remedy: ``saved_tensors``, and a new tensor.
    """
    (transformed,) = ctx.saved_tensors
    space = ctx.target_space
    outside = (transformed < space.qmin) | (transformed > space.qmax)
    return gradient.masked_fill(outside, 0.0), None


@replaces(apply_method.BNNClampRound, "backward", part_of=gradients_of_quantized_values)
def _bnn_backward(original: Any, ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (target,) = ctx.saved_tensors
    if ctx.target_space.type is TargetType.OUTPUT:
        gradient = gradient.masked_fill(target.abs() > 1, 0.0)
    return gradient, None
