"""Models that cannot get gates or lose channels as they are, and what to pass instead (nothing here imports NNI)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from gumbel_plugin.errors import ConfigError, LifecycleError, shown

WRAPPER = "_nni_wrapper"
"""The attribute under which NNI keeps a layer's wrapper."""


def refuse_wrapped(model: object, what: str) -> None:
    """Refuse a wrapped model where a plain one is needed.

    Raises:
        LifecycleError: If a compressor of NNI's wraps it; with the way out.
        ConfigError: See `refuse_unusable`.
    """
    for name, module in refuse_unusable(model, what).named_modules():
        if WRAPPER in module._modules:
            raise LifecycleError(
                f"{what} needs a plain model, but {name!r} is wrapped by a compressor: call that compressor's "
                "unwrap_model() first (its get_masks() stays)"
            )


def refuse_unusable(model: object, what: str) -> nn.Module:
    """Return a model that can be gated and shrunk as it is; refuse any other before it is touched.

    Args:
        model: What was passed as a model.
        what: Who needs it, for the message.

    Raises:
        ConfigError: If it is no module, is scripted or compiled, is wrapped for data parallel or sharded training, or
            has parameters without storage (meta device, lazy layers) or without gradients (inference mode).
    """
    if inspect.isclass(model):
        raise ConfigError(f"{what} needs a model, but got the class {model.__name__}: pass an instance of it")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{what} needs a model (a torch.nn.Module), but got {shown(model)}")
    for name, module in model.named_modules():
        _refuse_module(module, name, what)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        for rule, reason in _UNUSABLE_TENSORS.items():
            if reason(tensor):
                raise ConfigError(f"{what} cannot use the model: {name!r} {rule}")
    return model


def _refuse_module(module: nn.Module, name: str, what: str) -> None:
    """Refuse a module of a model that wraps others in a way that gates cannot follow.

    `DistributedDataParallel` takes note of the parameters once, when it wraps: gates that come later would be learned
    by every process for itself, without an error, and what replaces a parameter that shrinks is unknown to it.
    `DataParallel` copies modules for each device, but no session's hooks follow.
    """
    kind, place = type(module).__name__, repr(name) if name else "the model"
    inner = ".".join(filter(None, ("model", name)))
    problem = ""
    if isinstance(module, DataParallel | DistributedDataParallel):
        advice = f"pass the plain one ({inner}.module) here, and wrap with DistributedDataParallel afterwards"
        problem = f"wrapped in {kind}, which would not see the gates: {advice}"
    elif any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in type(module).__mro__):
        advice = "use DistributedDataParallel, or prune before sharding"
        problem = f"sharded by FSDP ({kind}), which gates do not support yet: {advice}"
    elif isinstance(module, torch.jit.ScriptModule):
        problem = f"scripted ({kind}): pass the model it was made of"
    elif hasattr(module, "_orig_mod"):  # torch.compile's OptimizedModule, whose class has no public name
        problem = f"compiled: pass the plain one ({inner}._orig_mod) here, and compile afterwards"
    if problem:
        raise ConfigError(f"{what} needs a plain model, but {place} is {problem}")


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id") or any(base.__name__ == "DTensor" for base in type(tensor).__mro__)


_UNUSABLE_TENSORS: dict[str, Callable[[Tensor], bool]] = {
    "has no shape yet; call the model once on a batch first": is_lazy,
    "is sharded (DTensor or DeepSpeed ZeRO-3), which gates do not support yet; prune before sharding": _is_sharded,
    "is on the meta device, without values; load or initialize the weights first": lambda t: t.is_meta,
    "was made in inference mode, so that it can have no gradient; build the model outside of torch.inference_mode": (
        lambda t: t.is_inference()
    ),
}
