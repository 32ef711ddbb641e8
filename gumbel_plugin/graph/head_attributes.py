"""Which of an attention layer's whole numbers count heads: those without which it does not run with fewer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from gumbel_plugin.graph.observed_kind import HeadCut, HeadLayout, Place, cut_columns, cut_layer
from gumbel_plugin.layers.example_inputs import named_tensors

_MOST_NUMBERS = 6  # of which every combination is tried
_TOLERANCE = 1e-10  # relative; it is tried in float64
_OF_TORCH = ("torch.nn.",)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an attention layer.

    Attributes:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        cuts: What the arguments lose with heads; the tensor is the number of an argument, see `is_argument`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    cuts: tuple[HeadCut, ...] = ()

    def without(self, cuts: Sequence[HeadCut]) -> Call:
        """Return the same call, of which it is known what its arguments lose."""
        return replace(self, cuts=tuple(cuts))

    def with_fewer(self, removed: Tensor) -> Call:
        """Return the call of a layer that has lost some heads."""
        leaves, form = tree_flatten((self.args, dict(self.kwargs)))
        places = [place for place, leaf in enumerate(leaves) if is_argument(leaf)]
        for cut in self.cuts:
            place = places[int(cut.tensor)]
            kept = torch.ones(leaves[place].shape[cut.dim], dtype=torch.bool)
            kept[cut.without(removed)[0]] = False
            leaves[place] = leaves[place].index_select(cut.dim, torch.nonzero(kept).flatten().to(leaves[place].device))
        return Call(*tree_unflatten(leaves, form))

    def __call__(self, layer: nn.Module) -> list[Tensor]:
        """Call a layer alike, or a copy of it; return the tensors of its output."""
        args, kwargs = copy.deepcopy((self.args, dict(self.kwargs)))  # caches are written into
        return [tensor for _, tensor in named_tensors(layer(*args, **kwargs))]


def is_argument(leaf: Any) -> bool:
    """Whether a part of a layer's arguments is a tensor that may have something for every head; these are numbered."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def find_attributes(layer: nn.Module, layout: HeadLayout, call: Call, inside: str | None) -> tuple[Place, ...] | None:
    """Find which numbers must fall with the heads: every combination is tried on a copy, the likeliest first.

    Args:
        layer: The attention layer, in float64.
        layout: Where its heads are.
        call: How it is called.
        inside: The path of the heads' reader within the layer; None if it is outside.

    Returns:
        The numbers; None if the layer computes the same without some heads whatever is changed.
    """
    removed = torch.arange(layout.count)[1::2]
    expected, shorter = _closed(layer, layout, call, inside, removed), call.with_fewer(removed)
    for places in _combinations(_candidates(layer, layout), layout):
        try:
            small = copy.deepcopy(layer)
            cut_layer(small, layout, removed, places)
            if inside is not None:
                cut_columns(small.get_submodule(inside), layout, removed)
            if _agree(expected, shorter(small), widths_differ=inside is None):
                return places
        except Exception:  # of the network's own code, with a combination that it is not for
            continue
    return None


def _closed(layer: nn.Module, layout: HeadLayout, call: Call, inside: str | None, removed: Tensor) -> list[Tensor]:
    """Return what the whole layer computes when some heads are not read."""
    gone = layout.columns.positions[torch.isin(layout.columns.units, removed)]
    if inside is not None:
        whole = copy.deepcopy(layer)
        whole.get_parameter(f"{inside}.weight").data.index_fill_(1, gone, 0.0)
        return call(whole)
    outputs, width = call(layer), len(layout.columns.positions)
    kept = torch.ones(width, dtype=torch.bool)
    kept[gone] = False
    return [each[..., kept] if each.dim() and each.shape[-1] == width else each for each in outputs]


def _agree(expected: list[Tensor], outputs: list[Tensor], widths_differ: bool) -> bool:
    """Whether outputs are the same; those of another form, which belong to single heads, are left out."""
    if len(expected) != len(outputs):
        return False
    if not widths_differ and expected[0].shape != outputs[0].shape:
        return False
    pairs = [(a, b) for a, b in zip(expected, outputs, strict=True) if a.shape == b.shape and a.is_floating_point()]
    return bool(pairs) and all(
        torch.allclose(a, b, rtol=0.0, atol=_TOLERANCE * max(float(a.abs().amax()), 1e-30)) for a, b in pairs
    )


def _candidates(layer: nn.Module, layout: HeadLayout) -> list[tuple[Place, int]]:
    """Return the numbers that can be proportional to heads, each with its value."""
    found, sizes = [], _sizes(layout)
    for path, module in layer.named_modules():
        if type(module).__module__.startswith(_OF_TORCH) or isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            continue
        for name, value in vars(module).items():
            several = isinstance(value, tuple | list)
            for place, number in enumerate(value) if several else [(-1, value)]:
                whole = _is_whole(number) and not name.startswith("_")
                if whole and number in sizes and number % layout.count == 0:
                    found.append(((path, name, place), number))
    return found


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sizes(layout: HeadLayout) -> set[int]:
    """Return how many heads of whatever kind there may be, and how many channels they have together."""
    widths = {len(layout.columns.positions), *(len(cut.positions) for cut in layout.cuts)}
    size = len(layout.columns.positions) // layout.count
    counts = {layout.count * members for members in range(1, size + 1) if size % members == 0}
    return widths | counts


def _combinations(candidates: list[tuple[Place, int]], layout: HeadLayout) -> Iterator[tuple[Place, ...]]:
    """Yield combinations of numbers, beginning with what their names suggest."""
    likely = [_is_likely(name, value, layout) for (_, name, _), value in candidates]
    free = sorted(range(len(candidates)), key=lambda place: (likely[place], candidates[place][1] != layout.count))
    free = free[:_MOST_NUMBERS]
    for count in range(len(free) + 1):
        for changed in itertools.combinations(free, count):
            chosen = [yes != (place in changed) for place, yes in enumerate(likely)]
            yield tuple(place for (place, _), yes in zip(candidates, chosen, strict=True) if yes)


def _is_likely(name: str, value: int, layout: HeadLayout) -> bool:
    """Whether a number's name says that it counts heads, or their channels together."""
    width = len(layout.columns.positions)
    if value == width or value > width:
        return any(part in name for part in ("head", "attn", "inner", "qk", "val", "all"))
    if value == layout.count and "shape" in name:
        return True
    return "head" in name and not any(part in name for part in ("dim", "size", "channels"))
