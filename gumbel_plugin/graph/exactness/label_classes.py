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
    result_of, results = labels.results()
    severities = torch.tensor([("exact", "inexact", "unsupported").index(safety) for safety, _ in results])
    roots = [labels.roots(channels) for channels in sides.values()]
    signatures = _signatures(roots, severities[result_of])
    signatures[0] = signatures[labels.roots(taken)] = 0
    names, flat = list(sides), torch.cat([signatures[:0], *roots])
    signed = signatures[flat]
    numbers = torch.repeat_interleave(torch.arange(len(roots)), torch.tensor([len(own) for own in roots]).long())
    where = torch.cat([signatures[:0], *(torch.arange(len(own)) for own in roots)])
    chosen = torch.nonzero(signed).flatten()
    chosen = chosen[torch.argsort(signed[chosen], stable=True)]  # by signature, then by side, then by channel
    found = []
    counts = torch.unique_consecutive(signed[chosen], return_counts=True)[1]
    for own in torch.tensor_split(chosen, counts.cumsum(0)[:-1]) if len(chosen) else ():
        members, classes = torch.unique(flat[own], return_inverse=True)
        places, start = {}, 0
        for side, count in zip(*torch.unique_consecutive(numbers[own], return_counts=True), strict=True):
            part = slice(start, start := start + int(count))
            places[names[int(side)]] = where[own[part]], classes[part]
        found.append(LabelClasses(places, *results[int(result_of[members].amax())]))
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
    for own, number in zip(roots, numbers[: len(roots)], strict=True):
        signatures.index_add_(0, own, number.expand(len(own)))
    return signatures
