"""Where masks hang on a model while they are learned."""

from __future__ import annotations

from torch import nn

from gumbel_plugin.masks.base import LearnedMask


class Gates(nn.Module):
    """Holds masks and a scale as a submodule of a layer.

    Dots in names become slashes, and so that a layer may be called ``values`` (as a method of ModuleDict is), such a
    name gets one at its end.
    """

    def __init__(self, masks: dict[str, LearnedMask], scale: nn.Parameter | None) -> None:
        super().__init__()
        keys = {name: name.replace(".", "/") + "/" * hasattr(nn.ModuleDict, name) for name in masks}
        self.masks = nn.ModuleDict({keys[name]: mask for name, mask in masks.items()})
        self.register_parameter("scale", scale)
