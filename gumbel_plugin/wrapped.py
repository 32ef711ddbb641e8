"""Models whose layers a compressor of NNI's has wrapped: told apart without importing NNI."""

from __future__ import annotations

from torch import nn

from gumbel_plugin.errors import LifecycleError

WRAPPER = "_nni_wrapper"
"""The attribute under which NNI keeps a layer's wrapper."""


def refuse_wrapped(model: nn.Module, what: str) -> None:
    """Refuse a wrapped model where a plain one is needed.

    Raises:
        LifecycleError: With the way out.
    """
    for name, module in model.named_modules():
        if WRAPPER in module._modules:
            raise LifecycleError(
                f"{what} needs a plain model, but {name!r} is wrapped by a compressor: call that compressor's "
                "unwrap_model() first (its get_masks() stays)"
            )
