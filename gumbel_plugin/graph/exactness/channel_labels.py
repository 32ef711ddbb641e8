"""Dyes: one number per channel that a layer computes, carried by the activations that hold the channel."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Safety = Literal["exact", "inexact", "unsupported"]

_RANKS: tuple[Safety, ...] = ("exact", "inexact", "unsupported")


class Dyes:
    """Which channels must leave together, and which cannot leave without a difference.

    A dye is a positive number; 0 means that an element belongs to no channel. Dyes that meet in one element (in an
    addition, say) become one colour: a union-find forest, flat at all times.
    """

    def __init__(self) -> None:
        self._colours = torch.zeros(1, dtype=torch.int64)
        self._remarks: list[tuple[Tensor, Safety, str]] = []

    def fresh(self, count: int) -> Tensor:
        """Return new dyes, shape (count,), int64."""
        start = len(self._colours)
        dyes = torch.arange(start, start + count)
        self._colours = torch.cat([self._colours, dyes])
        return dyes

    def colours(self, dyes: Tensor) -> Tensor:
        """Return each dye's colour (itself a dye), in the same shape."""
        return self._colours[dyes]

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Give each pair of dyes one colour; pairs with a 0 are left out. Shapes must be equal."""
        first, second = self.colours(first).flatten(), self.colours(second).flatten()
        differ = (first != second) & (first > 0) & (second > 0)
        first, second = first[differ], second[differ]
        while len(first):
            self._colours.scatter_reduce_(0, torch.maximum(first, second), torch.minimum(first, second), "amin")
            while not torch.equal(self._colours, higher := self._colours[self._colours]):
                self._colours = higher
            first, second = self.colours(first), self.colours(second)
            differ = first != second
            first, second = first[differ], second[differ]

    def remark(self, dyes: Tensor, safety: Safety, reason: str) -> None:
        """Note why these channels are not exact."""
        self._remarks.append((torch.unique(dyes[dyes > 0]), safety, reason))

    def verdicts(self) -> tuple[Tensor, list[tuple[Safety, str]]]:
        """Return for every colour its place in a list of verdicts: the worst remark, the earliest among equals."""
        verdicts: list[tuple[Safety, str]] = [("exact", "")]
        ranks = torch.zeros_like(self._colours)
        places = torch.zeros_like(self._colours)
        for dyes, safety, reason in self._remarks:
            rank, colours = _RANKS.index(safety), self.colours(dyes)
            worse = colours[ranks[colours] < rank]
            ranks[worse], places[worse] = rank, len(verdicts)
            verdicts.append((safety, reason))
        return places, verdicts


def varying(dyes: Tensor) -> tuple[int, ...]:
    """Return the dimensions along which tight dyes differ."""
    return tuple(d for d, (size, step) in enumerate(zip(dyes.shape, dyes.stride(), strict=True)) if size > 1 and step)


def core(dyes: Tensor) -> Tensor:
    """Return dyes with every dimension that was only expanded cut to one element."""
    for dim, step in enumerate(dyes.stride()):
        if step == 0:
            dyes = dyes.narrow(dim, 0, min(1, dyes.shape[dim]))
    return dyes


def tight(dyes: Tensor) -> Tensor:
    """Return equal dyes that take memory only along the dimensions in which they differ."""
    smallest = core(dyes)
    for dim, size in enumerate(smallest.shape):
        if size > 1 and bool((smallest == smallest.narrow(dim, 0, 1)).all()):
            smallest = smallest.narrow(dim, 0, 1)
    return smallest.clone(memory_format=torch.contiguous_format).expand(dyes.shape)
