"""A small network from the masks of any pruner of NNI's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from gumbel_nni.compat.exact_speedup import remove_by_nni
from gumbel_plugin.errors import ConfigError, nearest
from gumbel_plugin.layers.example_inputs import ExampleInputs
from gumbel_plugin.layers.model_check import refuse_wrapped
from gumbel_plugin.shrinking.mask_file import load_masks
from gumbel_plugin.shrinking.shrink import Engine, shrink

Backend = Literal["torch_pruning", "nni"]
"""What removes channels: Torch-Pruning's functions, or NNI's ModelSpeedup. Both give the same network."""
_ENGINES: dict[str, Engine | None] = {"torch_pruning": None, "nni": remove_by_nni}


def speedup(
    model: nn.Module,
    masks: Mapping[str, Mapping[str, Tensor | None]] | str | Path,
    example_inputs: ExampleInputs,
    *,
    backend: Backend = "torch_pruning",
    verify: bool = True,
) -> nn.Module:
    """Return a smaller dense model that computes what a pruner's wrapped model computes.

    What ``ModelSpeedup(model, example_inputs, masks).speedup_model()`` is meant to be, for the masks of any pruner:
    Level, L1Norm, L2Norm, FPGM, Taylor, Slim (on weights, or on the scales of batch norms), Movement, Gumbel. NNI's
    own takes a masked channel for zero wherever it is read, which it is not after a batch norm, an addition or a
    sigmoid. Here a channel leaves if it is read as zero; several that are read as constants become one; a channel that
    a residual connection fills from elsewhere stays (give its layers one ``dependency_group_id``).

    Example::

        pruner = L1NormPruner(model, config_list)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        small = gumbel_nni.speedup(model, masks, example_inputs)

    Args:
        model: The plain model, unwrapped. It is left alone, and so are its train/eval flags.
        masks: The pruner's `get_masks`, or the path of a masks file; left alone too.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs, batch first.
        backend: What removes the channels: Torch-Pruning, or NNI's own ModelSpeedup, which takes about three times as
            long. Both give the same network; where NNI's leaves channels in it, Torch-Pruning takes over with a
            warning.
        verify: Whether to compare the outputs before returning.

    Returns:
        The smaller model. Where masks close something of which nothing can leave, it is as large as the given one, and
        a warning names the layers and the reasons.

    Raises:
        ConfigError: If the backend is unknown, or a parallel wrapper holds the model.
        LifecycleError: If the model is wrapped.
        TargetError: If a mask's module or tensor does not exist, or its shape does not fit.
        GraphError: If the model cannot be traced.
        EquivalenceError: If the small model's outputs differ from the masked model's.
        DataError: If the masks file cannot be read.
    """
    refuse_wrapped(model, "speedup")
    given = load_masks(masks) if isinstance(masks, str | Path) else masks
    if backend not in _ENGINES:
        raise ConfigError(f"backend {backend!r} is unknown{nearest(backend, _ENGINES)}")
    return shrink(model, given, example_inputs, verify, engine=_ENGINES[backend])
