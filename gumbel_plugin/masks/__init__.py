"""What a mask is: one method per file, one base class, one registry line each."""

from __future__ import annotations

from gumbel_plugin.errors import ConfigError, nearest
from gumbel_plugin.masks.base import LearntMask, MaskOptions, NoiseSource, Phase
from gumbel_plugin.masks.gumbel_softmax import GumbelSoftmaxMask

METHODS: dict[str, type[LearntMask]] = {
    "gumbel_softmax": GumbelSoftmaxMask,
}


def method_named(name: str) -> type[LearntMask]:
    """Return the mask class of a method.

    Raises:
        ConfigError: If there is no method of that name.
    """
    if name not in METHODS:
        raise ConfigError(f"pruning.method {name!r} is unknown{nearest(name, METHODS)}")
    return METHODS[name]


__all__ = ["METHODS", "GumbelSoftmaxMask", "LearntMask", "MaskOptions", "NoiseSource", "Phase", "method_named"]
