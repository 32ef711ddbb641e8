"""How units leave a model: Torch-Pruning's groups, read once and renumbered as channels go.

Torch-Pruning walks its whole graph again for every removal. Here each group is walked once, with all of its channels;
later only their numbers change, and Torch-Pruning's functions cut the layers.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import index_mapping

from gumbel_plugin.graph.attention_heads import NamedHeads, remove_heads
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
    def is_output(self) -> bool:
        """Whether what is cut are channels that a layer computes, or treats each by itself."""
        return str(self.dep.handler.__name__) != "prune_in_channels"

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

    def __init__(self, model: nn.Module, items: Mapping[str, Sequence[Item]], heads: Mapping[str, NamedHeads]) -> None:
        """Start with a whole model.

        Args:
            model: The model that the items were read from, or a copy of it.
            items: What each group cuts, by the group's name; a group without is an attention layer of a known class.
            heads: Which groups are attention heads that a user named.
        """
        self.model = model
        self._items = items
        self._heads = heads
        self._removed: dict[Any, list[Tensor]] = {}  # by place, and by group name: first numbers

    def remove(self, units: Mapping[str, Tensor]) -> None:
        """Remove units of groups, by their present numbers; what several groups cut is cut once."""
        cuts: dict[Any, tuple[Item, list[Tensor]]] = {}
        chosen = {name: self.choose(name, own) for name, own in units.items() if name in self._items}
        for choice in itertools.chain.from_iterable(chosen.values()):
            if choice.item.owner is not None:
                cuts.setdefault(choice.item.place, (choice.item, []))[1].append(choice.now)
        with self.noting(chosen):
            for item, positions in cuts.values():
                item.cut(self.model, torch.unique(torch.cat(positions)).tolist())
        for name in units.keys() - chosen.keys():
            remove_heads(self.model, name, units[name])

    def choose(self, name: str, units: Tensor) -> list[Choice]:
        """Return what leaves with some units of a group, by their present numbers."""
        left = self._left(name)
        chosen = torch.zeros_like(left).index_fill(0, torch.nonzero(left).flatten()[units.cpu()], True)
        picked = [(item, chosen[item.units]) for item in self._items[name]]
        return [Choice(item, which, self.now(item.place, item.positions[which])) for item, which in picked]

    def units_at(self, name: str, choice: Choice, positions: Tensor) -> Tensor:
        """Return the present numbers of the units to which some of a choice's present positions belong."""
        first = choice.item.units[choice.which][torch.isin(choice.now, positions)]
        return torch.searchsorted(torch.nonzero(self._left(name)).flatten(), torch.unique(first))

    def units_of(self, name: str, owner: str, outputs: bool, positions: Tensor) -> Tensor | None:
        """Return the present numbers of the units that have exactly these channels of a layer; None if there are none.

        Args:
            name: The group.
            owner: The layer.
            outputs: Whether its output channels are meant.
            positions: Their present numbers.
        """
        everything = torch.arange(int(self._left(name).sum()))
        for choice in self.choose(name, everything):
            if choice.item.owner == owner and choice.item.is_output == outputs:
                units = self.units_at(name, choice, positions)
                again = next(each for each in self.choose(name, units) if each.item is choice.item)
                if len(units) and torch.equal(again.now.sort().values, positions.sort().values):
                    return units
        return None

    def now(self, place: Any, first: Tensor) -> Tensor:
        """Return the present numbers of channels in a place."""
        if place not in self._removed:
            return first
        return first - torch.searchsorted(torch.unique(torch.cat(self._removed[place])), first)

    @contextmanager
    def noting(self, chosen: Mapping[str, Sequence[Choice]]) -> Iterator[None]:
        """Note the removal that is done meanwhile, here and where attention layers note how many heads they have."""
        heads = {name: self._heads[name].count(self.model) for name in chosen if name in self._heads}
        yield
        for name, choices in chosen.items():
            first: list[tuple[Any, Tensor]] = [(name, choices[0].item.units[choices[0].which])]
            first += [(choice.item.place, choice.item.positions[choice.which]) for choice in choices]
            for place, numbers in first:
                self._removed.setdefault(place, []).append(numbers)
        for name, before in heads.items():
            self._heads[name].sync(self.model, before)

    def _left(self, name: str) -> Tensor:
        """Return which of a group's first units are left, bool."""
        left = torch.ones(int(self._items[name][0].units.max()) + 1, dtype=torch.bool)
        for removed in self._removed.get(name, ()):
            left[removed] = False
        return left


