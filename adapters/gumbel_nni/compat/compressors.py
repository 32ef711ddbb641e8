"""Repairs of NNI's pruners and quantizers, and of how they share a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_nni.compat.patching import replace_once

_logger = logging.getLogger(__name__)


def two_pruners_on_one_layer() -> bool:
    """Let the masks of two pruners on one tensor multiply.

    Cause (a gap, whatever the versions): NNI drops the second pruner's settings, saying "already configured, the new
    config will be ignored".
    """
    from gumbel_nni.compat import stacking

    stacking.install()
    return True


def masks_of_unknown_modules() -> bool:
    """Let update_masks ignore masks of modules that a pruner does not wrap, as its docstring says.

    Cause (a slip, whatever the versions): it warns that they will be ignored, and goes on to a KeyError.
    """
    from nni.compression.base.compressor import Pruner

    replace_once(Pruner, "update_masks", _update_known_masks)
    return True


def slim_factors_in_weights() -> bool:
    """Let SlimPruner's learnt factors outlive its wrappers.

    Cause (a gap, whatever the versions): the network is trained with weight times factor, but unwrapping gives back
    the weight alone: another network. Remedy: unwrapping multiplies the factor in, and leaves ones.
    """
    from nni.compression.base.wrapper import ModuleWrapper

    replace_once(ModuleWrapper, "unwrap", _unwrap_with_factors)
    return True


def norm_pruners_in_fusion() -> bool:
    """Let Level, L1Norm, L2Norm and FPGM pruners prune when they are fused with something that trains.

    Cause (a gap, whatever the versions): their trigger waits for step ``interval_steps``, which is -1 unless a
    scheduler sets it: ``from_compressor`` and ``compress`` then train, and leave every mask open. Remedy: without
    a schedule they make their masks at the start, as they do when they are alone.
    """
    from nni.compression.pruning.basic_pruner import _NormPruner

    replace_once(_NormPruner, "_fuse_preprocess", _prune_at_the_start)
    return True


def parameters_survive_unwrapping() -> bool:
    """Give a layer its own parameters back when it is unwrapped.

    Cause (a gap, whatever the versions): unwrapping makes new Parameters. An optimizer that was made before, and an
    evaluator that holds one, then train parameters that are no longer the model's; without a word.
    """
    from nni.compression.base.wrapper import ModuleWrapper

    replace_once(ModuleWrapper, "wrap", _wrap_and_remember)
    replace_once(ModuleWrapper, "unwrap", _unwrap_and_restore)
    return True


def gradients_of_quantized_values() -> bool:
    """Let QAT and BNN quantizers run backward.

    Cause: ``ctx.saved_variables`` is deprecated since torch 0.4 and warns; and both write into the gradient that they
    are given, which belongs to whatever else reads it. Remedy: ``saved_tensors``, and a new tensor.
    """
    from nni.compression.base import apply_method

    apply_method.QATClampRound.backward = staticmethod(_qat_backward)
    apply_method.BNNClampRound.backward = staticmethod(_bnn_backward)
    return True


def _update_known_masks(self: Any, masks: Mapping[str, Mapping[str, Tensor | None]]) -> None:
    known = {name: targets for name, targets in masks.items() if name in self._module_wrappers}
    for name in masks.keys() - known.keys():
        _logger.warning("masks of %s are ignored: this pruner does not wrap it", name)
    _update_known_masks.__wrapped__(self, known)  # type: ignore[attr-defined]


@torch.no_grad()
def _unwrap_with_factors(self: Any) -> None:
    for name, space in self.pruning_target_spaces.items():
        factor = getattr(self, f"{name}_slim_factor", None)
        if factor is not None:
            spread = factor if space._scaler is None else space._scaler.expand(factor, space.shape, keepdim=True)
            space.target.mul_(spread)
            factor.fill_(1.0)
    _unwrap_with_factors.__wrapped__(self)  # type: ignore[attr-defined]


def _prune_at_the_start(self: Any, evaluator: Any) -> None:
    _prune_at_the_start.__wrapped__(self, evaluator)  # type: ignore[attr-defined]
    if self.interval_steps < 0 and not self.first_step_gen:
        self.update_masks(self.generate_masks())


def _wrap_and_remember(self: Any) -> None:
    targets = {**self.pruning_target_spaces, **self.quantization_target_spaces}
    own = {name: self.module._parameters.get(name) for name in targets}
    _wrap_and_remember.__wrapped__(self)  # type: ignore[attr-defined]
    if any(parameter is not None for parameter in own.values()):
        self._own_parameters = own


def _unwrap_and_restore(self: Any) -> None:
    _unwrap_and_restore.__wrapped__(self)  # type: ignore[attr-defined]
    for name, own in self.__dict__.pop("_own_parameters", {}).items():
        new = self.module._parameters.get(name)
        if isinstance(own, nn.Parameter) and isinstance(new, nn.Parameter):
            own.data = new.data
            own.requires_grad_(new.requires_grad)
            own.grad = None
            self.module._parameters[name] = own


def _qat_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (transformed,) = ctx.saved_tensors
    space = ctx.target_space
    outside = (transformed < space.qmin) | (transformed > space.qmax)
    return gradient.masked_fill(outside, 0.0), None


def _bnn_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    from nni.compression.base.target_space import TargetType

    (target,) = ctx.saved_tensors
    if ctx.target_space.type is TargetType.OUTPUT:
        gradient = gradient.masked_fill(target.abs() > 1, 0.0)
    return gradient, None
