"""Models that are wrapped where a plain one is needed: by torch, or by a compressor of NNI (which is not imported)."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gumbel_plugin.errors import ConfigError, LifecycleError

WRAPPER = "_nni_wrapper"
"""The attribute under which NNI keeps a layer's wrapper."""


def refuse_wrapped(model: nn.Module, what: str) -> None:
    """Refuse a wrapped model where a plain one is needed.

    Raises:
        LifecycleError: If a compressor of NNI's wraps it; with the way out.
        ConfigError: See `refuse_parallel`.
    """
    refuse_parallel(model, what)
    for name, module in model.named_modules():
        if WRAPPER in module._modules:
            raise LifecycleError(
                f"{what} needs a plain model, but {name!r} is wrapped by a compressor: call that compressor's "
                "unwrap_model() first (its get_masks() stays)"
            )


def refuse_parallel(model: nn.Module, what: str) -> None:
    """Refuse a model that is wrapped for data parallel training, as a whole or in part, too early.

    `DistributedDataParallel` takes note of the parameters once, when it wraps: gates that come later would be learnt by
    every process for itself, without an error, and what replaces a parameter that shrinks is unknown to it.
    `DataParallel` copies modules for each device, but no session's hooks follow.

    Raises:
        ConfigError: With what to write instead.
    """
    for name, module in model.named_modules():
        if isinstance(module, DataParallel | DistributedDataParallel):
            kind = type(module).__name__
            inner = ".".join(filter(None, ("model", name, "module")))
            raise ConfigError(
                f"{what} needs a plain model, but {repr(name) if name else 'the model'} is wrapped in {kind}, which "
                f"would not see the gates: pass the plain one ({inner}) here, and wrap with DistributedDataParallel "
                "afterwards"
            )
