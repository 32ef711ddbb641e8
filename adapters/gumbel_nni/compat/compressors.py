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
from gumbel_nni.compat.patching import replace_once

_logger = logging.getLogger(__name__)
_OWN = "_own_parameters"
_HOOK = "_unfusing_hook"


def two_pruners_on_one_layer() -> bool:
    """Let the masks of two pruners on one tensor multiply.

    Cause (a gap, whatever the versions): NNI drops the second pruner's settings, saying "already configured, the new
    config will be ignored".
    """
    return stacking.install()


def total_sparsity_of_old_lists() -> bool:
    """Let config lists of NNI 2 share a budget by ``total_sparsity``.

    Cause (a slip, whatever the versions): they are translated with a key ``group_id``, which NNI's own schema rejects;
    it is called ``global_group_id``.
    """
    return replace_once("trans_legacy_config_list", _translated, config, compressor)


def masks_of_unknown_modules() -> bool:
    """Let update_masks ignore masks of modules that a pruner does not wrap, as its docstring says.

    Cause (a slip, whatever the versions): it warns that they will be ignored, and goes on to a KeyError.
    """
    return replace_once("update_masks", _update_known_masks, Pruner)


def slim_factors_in_weights() -> bool:
    """Let SlimPruner's learned factors outlive its wrappers.

    Cause (a gap, whatever the versions): the network is trained with weight times factor, but unwrapping gives back
    the weight alone: another network. Remedy: unwrapping multiplies the factor in, and leaves ones.
    """
    return replace_once("unwrap", _unwrap_with_factors, ModuleWrapper)


def biases_of_norms() -> bool:
    """Let the bias of a batch norm follow its weight's mask, as that of a convolution does.

    Cause: a mask is summed over the dimensions that the bias does not have; a batch norm has none of those, and
    ``tensor.sum([])`` sums over all of them. SlimPruner on batch norms then masks scales and no shifts, and channels
    that it closes still send their shift. Remedy: such a mask is not summed.
    """
    return replace_once("_generate_align_sparsity", _generate_align_sparsity, sparse_gen)


def norm_pruners_in_fusion() -> bool:
    """Let Level, L1Norm, L2Norm and FPGM pruners prune when they are fused with something that trains.

    Cause (a gap, whatever the versions): their trigger waits for step ``interval_steps``, which is -1 unless a
    scheduler sets it: ``from_compressor`` and ``compress`` then train, and leave every mask open. Remedy: without
    a schedule, and if they have none yet, they make their masks at the start, as they do when they are alone.
    """
    return replace_once("_fuse_preprocess", _prune_at_the_start, _NormPruner)


def layers_survive_unwrapping() -> bool:
    """Give a layer its own parameters back when it is unwrapped, in their order, and its class's forward.

    Cause (a gap, whatever the versions): unwrapping makes new Parameters, and appends them. An optimizer that was made
    before, and an evaluator that holds one, then train parameters that are no longer the model's, without a word;
    and a saved optimizer state no longer fits. A bound method stays behind as the layer's forward.
    """
    replace_once("wrap", _wrap_and_remember, ModuleWrapper)
    return replace_once("unwrap", _unwrap_and_restore, ModuleWrapper)


def wrapped_layers_in_fused_kernels() -> bool:
    """Let ``nn.TransformerEncoderLayer`` call its wrapped layers in eval mode, too.

    Cause: its fused kernel (from torch 1.12) reads the weights of its linear layers without calling them: a masked
    model is evaluated as if it was dense. Any hook inside of it switches the kernel off. Remedy: one that does nothing
    on every wrapped layer.
    """
    replace_once("wrap", _wrap_with_hook, ModuleWrapper)
    return replace_once("unwrap", _unwrap_without_hook, ModuleWrapper)


def gradients_of_quantized_values() -> bool:
    """Let QAT and BNN quantizers run backward.

    Cause: ``ctx.saved_variables`` is deprecated since torch 0.4 and warns; and both write into the gradient that they
    are given, which belongs to whatever else reads it. Remedy: ``saved_tensors``, and a new tensor.
    """
    replace_once("backward", _qat_backward, apply_method.QATClampRound)
    return replace_once("backward", _bnn_backward, apply_method.BNNClampRound)


def _translated(original: Any, config_list: Any) -> Any:
    translated = original(config_list)
    for entry in translated or ():
        settings = (entry.get("target_settings") or {}).get("weight", {}) if isinstance(entry, dict) else {}
        if "group_id" in settings and entry not in config_list:
            settings["global_group_id"] = settings.pop("group_id")
    return translated


def _update_known_masks(original: Any, self: Any, masks: Mapping[str, Mapping[str, Tensor | None]]) -> None:
    known = {name: targets for name, targets in masks.items() if name in self._module_wrappers}
    for name in masks.keys() - known.keys():
        _logger.warning("masks of %s are ignored: this pruner does not wrap it", name)
    original(self, known)


def with_slim_factor(wrapper: Any, target: str, tensor: Tensor) -> Tensor:
    """Return a tensor times the factor that a SlimPruner has learned for it, if there is one."""
    factor = getattr(wrapper, f"{target}_slim_factor", None)
    for space in stacking.spaces_of(wrapper, target):
        if factor is not None and space.apply_method == "slim_mul":
            spread = factor if space._scaler is None else space._scaler.expand(factor, space.shape, keepdim=True)
            scaled: Tensor = tensor * spread.detach()
            return scaled
    return tensor


@torch.no_grad()
def _unwrap_with_factors(original: Any, self: Any) -> None:
    for name, space in self.pruning_target_spaces.items():
        factor = getattr(self, f"{name}_slim_factor", None)
        if factor is not None:
            space.target.copy_(with_slim_factor(self, name, space.target))
            factor.fill_(1.0)
    original(self)


def _generate_align_sparsity(original: Any, masks: Any, target_spaces: Any) -> Any:
    """Show NNI a mask without dimensions to sum over as one that has a last dimension of size one."""
    shown = {
        name: {key: m.unsqueeze(-1) if m is not None and m.dim() == 1 else m for key, m in targets.items()}
        for name, targets in masks.items()
    }
    return original(shown, target_spaces)


def _prune_at_the_start(original: Any, self: Any, evaluator: Any) -> None:
    original(self, evaluator)
    masks = [space.mask for targets in self._target_spaces.values() for space in targets.values()]
    untouched = all(mask is None or bool((mask == 1).all()) for mask in masks)
    if self.interval_steps < 0 and untouched:
        self.update_masks(self.generate_masks())


def _wrap_and_remember(original: Any, self: Any) -> None:
    own, forward = dict(self.module._parameters), vars(self.module).get("forward")
    original(self)
    self.__dict__[_OWN] = own, forward


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


def _wrap_with_hook(original: Any, self: Any) -> None:
    original(self)
    self.__dict__[_HOOK] = self.module.register_forward_pre_hook(_do_nothing)


def _unwrap_without_hook(original: Any, self: Any) -> None:
    if _HOOK in self.__dict__:
        self.__dict__.pop(_HOOK).remove()
    original(self)


def _do_nothing(module: nn.Module, args: Any) -> None:
    """Be there."""


def _qat_backward(original: Any, ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (transformed,) = ctx.saved_tensors
    space = ctx.target_space
    outside = (transformed < space.qmin) | (transformed > space.qmax)
    return gradient.masked_fill(outside, 0.0), None


def _bnn_backward(original: Any, ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (target,) = ctx.saved_tensors
    if ctx.target_space.type is TargetType.OUTPUT:
        gradient = gradient.masked_fill(target.abs() > 1, 0.0)
    return gradient, None
