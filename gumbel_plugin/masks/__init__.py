"""What a mask is: one method per file, one base class, one registry line each."""

from __future__ import annotations

from gumbel_plugin.errors import ConfigError, nearest, shown
from gumbel_plugin.masks.base import LearnedMask, MaskOptions, NoiseSource, Phase
from gumbel_plugin.masks.consensus import ConsensusMask
from gumbel_plugin.masks.edge_popup import EdgePopupMask
from gumbel_plugin.masks.gibbs import GibbsMask
from gumbel_plugin.masks.gumbel_softmax import GumbelSoftmaxMask
from gumbel_plugin.masks.hard_concrete import HardConcreteMask
from gumbel_plugin.masks.magnitude import MagnitudeMask, RandomMask
from gumbel_plugin.masks.reparametrization import ReparametrizationMask
from gumbel_plugin.masks.supermask import Supermask

METHODS: dict[str, type[LearnedMask]] = {
    "gumbel_softmax": GumbelSoftmaxMask,
    "supermask": Supermask,
    "edge_popup": EdgePopupMask,
    "hard_concrete": HardConcreteMask,
    "reparametrization": ReparametrizationMask,
    "gibbs": GibbsMask,
    "consensus": ConsensusMask,
    "magnitude": MagnitudeMask,
    "random": RandomMask,
}


def method_named(name: str) -> type[LearnedMask]:
    """Return the mask class of a method.

    Raises:
        ConfigError: If there is no method of that name.
    """
    if name not in METHODS:
        raise ConfigError(f"pruning.method {shown(name)} is unknown{nearest(name, METHODS)}")
    return METHODS[name]


def name_of(method: type[LearnedMask]) -> str:
    """Return the name that a configuration has for a mask class, or the class's own if it is not registered."""
    return next((name for name, known in METHODS.items() if known is method), method.__name__)


__all__ = [
    "METHODS",
    "ConsensusMask",
    "EdgePopupMask",
    "GibbsMask",
    "GumbelSoftmaxMask",
    "HardConcreteMask",
    "LearnedMask",
    "MagnitudeMask",
    "MaskOptions",
    "NoiseSource",
    "Phase",
    "RandomMask",
    "ReparametrizationMask",
    "Supermask",
    "method_named",
    "name_of",
]
