"""Linear layers whose weight is (in, out): the ``Conv1D`` of transformers, which Torch-Pruning does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch_pruning as tp
from torch import nn

from gumbel_plugin.layers.geometry import is_input_major, layer_channels


class InputMajorPruner(tp.BasePruningFunc):  # type: ignore[misc]
    """Cuts them."""

    @classmethod
    def suits(cls, layer: nn.Module) -> bool:
        """Whether a layer is one."""
        return is_input_major(layer)

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """Remove output channels, in place."""
        kept = _kept(self.get_out_channels(layer), idxs)
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 1)
        if layer.bias is not None:
            layer.bias = self._prune_parameter_and_grad(layer.bias, kept, 0)
        layer.nf = len(kept)
        module: nn.Module = layer
        return module

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """Remove input channels, in place."""
        kept = _kept(self.get_in_channels(layer), idxs)
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 0)
        if hasattr(layer, "nx"):  # as of transformers 4.40
            layer.nx = len(kept)
        module: nn.Module = layer
        return module

    def get_out_channels(self, layer: nn.Module) -> int:
        """Return how many output channels there are."""
        return layer_channels(layer)[1]

    def get_in_channels(self, layer: nn.Module) -> int:
        """Return how many input channels there are."""
        return layer_channels(layer)[0]


def _kept(width: int, idxs: Sequence[int]) -> list[int]:
    removed = set(idxs)
    return [channel for channel in range(width) if channel not in removed]


def with_input_major(roots: Sequence[type[nn.Module]], model: nn.Module) -> tuple[type[nn.Module], ...]:
    """Return the kinds of layers that define groups: where linear layers do, so do these."""
    linear = any(issubclass(nn.Linear, root) for root in roots)
    found = {type(layer) for layer in model.modules() if linear and is_input_major(layer)}
    return (*roots, *sorted(found - set(roots), key=lambda kind: kind.__qualname__))
