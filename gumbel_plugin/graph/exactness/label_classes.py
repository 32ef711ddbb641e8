"""Which channels must leave together, wherever they are: the classes of labels that one forward found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gumbel_plugin.graph.exactness.channel_labels import ChannelLabels, Safety

_Side = tuple[str, bool]


@dataclass(frozen=True, eq=False)
class LabelClasses:
    """Classes of channels that are found in the same places; each class leaves as a whole, or stays.

    Attributes:
        places: By side, in the order of the forward: channel numbers, and which class each belongs to (int64 both).
        safety: Whether a class can leave exactly.
        reason: Why not.
    """

    places: Mapping[_Side, tuple[Tensor, Tensor]]
    safety: Safety
    reason: str


def find_classes(
    labels: ChannelLabels, sides: Mapping[_Side, Tensor], blocks: Mapping[_Side, int], taken: Tensor
) -> list[LabelClasses]:
    """Sort channels into classes.

    Args:
        labels: What is known of the channels' labels.
        sides: The labels of the channels of each side.
        blocks: Into how many equal parts the channels of a side fall that must lose the same members.
        taken: Labels that are left out.
    """
    labels = labels.duplicate()
    for side, count in blocks.items():
        _couple(labels, side[0], sides[side], count)
    places, results = labels.results()
    severities = torch.tensor([("exact", "inexact", "unsupported").index(safety) for safety, _ in results])
    roots = [labels.roots(channels) for channels in sides.values()]
    signatures = _signatures(roots, severities[places])
    signatures[0] = signatures[labels.roots(taken)] = 0
    names, found = list(sides), []
    for signature in torch.unique(torch.cat([signatures[own] for own in roots] or [signatures[:0]])).tolist():
        if not signature:
            continue
        chosen = {side: torch.nonzero(signatures[own] == signature).flatten() for side, own in zip(names, roots)}
        present = {side: own[chosen[side]] for side, own in zip(names, roots) if len(chosen[side])}
        members = torch.unique(next(iter(present.values())))
        units = {side: (chosen[side], torch.searchsorted(members, own)) for side, own in present.items()}
        found.append(LabelClasses(units, *results[int(places[members].amax())]))
    return sorted(found, key=lambda each: _start(each, names))


def _start(classes: LabelClasses, names: list[_Side]) -> tuple[int, int]:
    """Return where channels are met first: the number of the side, and of the channel."""
    side, (positions, _) = next(iter(classes.places.items()))
    return names.index(side), int(positions[0])


def _couple(labels: ChannelLabels, name: str, channels: Tensor, count: int) -> None:
    """Let the same members of equal parts of a side's channels leave together."""
    if count == 1:
        return
    if len(channels) % count:
        labels.note(channels, "unsupported", f"the channels of {name} do not fall into {count} equal parts")
        return
    parts = channels.reshape(count, -1)
    labels.unite(parts[:1].expand_as(parts), parts)
    lone = (parts == 0).any(0).expand_as(parts)
    labels.note(parts[lone], "unsupported", f"{name} reads them in {count} parts, of which others cannot lose as many")


def _signatures(roots: list[Tensor], severities: Tensor) -> Tensor:
    """Return for every label a number that tells where its channels are, how many, and how safe they are."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(1, 2**62, (len(roots) + 3,), generator=generator)
    signatures = numbers[len(roots) + severities]
    for own, number in zip(roots, numbers):
        signatures.index_add_(0, own, number.expand(len(own)))
    return signatures
