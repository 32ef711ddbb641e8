"""Where masks hang on a model while they are learned."""

from __future__ import annotations

from torch import nn

from gumbel_plugin.layers.weights import GATES
from gumbel_plugin.masks.base import LearnedMask
from gumbel_plugin.training.bank import BANK, GateSlice
from gumbel_plugin.training.plan import Plan


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


def register_gates(plan: Plan, training: bool) -> None:
    """Register every mask of a plan with the first layer that it acts on."""
    names = {id(mask): name for name, mask in plan.masks.items()}
    registered: set[int] = set()
    for gated in plan.gated_layers.values():
        masks = [mask.bank if isinstance(mask, GateSlice) else mask for mask in gated.masks]
        new = {names.get(id(mask), BANK): mask for mask in masks if id(mask) not in registered}
        registered.update(id(mask) for mask in masks)
        gates = Gates(new, gated.scale).to(gated.weight.device).train(training)
        gated.module.add_module(GATES, gates)
