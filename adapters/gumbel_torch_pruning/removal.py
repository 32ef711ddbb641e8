"""How units leave a model: Torch-Pruning's groups, read once and renumbered as channels go.

Torch-Pruning walks its whole graph again for every removal. Here each group is walked once, with all of its channels;
later only their numbers change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping


class Numbers:
    """The present numbers of channels that were counted before some of them went."""

    def __init__(self) -> None:
        self._gone: dict[Any, Tensor] = {}

    def now(self, place: Any, first: Tensor) -> Tensor:
        """Return the present numbers of channels which were these at first, and are still there."""
        return first - torch.searchsorted(self._gone[place], first) if place in self._gone else first

    def drop(self, place: Any, first: Tensor) -> None:
        """Note that channels are gone."""
        known = self._gone.get(place, first[:0])
        self._gone[place] = torch.cat([known, first]).unique()


class Removal:
    """The removal of units of one group."""

    def __init__(self, graph: Any, group: Any, size: int, numbers: Numbers) -> None:
        """Read a group of Torch-Pruning's that has all channels of its root.

        Args:
            graph: The dependency graph.
            group: The group.
            size: How many units it has; channels are units modulo this.
            numbers: What went already, for all groups of the graph.
        """
        self._graph = graph
        self._items = [(item.dep, torch.tensor(item.idxs), torch.tensor(item.root_idxs)) for item in group.items]
        self._left = torch.arange(size)
        self._size = size
        self._numbers = numbers

    def group(self, units: Tensor) -> Any:
        """Return a group of Torch-Pruning's that removes units (by their present numbers) when it is pruned."""
        gone = self._left[units.cpu()]
        chosen = [torch.isin(roots % self._size, gone) for _, _, roots in self._items]
        group = _Group(self._graph, lambda: self._drop(gone, chosen))
        for (dep, positions, roots), which in zip(self._items, chosen, strict=True):
            group.add_dep(dep, self._numbers.now(_place(dep), positions[which]).tolist())
            group[-1].root_idxs = self._numbers.now(_place(self._items[0][0]), roots[which]).tolist()
        return group

    def remove(self, units: Tensor) -> None:
        """Remove units; parameters keep their requires_grad."""
        flags = [(owner, key, owner.get_parameter(key).requires_grad) for owner, key in self._parameters()]
        self.group(units).prune()
        for owner, key, flag in flags:
            owner.get_parameter(key).requires_grad_(flag)

    def _drop(self, gone: Tensor, chosen: Sequence[Tensor]) -> None:
        self._left = self._left[~torch.isin(self._left, gone)]
        for place in {_place(dep) for dep, _, _ in self._items}:
            going = [p[which] for (dep, p, _), which in zip(self._items, chosen, strict=True) if _place(dep) == place]
            self._numbers.drop(place, torch.cat(going))

    def _parameters(self) -> Iterator[tuple[nn.Module, str]]:
        """Yield what the removal replaces, as module and name."""
        for dep, _, _ in self._items:
            target = dep.target.module
            if dep.target.type == tp.ops.OPTYPE.PARAMETER:
                path, _, name = self._graph._param_to_name[target].rpartition(".")
                yield self._graph.model.get_submodule(path), name
            else:
                yield from ((target, name) for name, p in target._parameters.items() if p is not None)


class _Group(tp.dependency.Group):  # type: ignore[misc]
    """A group that says so when it was pruned."""

    def __init__(self, graph: Any, pruned: Callable[[], None]) -> None:
        super().__init__()
        self._DG = graph
        self._pruned = pruned

    def prune(self, idxs: Any = None, record_history: bool = True) -> None:
        """See `torch_pruning.dependency.Group.prune`."""
        super().prune(idxs, record_history)
        if idxs is None:
            self._pruned()


@contextmanager
def unchanging_graph() -> Iterator[None]:
    """Keep index mappings as they are while groups are read.

    Torch-Pruning computes those of the whole graph again for every group, and looks for channel counts through every
    path of it: on densenet201 that is nine tenths of the time.
    """
    original = index_mapping.update_index_mapping
    index_mapping.update_index_mapping = lambda graph: None
    try:
        yield
    finally:
        index_mapping.update_index_mapping = original


def _place(dep: Any) -> tuple[Any, Any]:
    """Say on which side of which layer a dependency counts; a layer that treats every channel by itself has one."""
    return dep.target, dep.handler.__func__
