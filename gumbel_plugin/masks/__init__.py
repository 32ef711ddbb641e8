"""What a mask is: one method a file, which registers itself when it is imported here."""

from gumbel_plugin.masks import (  # noqa: F401
    consensus,
    edge_popup,
    gibbs,
    gumbel_softmax,
    hard_concrete,
    magnitude,
    reparametrization,
    supermask,
)
from gumbel_plugin.masks.base import METHODS, LearnedMask, MaskOptions, NoiseSource, Phase, method_named

__all__ = ["METHODS", "LearnedMask", "MaskOptions", "NoiseSource", "Phase", "method_named"]