@dataclass(frozen=True, eq=False)
class Choice:
    """What leaves in one place: which entries of its item, and their present numbers."""

    item: Item
    which: Tensor
    now: Tensor


class UnitGroup(tp.dependency.Group):  # type: ignore[misc]
    """Torch-Pruning's group that removes units when it is pruned."""

    def __init__(self, graph: Any, remover: Remover, name: str, units: Tensor) -> None:
        super().__init__()
        self._DG, self._remover, self._name = graph, remover, name
        self._choices = remover.choose(name, units)
        root = self._choices[0].item.place
        for choice in self._choices:
            dep = choice.item.dep
            self.add_dep(dep if choice.item.owner is not None else Bookkeeping(graph, dep), choice.now.tolist())
            self[-1].root_idxs = remover.now(root, choice.item.roots[choice.which]).tolist()

    def prune(self, idxs: Any = None, record_history: bool = True) -> None:
        """Remove the units, or those to which the given channels of the root belong."""
        if idxs is not None:
            units = self._remover.units_at(self._name, self._choices[0], torch.as_tensor(idxs))
            return UnitGroup(self._DG, self._remover, self._name, units).prune(None, record_history)
        with self._remover.noting({self._name: self._choices}):
            super().prune(None, record_history)
        return None


class Bookkeeping(tp.dependency.Dependency):  # type: ignore[misc]
    """Where channels pass an operation, which has nothing to cut: Torch-Pruning counts how many are left.

    It cannot where it knows less of the operation than it needs; what passes there is not read again.
    """

    def __init__(self, graph: Any, dep: Any) -> None:
        super().__init__(dep.trigger, dep.handler, dep.source, dep.target)
        self.index_mapping, self._graph = dep.index_mapping, graph

    def __call__(self, idxs: Any) -> Any:
        """Count."""
        try:
            return super().__call__(idxs)
        except Exception as error:
            self._graph.unnumbered[self.target] = f"Torch-Pruning cannot count what is left of its channels ({error})"


class HeadGroup(tp.dependency.Group):  # type: ignore[misc]
    """The same for heads of an attention layer of a known class, of whose inside Torch-Pruning knows nothing."""

    def __init__(self, graph: Any, name: str, units: Tensor) -> None:
        super().__init__()
        self._DG, self._name, self._units = graph, name, units

    def prune(self, idxs: Any = None, record_history: bool = True) -> None:
        """Remove the heads, or those of them that are given; the history has them at the end of the step."""
        remove_heads(self._DG.model, self._name, self._units if idxs is None else torch.as_tensor(idxs))


def removable_units(modules: Mapping[str, nn.Module], group: ChannelGroup, units: Tensor) -> Tensor:
    """Leave out of some units those without which a layer would have no channel left.

    Args:
        modules: The model's modules, by name.
        group: Their group.
        units: Unit numbers, int64.

    Returns:
        The units that can go, int64, ascending.
    """
    chosen = torch.zeros(group.size, dtype=torch.bool).index_fill(0, units, True)
    owns = [torch.arange(group.size)]
    for part in (*group.producers, *group.consumers):
        module = modules[part.module]
        weight = module.weight
        assert isinstance(weight, Tensor)
        width = input_channels(module) if part in group.consumers else weight.shape[output_dimension(module) or 0]
        if len(part.positions) == width:
            owns.append(part.units)
    for own in owns:
        if bool(chosen[own].all()):
            chosen[own.min()] = False
    return torch.nonzero(chosen).flatten()


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
