"""The weights of a network and of its layers, whatever hangs on them: the one place that reads and writes them."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils import parametrize, prune

GATES = "gumbel_gates"
"""The attribute of a gated layer under which its masks and scale are registered, so that DDP and checkpoints see them.

They hang on layers, not on the model: the model may be an `nn.Sequential`, which would call them.
"""


class Attached:
    """Marks what hangs hooks on a model for a session, so that a copy of the model can do without them."""


def modules_with_gates(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model that carry gates."""
    return [module for module in model.modules() if GATES in module._modules]


def remove_gates(model: nn.Module) -> None:
    """Remove the gates that hang on a model's layers."""
    for layer in modules_with_gates(model):
        delattr(layer, GATES)


def unhide_weight(layer: nn.Module) -> None:
    """Remove an attribute that hides the layer's own weight: a parameter, or a buffer while NNI wraps the layer."""
    if "weight" in layer._parameters or "weight" in layer._buffers:
        layer.__dict__.pop("weight", None)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model without a session's gates and hooks."""
    for layer in modules_with_gates(model):
        unhide_weight(layer)  # what an interrupted forward left cannot be copied
    duplicate = copy.deepcopy(model)
    remove_gates(duplicate)
    for module in duplicate.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), Attached):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
    return duplicate


def how_to_keep_weights(layer: nn.Module) -> str:
    """Return the call that makes the computed weight of a layer an ordinary parameter; empty for ordinary layers."""
    if parametrize.is_parametrized(layer):
        return "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            return f"torch.nn.utils.prune.remove(layer, {hook._tensor_name!r})"
        if type(hook).__name__ in _REMOVERS and type(hook).__module__.startswith("torch.nn.utils"):
            return f"torch.nn.utils.{_REMOVERS[type(hook).__name__]}(layer)"
    return ""


_REMOVERS = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
