"""What was decided over several steps of pruning, in the numbering of the original network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.layers.geometry import output_dimension
from gumbel_plugin.storage.mask_format import Masks


class Record:
    """The masks of the original network, and which of its units are left.

    Every step of an iterative pruning numbers the units of its groups anew; here they keep their first numbers.

    Attributes:
        masks: NNI's format, on the original shapes: 0 where a producer's row is gone.
    """

    def __init__(self) -> None:
        self.masks: Masks = {}
        self._left: dict[str, Tensor] = {}
        self._rows: dict[str, list[tuple[str, int, Tensor, Tensor]]] = {}

    def start(self, model: nn.Module, groups: Mapping[str, ChannelGroup], masks: Masks) -> None:
        """Note the network and its groups before anything is removed, and the masks that say what will be.

        Args:
            model: The original network.
            groups: The gated groups, by name.
            masks: What the first step decided.
        """
        self.masks = {name: {target: mask.clone() for target, mask in own.items()} for name, own in masks.items()}
        self._left = {name: torch.arange(group.size) for name, group in groups.items()}
        self._rows = {}
        for name, group in groups.items():
            parts = [(part, output_dimension(model.get_submodule(part.module))) for part in group.producers]
            self._rows[name] = [(part.module, dim or 0, part.positions, part.units) for part, dim in parts]

    def remove(self, removed: Mapping[str, Tensor]) -> None:
        """Note that units of groups go, in the numbers that they have now."""
        for name, units in removed.items():
            if name not in self._left:
                continue
            left = self._left[name]
            gone = left[units]
            self._left[name] = left[~torch.isin(left, gone)]
            for module, dimension, positions, own in self._rows[name]:
                rows = positions[torch.isin(own, gone)]
                for target, mask in self.masks.get(module, {}).items():
                    mask.index_fill_(dimension if target == "weight" else 0, rows.to(mask.device), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return everything, in plain types and tensors of its own: later steps do not change it."""
        rows = {name: [list(row) for row in own] for name, own in self._rows.items()}
        return copy.deepcopy({"masks": self.masks, "left": self._left, "rows": rows})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        state = copy.deepcopy({key: state[key] for key in ("masks", "left", "rows")})
        self.masks, self._left = state["masks"], state["left"]
        self._rows = {name: [(m, d, p, u) for m, d, p, u in own] for name, own in state["rows"].items()}
