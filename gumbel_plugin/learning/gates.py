"""Where masks hang on a model while they are learnt."""

from __future__ import annotations

import copy

from torch import nn

from gumbel_plugin.masks.base import LearntMask

GATES = "gumbel_gates"
"""The attribute of a gated layer under which its masks and scale are registered, so that DDP and checkpoints see them.

They hang on layers, not on the model: the model may be an `nn.Sequential`, which would call them.
"""


class Attached:
    """Marks what hangs hooks on a model for a session, so that a copy of the model can do without them."""


class Gates(nn.Module):
    """Holds masks and a scale as a submodule of a layer.

    Dots in names become slashes, and so that a layer may be called ``values`` (as a method of ModuleDict is), such a
    name gets one at its end.
    """

    def __init__(self, masks: dict[str, LearntMask], scale: nn.Parameter | None) -> None:
        super().__init__()
        keys = {name: name.replace(".", "/") + "/" * hasattr(nn.ModuleDict, name) for name in masks}
        self.masks = nn.ModuleDict({keys[name]: mask for name, mask in masks.items()})
        self.register_parameter("scale", scale)


def gated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model that carry gates."""
    return [module for module in model.modules() if isinstance(getattr(module, GATES, None), Gates)]


def remove_gates(model: nn.Module) -> None:
    """Remove the gates that hang on a model's layers."""
    for layer in gated_layers(model):
        delattr(layer, GATES)


def unhide_weight(layer: nn.Module) -> None:
    """Remove an attribute that hides the layer's own weight: a parameter, or a buffer while NNI wraps the layer."""
    if "weight" in layer._parameters or "weight" in layer._buffers:
        layer.__dict__.pop("weight", None)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model without a session's gates and hooks."""
    for layer in gated_layers(model):
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
