"""The weights of a network and of its layers, whatever hangs on them: the one place that reads and writes them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

GATES = "gumbel_gates"
"""The attribute of a gated layer under which its masks and scale are registered, so that DDP and checkpoints see them.

They hang on layers, not on the model: the model may be an `nn.Sequential`, which would call them.
"""
_REMOVERS = {WeightNorm: "remove_weight_norm", SpectralNorm: "remove_spectral_norm"}
_HOLDERS: list[Callable[[nn.Module], nn.Module | None]] = []


class Attached:
    """Marks what hangs hooks on a model for a session, so that a copy of the model can do without them."""


def register_weight_holder(find: Callable[[nn.Module], nn.Module | None]) -> None:
    """Let the parameters of layers be read and written where a wrapper around the layers keeps them.

    Args:
        find: Returns the module that has a layer's parameters now, None if the layer has them itself.
    """
    _HOLDERS.append(find)


def read_weight(layer: nn.Module) -> Tensor:
    """Return a layer's weight: a parameter, the buffer of a frozen norm, or what a parametrization computes.

    It is the layer's own also while the gated weight of a forward hides it, or a wrapper has it.
    """
    weight = read_tensor(layer, "weight")
    weight = layer.weight if weight is None else weight  # type: ignore[assignment]
    assert isinstance(weight, Tensor)
    return weight


def read_bias(layer: nn.Module) -> Tensor | None:
    """Return a layer's bias as `read_weight` does its weight, None if it has none."""
    return read_tensor(layer, "bias")


@torch.no_grad()
def write_weight(layer: nn.Module, values: Tensor) -> None:
    """Write new values of the same shape into what `read_weight` returns, or through a parametrization."""
    weight = read_tensor(layer, "weight")
    if weight is None:
        layer.weight = values
    else:
        weight.copy_(values)


def read_tensor(layer: nn.Module, name: str) -> Tensor | None:
    """Return a parameter or buffer that a layer, or a wrapper for it, stores under a name; None if there is none."""
    holders = [holder for find in _HOLDERS if (holder := find(layer)) is not None]
    owned = (each._parameters.get(name) for each in (*holders, layer))
    return next((parameter for parameter in owned if parameter is not None), layer._buffers.get(name))


def is_gate(name: str) -> bool:
    """Whether a name in a model is that of gates, or of something in them; all other names are the network's own."""
    return GATES in name


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a network without that of its gates."""
    return {name: tensor for name, tensor in model.state_dict().items() if not is_gate(name)}


def own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a network that are trained, without those of its gates."""
    return [each for name, each in model.named_parameters() if each.requires_grad and not is_gate(name)]


def modules_with_gates(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model that carry gates."""
    return [module for module in model.modules() if GATES in module._modules]


def remove_gates(model: nn.Module) -> None:
    """Remove the gates that hang on a model's layers."""
    for layer in modules_with_gates(model):
        delattr(layer, GATES)


def unhide_weight(layer: nn.Module) -> None:
    """Remove an attribute that hides the layer's own weight: a parameter, or a buffer while a wrapper has that."""
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
        for kind, remover in _REMOVERS.items():
            if isinstance(hook, kind):
                return f"torch.nn.utils.{remover}(layer)"
    return ""
