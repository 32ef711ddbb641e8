"""Which channel groups are exact: every layer's channels get labels, which are followed through one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.graph.exactness.broadcasting import Broadcast
from gumbel_plugin.graph.exactness.channel_labels import Safety
from gumbel_plugin.graph.exactness.label_classes import LabelClasses, find_classes
from gumbel_plugin.graph.exactness.layer_rules import Layers, Side, Treatment
from gumbel_plugin.layers.example_inputs import named_tensors

Cut = tuple[Side, Tensor, Tensor]
"""What a group would remove on one side of a layer: channel numbers, and the group's unit that each belongs to."""


class ExactnessAnalysis:
    """Knows where every channel of a model goes.

    Torch-Pruning's graph says which channels a group removes. This says, independently, which channels meet, who reads
    them, and what else happens to them. A group is exact if both agree and nothing else happens.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[nn.Parameter, tuple[str, int]],
        treatments: Mapping[nn.Module, Treatment],
    ) -> None:
        """Start before the forward.

        Args:
            model: The plain model.
            parameters: Parameters that belong to no known layer: their names, and the dimension in which they are cut.
            treatments: What is known of layers that are none of torch's own.
        """
        self._model = model
        self._layers = Layers(treatments)
        self._labels = self._layers.flow.labels
        for parameter, (name, dim) in parameters.items():
            self._layers.label_parameter(parameter, name, dim)

    def follow(self, forward: Callable[[], Any]) -> Any:
        """Follow the labels through one forward of the model, in eval mode, and return its output."""
        layers, labels = self._layers, self._labels
        with _plain_attention(), layers.watched(self._model), layers.flow:
            output = forward()
        layers.note([tensor for _, tensor in named_tensors(output)], "unsupported", "it reaches the network's output")
        layers.reject_external_uses(self._model)
        self._sides = {side: labels.roots(channels) for side, channels in layers.sides.items()}
        self._places, self._results = labels.results()
        everything = torch.cat([torch.zeros(0, dtype=torch.int64), *self._sides.values()])
        self._uses = torch.bincount(everything, minlength=len(self._places))
        return output

    @property
    def broadcasts(self) -> Mapping[int, Broadcast]:
        """Where the forward broadcast channels over others, by the number of the operation's autograd node."""
        return self._layers.flow.broadcasts

    def labels_of(self, layer: str, channels: int) -> Tensor:
        """Return the root labels of a layer's output channels, int64; all different where nothing is known of them."""
        own = self._sides.get((layer, False))
        return own if own is not None and len(own) == channels else torch.arange(channels)

    def result(self, cuts: Sequence[Cut]) -> tuple[Safety, str]:
        """Analyze a group by all that it would remove.

        Args:
            cuts: Every side of every layer and parameter that loses channels.

        Returns:
            The group's safety, and why it is not exact.
        """
        unit_of = torch.full_like(self._places, -1)
        mistaken = [side[0] for side, positions, units in cuts if not self._follow(side, positions, units, unit_of)]
        removed = unit_of >= 0
        places = torch.unique(self._places[removed]).tolist()
        safety, reason = max((self._results[place] for place in places), key=_severity, default=self._results[0])
        mistaken = mistaken or self._forgotten(cuts, removed)
        if safety != "unsupported" and mistaken:
            return "unsupported", f"Torch-Pruning would not cut {mistaken[0]} as the forward needs it"
        return safety, reason

    def reason_of(self, layer: str) -> str:
        """Return what was noted of the channels that a layer computes, empty if nothing was."""
        roots = self._sides.get((layer, False), torch.zeros(0, dtype=torch.int64))
        results = (self._results[place] for place in torch.unique(self._places[roots]).tolist())
        return max(results, key=_severity, default=self._results[0])[1]

    def classes(self, blocks: Mapping[Side, int], taken: Sequence[Cut]) -> list[LabelClasses]:
        """Return the channels that must leave together, wherever they are, by what they have in common.

        Args:
            blocks: Into how many equal parts the channels of a side fall that must lose the same members, where a
                caller wants more than the layers do.
            taken: Channels that are left out, with all that leave with them.
        """
        sides = {**self._sides, **{side: self._labels.roots(own) for side, own in self._layers.weightless.items()}}
        coupled = {side: max(count, blocks.get(side, 1)) for side, count in self._layers.blocks.items()}
        coupled |= {side: count for side, count in blocks.items() if side in sides.keys() - coupled.keys()}
        known = [
            sides[side][where[(where >= 0) & (where < len(sides[side]))]] for side, where, _ in taken if side in sides
        ]
        return find_classes(self._labels, sides, coupled, torch.cat([torch.zeros(0, dtype=torch.int64), *known]))

    def _follow(self, side: Side, positions: Tensor, units: Tensor, unit_of: Tensor) -> bool:
        """Give the root labels of some channels their units; return whether that is possible."""
        channels = self._sides.get(side)
        if channels is None or not bool(((positions >= 0) & (positions < len(channels))).all()):
            return False
        roots = channels[positions]
        known = unit_of[roots]
        unit_of[roots] = units
        contradicted = ((known >= 0) & (known != units)) | (unit_of[roots] != units) | (roots == 0)
        if bool(contradicted.any()):
            return False
        blocks = self._layers.blocks.get(side, 1)
        if blocks == 1:
            return True
        terms = torch.full_like(channels, -1)
        terms[positions] = units
        terms = terms.reshape(blocks, -1)
        return bool(((terms == terms[0]) & (terms >= 0)).all())

    def _forgotten(self, cuts: Sequence[Cut], removed: Tensor) -> list[str]:
        """Return what has channels of these root labels but does not lose them."""
        if int(self._uses[removed].sum()) == sum(len(positions) for _, positions, _ in cuts):
            return []
        listed = {side: len(positions) for side, positions, _ in cuts}
        sides = self._sides.items()
        return [side[0] for side, roots in sides if int(removed[roots].sum()) != listed.get(side, 0)]


def _severity(result: tuple[Safety, str]) -> int:
    return ("exact", "inexact", "unsupported").index(result[0])


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Switch the fused attention layers off, which would hide their parts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


__all__ = ["Cut", "ExactnessAnalysis", "Treatment"]
