"""Labels: one number per channel that a layer computes, carried by the activations that hold the channel."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Safety = Literal["exact", "inexact", "unsupported"]

_RANKS: tuple[Safety, ...] = ("exact", "inexact", "unsupported")


class ChannelLabels:
    """Which channels must leave together, and which cannot leave without a difference.

    A label is a positive number; 0 means that an element belongs to no channel. Labels that meet in one element (in an
    addition, say) become one root label: a union-find forest, flat at all times.

    Attributes:
        changes: How often root labels have changed.
    """

    def __init__(self) -> None:
        self._roots = torch.zeros(1, dtype=torch.int64)
        self._lone: list[int] = []  # labels that were the only ones of their layer
        self._notes: list[tuple[Tensor, Safety, str]] = []
        self.changes = 0

    def fresh(self, count: int) -> Tensor:
        """Return new labels, shape (count,), int64."""
        start = len(self._roots)
        labels = torch.arange(start, start + count)
        self._roots = torch.cat([self._roots, labels])
        self._lone += [start] * (count == 1)
        return labels

    def is_lone(self, labels: Tensor) -> bool:
        """Whether these labels are those of one channel, of layers that have no other."""
        roots = torch.unique(self.roots(core(labels)))
        same = torch.nonzero(self._roots == roots.max()).flatten()
        return len(roots) == 1 and bool(torch.isin(same, torch.tensor(self._lone)).all())

    def duplicate(self) -> ChannelLabels:
        """Return equal labels, to unite more of them without consequences here."""
        duplicate = ChannelLabels()
        duplicate._roots, duplicate._notes, duplicate._lone = self._roots.clone(), list(self._notes), list(self._lone)
        return duplicate

    def roots(self, labels: Tensor) -> Tensor:
        """Return each label's root label (itself a label), in the same shape."""
        return self._roots[labels]

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Give each pair of labels one root label; pairs with a 0 are left out. Shapes must be equal."""
        first, second = self.roots(first).flatten(), self.roots(second).flatten()
        differ = (first != second) & (first > 0) & (second > 0)
        first, second = first[differ], second[differ]
        self.changes += len(first) > 0
        while len(first):
            self._roots.scatter_reduce_(0, torch.maximum(first, second), torch.minimum(first, second), "amin")
            while not torch.equal(self._roots, higher := self._roots[self._roots]):
                self._roots = higher
            first, second = self.roots(first), self.roots(second)
            differ = first != second
            first, second = first[differ], second[differ]

    def note(self, labels: Tensor, safety: Safety, reason: str) -> None:
        """Note why these channels are not exact."""
        self._notes.append((torch.unique(labels[labels > 0]), safety, reason))

    def results(self) -> tuple[Tensor, list[tuple[Safety, str]]]:
        """Return for every root label its place in a list of results: the worst note, the earliest among equals."""
        results: list[tuple[Safety, str]] = [("exact", "")]
        ranks = torch.zeros_like(self._roots)
        places = torch.zeros_like(self._roots)
        for labels, safety, reason in self._notes:
            rank, roots = _RANKS.index(safety), self.roots(labels)
            worse = roots[ranks[roots] < rank]
            ranks[worse], places[worse] = rank, len(results)
            results.append((safety, reason))
        return places, results


def varying(labels: Tensor) -> tuple[int, ...]:
    """Return the dimensions along which tight labels differ."""
    return tuple(
        d for d, (size, step) in enumerate(zip(labels.shape, labels.stride(), strict=True)) if size > 1 and step
    )


def core(labels: Tensor) -> Tensor:
    """Return labels with every dimension that was only expanded cut to one element."""
    for dim, step in enumerate(labels.stride()):
        if step == 0:
            labels = labels.narrow(dim, 0, min(1, labels.shape[dim]))
    return labels


def tight(labels: Tensor) -> Tensor:
    """Return equal labels that take memory only along the dimensions in which they differ."""
    smallest = core(labels)
    for dim, size in enumerate(smallest.shape):
        if size > 1 and bool((smallest == smallest.narrow(dim, 0, 1)).all()):
            smallest = smallest.narrow(dim, 0, 1)
    return smallest.clone(memory_format=torch.contiguous_format).expand(labels.shape)
