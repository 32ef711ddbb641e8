"""How wide every layer was, and is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from gumbel_plugin.layers.geometry import is_matrix, layer_channels


@dataclass(frozen=True)
class LayerWidth:
    """The channels of one convolution or linear layer, before and after.

    Attributes:
        name: The layer's name.
        kind: Its class.
        before: Input and output channels in the dense network.
        after: The same in the small one; None if the layer is not there any more.
    """

    name: str
    kind: str
    before: tuple[int, int]
    after: tuple[int, int] | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain types, ready for JSON."""
        return asdict(self)


def layer_widths(dense: nn.Module, small: nn.Module) -> list[LayerWidth]:
    """Return the widths of every convolution and linear layer of the dense network, in its order."""
    left = dict(small.named_modules())
    found = []
    for name, module in dense.named_modules():
        if is_matrix(module):
            after = layer_channels(left[name]) if name in left and is_matrix(left[name]) else None
            found.append(LayerWidth(name, type(module).__name__, layer_channels(module), after))
    return found


def misaligned(widths: Sequence[LayerWidth], multiple: int = 8) -> list[LayerWidth]:
    """Return the layers that lost output channels and kept a number which is no multiple of what kernels like."""
    return [w for w in widths if w.after and w.after[1] != w.before[1] and w.after[1] % multiple]
