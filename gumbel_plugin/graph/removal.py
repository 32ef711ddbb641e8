"""How units leave a model: Torch-Pruning's groups, read once and renumbered as channels go.

Torch-Pruning walks its whole graph again for every removal. Here each group is walked once, with all of its channels;
later only their numbers change, and Torch-Pruning's functions cut the layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping

from gumbel_plugin.graph.attention_heads import remove_heads
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.layers.geometry import input_channels, output_dimension

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Item:
    """What a group cuts in one place.

    Attributes:
        dep: Torch-Pruning's dependency: the layer or parameter, and the function that cuts it.
        owner: The layer's or parameter's name; None for an operation, which has nothing to cut.
        positions: Channel numbers, shape (k,), int64, before anything was removed.
        roots: The channel of the group's root that each of them leaves with.
        units: The group's unit that each of them belongs to.
    """

    dep: Any
    owner: str | None
    positions: Tensor
    roots: Tensor
    units: Tensor

    @property
    def place(self) -> tuple[Any, Any]:
        """On which side of which layer positions count; a layer that treats every channel by itself has one side."""
        return self.dep.target, self.dep.handler.__func__

    @property
    def is_parameter(self) -> bool:
        """Whether a parameter is cut that belongs to no known layer."""
        return bool(self.dep.target.type == tp.ops.OPTYPE.PARAMETER)

    def cut(self, model: nn.Module, positions: Sequence[int]) -> None:
        """Remove channels, by their present numbers, from this place in a model; requires_grad stays as it is."""
        if self.owner is None or not positions:
            return
        self.dep.handler.__self__.pruning_dim = self.dep.target.pruning_dim
        if self.is_parameter:
            path, _, name = self.owner.rpartition(".")
            owner, old = model.get_submodule(path), model.get_parameter(self.owner)
            setattr(owner, name, self.dep.handler(old, list(positions)).requires_grad_(old.requires_grad))
            return
        layer = model.get_submodule(self.owner)
        flags = {name: old.requires_grad for name, old in layer._parameters.items() if old is not None}
        self.dep.handler(layer, list(positions))
        for name, flag in flags.items():
            layer.get_parameter(name).requires_grad_(flag)


class Remover:
    """Removes units from a model, group by group, and knows what is left.

    Attributes:
        model: The model.
    """

    def __init__(self, model: nn.Module, items: Mapping[str, Sequence[Item]]) -> None:
        """Start with a whole model.

        Args:
            model: The model that the items were read from, or a copy of it.
            items: What each group cuts, by the group's name.
        """
        self.model = model
        self._items = items
        self._gone: dict[Any, Tensor] = {}  # by place, and by group name: first numbers, ascending

    def remove(self, units: Mapping[str, Tensor]) -> None:
        """Remove units of groups, by their present numbers; what several groups cut is cut once."""
        cuts: dict[Any, tuple[Item, list[Tensor]]] = {}
        notes = []
        for name, own in units.items():
            if remove_heads(self.model, name, own):
                continue
            chosen = self._chosen(name, own)
            notes.append((name, chosen))
            for choice in chosen:
                if choice.item.owner is not None:
                    cuts.setdefault(choice.item.place, (choice.item, []))[1].append(choice.now)
        for item, positions in cuts.values():
            item.cut(self.model, torch.unique(torch.cat(positions)).tolist())
        for name, chosen in notes:
            self._note(name, chosen)

    def group(self, graph: Any, name: str, units: Tensor) -> Any:
        """Return a group of Torch-Pruning's, of this graph, that removes units when it is pruned."""
        chosen = self._chosen(name, units)
        root = chosen[0].item.place
        group = _Group(graph, lambda: self._note(name, chosen))
        for choice in chosen:
            group.add_dep(choice.item.dep, choice.now.tolist())
            group[-1].root_idxs = self._now(root, choice.item.roots[choice.which]).tolist()
        return group

    def _chosen(self, name: str, units: Tensor) -> list[_Choice]:
        items = self._items[name]
        left = torch.arange(int(items[0].units.max()) + 1)
        left = left[~torch.isin(left, self._gone.get(name, left[:0]))]
        gone = left[units.cpu()]
        picked = [(item, torch.isin(item.units, gone)) for item in items]
        return [_Choice(item, which, self._now(item.place, item.positions[which])) for item, which in picked]

    def _now(self, place: Any, first: Tensor) -> Tensor:
        return first - torch.searchsorted(self._gone[place], first) if place in self._gone else first

    def _note(self, name: str, chosen: Sequence[_Choice]) -> None:
        first: list[tuple[Any, Tensor]] = [(name, chosen[0].item.units[chosen[0].which])]
        first += [(choice.item.place, choice.item.positions[choice.which]) for choice in chosen]
        for place, numbers in first:
            self._gone[place] = torch.unique(torch.cat([self._gone.get(place, numbers[:0]), numbers]))


@dataclass(frozen=True, eq=False)
class _Choice:
    """What goes in one place: which entries of its item, and their present numbers."""

    item: Item
    which: Tensor
    now: Tensor


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


def removable_units(modules: Mapping[str, nn.Module], group: ChannelGroup, units: Tensor) -> Tensor:
    """Leave out of some units those without which a layer would have no channel left.

    Args:
        modules: The model's modules, by name.
        group: Their group.
        units: Unit numbers, int64.

    Returns:
        The units that can go, int64, ascending.
    """
    gone = torch.zeros(group.size, dtype=torch.bool).index_fill(0, units, True)
    owns = [torch.arange(group.size)]
    for part in (*group.producers, *group.consumers):
        module = modules[part.module]
        weight = module.weight
        assert isinstance(weight, Tensor)
        width = input_channels(module) if part in group.consumers else weight.shape[output_dimension(module) or 0]
        if len(part.positions) == width:
            owns.append(part.units)
    for own in owns:
        if bool(gone[own].all()):
            gone[own.min()] = False
    return torch.nonzero(gone).flatten()


def closed_units(model: nn.Module, groups: Mapping[str, ChannelGroup], hard: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the units that go because their gates are closed, by group.

    Args:
        model: The model.
        groups: The gated groups, by name.
        hard: Their decided gates, 0 or 1.

    What the weights alone leave unread stays, or a ratio, its limits and ``round_to`` would not hold.
    """
    modules, units = dict(model.named_modules()), {}
    for name, gates in hard.items():
        closed = torch.nonzero(gates.cpu() == 0).flatten()
        removed = removable_units(modules, groups[name], closed)
        if len(removed) < len(closed):
            _logger.warning("group %s: a closed unit stays, because a layer would have no channel left", name)
        if len(removed):
            units[name] = removed
    return units


@contextmanager
def unchanging_graph() -> Iterator[None]:
    """Keep index mappings as they are while groups are read.

    Torch-Pruning computes those of the whole graph again for every group, and looks for channel counts along every path
    through it: on densenet201 that is nine tenths of the time.
    """
    original = index_mapping.update_index_mapping
    index_mapping.update_index_mapping = lambda graph: None
    try:
        yield
    finally:
        index_mapping.update_index_mapping = original
