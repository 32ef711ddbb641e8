"""Torch-Pruning's dependency graph, read as channel groups: who computes the channels, and who reads them."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from gumbel_plugin.errors import GraphError
from gumbel_plugin.graph.attention_heads import NamedHeads, find_heads, kind_of
from gumbel_plugin.graph.channel_groups import ChannelGroup, ChannelSlice
from gumbel_plugin.graph.exactness import Cut, ExactnessAnalysis, Safety, check_empirically, double_copy
from gumbel_plugin.graph.input_major_pruner import with_input_major
from gumbel_plugin.graph.label_groups import LabelGroups, merged
from gumbel_plugin.graph.observed_kind import layout_of, observed_names
from gumbel_plugin.graph.prunable_heads import find_named_heads
from gumbel_plugin.graph.removal import HeadGroup, Item, Remover, UnitGroup, unchanging_graph
from gumbel_plugin.graph.tracing import analysis_of, reason_of, traceable
from gumbel_plugin.graph.tracing_repairs import missing_pruners
from gumbel_plugin.graph.unit_numbers import number_units
from gumbel_plugin.layers.example_inputs import call_model, named_tensors
from gumbel_plugin.layers.geometry import input_channels, is_input_major, output_dimension
from gumbel_plugin.layers.kept_tensors import copy_hint
from gumbel_plugin.layers.model_check import refuse_unusable

_ROOTS = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR)


class DependencyGroups:
    """The channel groups of one model, and the physical removal of their units.

    A group is called exact if an `ExactnessAnalysis` finds it so, and after an empirical check: units were removed from
    a copy of the model, and its outputs compared. What the code takes for granted (a fixed size in a reshape, say)
    comes out there.

    Example::

        dependency = DependencyGroups(copy.deepcopy(model), example_inputs)
        for group in dependency.groups:
            ...
        dependency.remove("layer1.0.conv1", torch.tensor([0, 3]))

    Attributes:
        model: The model that the graph was built on, and that `remove` changes.
        graph: Its `torch_pruning.DependencyGraph`.
        groups: The model's channel groups.
        heads: Names of those whose units are attention heads that may leave.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, pruner: tp.pruner.BasePruner | None = None) -> None:
        """Trace the model.

        Args:
            model: The plain model, without gates. Its train/eval flags and requires_grad are kept.
            example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
            pruner: A pruner of Torch-Pruning on this model, whose graph is taken, and whose arguments say which layers
                are ignored, define groups, are attention layers or lose channels in parts.

        Raises:
            GraphError: If the model's forward fails on the example inputs, or the graph cannot be built.
        """
        self.model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._pruner = pruner
        self.graph = _build_graph(model, example_inputs) if pruner is None else pruner.DG
        self._items: dict[str, Sequence[Item]] = {}
        self._named_heads: dict[str, NamedHeads] = {}
        self._tied = _tied_layers(self._names)
        self._observed = {} if pruner is None else observed_names(model, pruner.num_heads)
        named = pruner is not None and bool(pruner.num_heads) and not self._observed
        analysis = analysis_of(self.graph, example_inputs, opaque=not named)
        ignored, kinds = ((), _ROOTS) if pruner is None else (pruner.ignored_layers, pruner.root_module_types)
        roots = with_input_major(kinds, model)
        with unchanging_graph():
            found = self.graph.get_all_groups(list(ignored), roots)
            groups = [self._described(group, analysis) for group in found]
        groups += [self._unread(module, reason, analysis) for module, reason in self.graph.unread.items()]
        groups = self._add_label_groups(groups, analysis, roots)
        groups += self._unknown_layers(ignored)
        if not named:
            names = {self._names.get(part) for layer in ignored for part in layer.modules()}
            heads = find_heads(model)
            groups = _without_insides(groups, heads)
            groups += [g for g in heads if not names & {g.name, *(p.module for p in g.producers)}]
        known = {group.name for group in groups if kind_of(model.get_submodule(group.root)) is not None}
        self.heads = set(self._named_heads) if named else known if pruner is None or pruner.prune_num_heads else set()
        if self._observed:
            self.heads &= self._observed.keys()
        self._remover = self.remover_of(model)
        exact = [group for group in groups if group.safety == "exact"]
        faults = check_empirically(lambda: self.remover_of(double_copy(model)), example_inputs, exact)
        self.groups = [faults.get(group.name, group) for group in groups]

    def remove(self, name: str, units: Tensor) -> None:
        """Remove units of a group from the model, everywhere they appear.

        Args:
            name: The group's name.
            units: Unit numbers as they are now, int64.
        """
        self.remove_all({name: units})

    def remove_all(self, units: Mapping[str, Tensor]) -> None:
        """Remove units of several groups at once, which is faster than one by one.

        Args:
            units: Unit numbers as they are now, int64, by the group's name.
        """
        self._remover.remove(units)

    def pruning_group(self, name: str, units: Tensor) -> Any:
        """Return Torch-Pruning's group that removes units of a group; prune it before the next is asked for."""
        if name in self._items:
            return UnitGroup(self.graph, self._remover, name, units)
        return HeadGroup(self.graph, name, units)

    def group_at(self, owner: str, outputs: bool, positions: Sequence[int]) -> Any:
        """Return what removes certain channels of a layer with all that belongs to them; None if they are no units.

        Args:
            owner: The layer's name.
            outputs: Whether its output channels are meant.
            positions: Their numbers as they are now.
        """
        for group in self.groups:
            if group.safety == "unsupported" or group.name not in self._items:
                continue
            units = self._remover.units_of(group.name, owner, outputs, torch.tensor(positions, dtype=torch.int64))
            if units is not None:
                return self.pruning_group(group.name, units)
        return None

    def history(self, left: Mapping[str, Tensor]) -> list[list[Any]]:
        """Return how Torch-Pruning's history notes that units left: roots, whether by output channel, channel numbers.

        Args:
            left: By group name, which of its units are left, bool.
        """
        entries: list[list[Any]] = []
        gone: dict[Any, list[Tensor]] = {}  # by place, what earlier entries remove
        for name, stayed in left.items():
            units = torch.nonzero(~stayed).flatten()
            items = self._items.get(name, ()) if len(units) else ()
            chosen = [(item.place, item.positions[torch.isin(item.units, units)]) for item in items]
            if items:
                place, positions = chosen[0]
                outputs = self.graph.is_out_channel_pruning_fn(items[0].dep.trigger)
                earlier = torch.unique(torch.cat([positions[:0], *gone.get(place, ())]))
                positions = positions - torch.searchsorted(earlier, positions)
                entries.append([items[0].owner, outputs, positions.tolist()])
            elif len(units):
                entries.append([name, True, units.tolist()])
            for place, positions in chosen:
                gone.setdefault(place, []).append(positions)
        return entries

    def count_heads(self) -> None:
        """Let the pruner of this graph, and attention layers of its model, know how many named heads are left."""
        pruner: Any = self._pruner
        for name in self._observed:
            before = next(group.size for group in self.groups if group.name == name)
            layout = layout_of(self.model.get_submodule(name))
            left = before if layout is None else layout.count
            for layer, counts in itertools.product(self._observed[name], (pruner.num_heads, pruner.out_channel_groups)):
                counts[layer] = counts[layer] // before * left
        for name, heads in self._named_heads.items():
            group = next(group for group in self.groups if group.name == name)
            heads.sync(self.model, group.size)
            for layer in map(self.model.get_submodule, heads.layers):
                for counts in (pruner.num_heads, pruner.out_channel_groups):
                    counts[layer] = heads.count(self.model)

    def remover_of(self, model: nn.Module) -> Remover:
        """Return what removes units of these groups from a copy of the model that nothing was removed from yet."""
        return Remover(model, self._items, self._named_heads)

    def _described(self, group: Any, analysis: ExactnessAnalysis) -> ChannelGroup:
        """Translate one of Torch-Pruning's groups, or say why it cannot be read."""
        try:
            return self._describe(group, analysis)
        except Exception as error:  # whatever is wrong with one group, the others are read
            return self._unread(group[0].dep.target.module, reason_of(error), analysis)

    def _unread(self, module: nn.Module, reason: str, analysis: ExactnessAnalysis) -> ChannelGroup:
        """Return the group of a layer of which only the name is known; its channels stay."""
        name = self._names[module]
        self._items.pop(name, None)
        self._named_heads.pop(name, None)
        reason = analysis.reason_of(name) or f"Torch-Pruning cannot follow its channels: {reason}"
        channels = torch.arange(self._width(module) or 1)
        own = ChannelSlice(name, channels, channels)
        return ChannelGroup(name, len(channels), (own,), (), "unsupported", reason)

    def _unknown_layers(self, ignored: Sequence[nn.Module]) -> list[ChannelGroup]:
        """Return the layers that have a matrix of weights but are of no kind that is known; they stay whole."""
        matrices = {parameter for parameter, _ in self.graph.unwrapped_parameters if parameter.dim() > 1}
        found = []
        for module, name in self._names.items():
            leaf = next(module.children(), None) is None and name and module not in ignored
            if leaf and not matrices.isdisjoint(module.parameters(recurse=False)):
                reason = f"{type(module).__name__} is no kind of layer that is known; customized_pruners could cut it"
                found.append(ChannelGroup(name, 1, (), (), "unsupported", reason))
        return found

    def _describe(self, group: Any, analysis: ExactnessAnalysis) -> ChannelGroup:
        """Translate one of Torch-Pruning's groups; the graph's own objects do not leave this file."""
        root = group[0].dep.target.module
        name, channels = self._names[root], self._width(root)
        heads = None if self._pruner is None or self._observed else find_named_heads(self._pruner, group)
        if heads is not None:
            return self._describe_heads(name, *heads)
        if channels is None:
            return ChannelGroup(name, 1, (), (), "unsupported", f"the {type(root).__name__} {name!r} has no channels")
        unit_of = number_units(self._coupled(group), analysis.labels_of(name, channels))
        size = int(unit_of.max()) + 1
        items = self._items[name] = [self._read(item, lambda roots: unit_of[roots]) for item in group.items]
        return self._group(name, size, items, *analysis.result(_cuts(self._layers(items))))

    def _add_label_groups(
        self, groups: Sequence[ChannelGroup], analysis: ExactnessAnalysis, roots: tuple[type, ...]
    ) -> list[ChannelGroup]:
        """Add the groups that the graph does not describe, in place of those that it describes wrongly."""
        described = [group for group in groups if group.safety != "unsupported" and group.name in self._items]
        taken = [cut for group in described for cut in _cuts(self._layers(self._items[group.name]))]
        labels = LabelGroups(self.graph, self._names, self._pruner, roots).read(analysis, taken)
        found = [(each, self._group(each.root, each.size, each.items, each.safety, each.reason)) for each in labels]
        groups, items = merged(groups, found, lambda name: self._width(self.model.get_submodule(name)))
        self._items.update(items)
        return groups

    def _group(self, name: str, size: int, items: Sequence[Item], safety: Safety, reason: str) -> ChannelGroup:
        """Return a group that cuts these items."""
        producers, consumers = _slices(self._layers(items))
        if safety == "exact":
            safety, reason = self._check_parts(size, producers, consumers)
        outside = sum(self._elements(item) for item in items if item.is_parameter)
        return ChannelGroup(name, size, producers, consumers, safety, reason, outside // size)

    def _describe_heads(self, name: str, group: Any, heads: NamedHeads, counts: set[int]) -> ChannelGroup:
        """Translate a group whose root is the output projection: what reads and computes each head."""
        count, reader = max(counts), self.model.get_submodule(heads.reader)
        self._items[name] = [self._read(item, lambda roots: roots // heads.size) for item in group.items]
        self._named_heads[name] = heads
        producers, consumers = _slices(self._layers(self._items[name]))
        reason = ""
        if len(counts) > 1:
            reason = f"its layers have different numbers of heads, {sorted(counts)} (grouped queries)"
        elif count < 2:
            reason = "it has one head, which must stay"
        elif input_channels(reader) % count:
            reason = f"{input_channels(reader)} columns are no multiple of {count} heads"
        return ChannelGroup(name, count, producers, consumers, "unsupported" if reason else "exact", reason)

    def _read(self, item: Any, unit_of: Callable[[Tensor], Tensor]) -> Item:
        """Translate one item of Torch-Pruning's groups."""
        target, roots = item.dep.target, torch.tensor(item.root_idxs)
        names = self.graph._param_to_name if target.type == tp.ops.OPTYPE.PARAMETER else self._names
        return Item(item.dep, names.get(target.module), torch.tensor(item.idxs), roots, unit_of(roots))

    def _layers(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        """Return the items that cut a layer or a parameter, each with whether it cuts what a layer reads."""
        named = [(item, self._reads(item.dep)) for item in items if item.owner is not None]
        return [(i, reads) for i, reads in named if reads or i.is_parameter or self._has_channels(i.dep.target.module)]

    def _elements(self, item: Item) -> int:
        """Return how many numbers go with all channels of a parameter that belongs to no layer."""
        parameter, dim = item.dep.target.module, item.dep.target.pruning_dim
        return len(item.positions) * int(parameter.numel()) // int(parameter.shape[dim])

    def _reads(self, dep: Any) -> bool:
        """Whether a dependency prunes the input channels of a layer that sums over them."""
        module = dep.target.module
        if (
            not (isinstance(module, _ROOTS) or is_input_major(module))
            or dep.target.type == tp.ops.OPTYPE.DEPTHWISE_CONV
        ):
            return False
        pruner = self.graph.get_pruner_of_module(module)
        return bool(dep.handler == pruner.prune_in_channels)

    def _has_channels(self, module: nn.Module) -> bool:
        return isinstance(getattr(module, "weight", None), Tensor) and self._width(module) is not None

    def _width(self, module: nn.Module) -> int | None:
        """Return how many output channels a module has; None for a PReLU with one slope for all."""
        width: int | None = self.graph.get_pruner_of_module(module).get_out_channels(module)
        return width

    def _coupled(self, group: Any) -> int:
        """Return into how many equal parts the channels fall that must lose the same members (grouped layers)."""
        parts = 1 if self._pruner is None else self._pruner._get_channel_groups(group)
        for item in group.items:
            module = item.dep.target.module
            if isinstance(module, tp.ops.TORCH_CONV) and module.groups > 1:
                if item.dep.target.type != tp.ops.OPTYPE.DEPTHWISE_CONV:
                    parts = max(parts, module.groups)
            elif isinstance(module, nn.GroupNorm):
                parts = max(parts, module.num_groups)
        return parts

    def _check_parts(
        self, size: int, producers: Sequence[ChannelSlice], consumers: Sequence[ChannelSlice]
    ) -> tuple[Safety, str]:
        if not consumers:
            return "unsupported", "no convolution or linear layer reads it"
        if size < 2:
            return "unsupported", "it has one unit, which must stay"
        for part in (*producers, *consumers):
            module = self.model.get_submodule(part.module)
            if part.module in self._tied:
                return "unsupported", f"{part.module} shares a parameter with {self._tied[part.module]}"
            width = input_channels(module) if part in consumers else self._width(module)
            if width is None or int(part.positions.max()) >= width:
                return "unsupported", f"Torch-Pruning does not find its channels in {part.module}"
            if output_dimension(module) is None:
                return "unsupported", f"{part.module} is a grouped transposed convolution, which cannot be cut"
        return "exact", ""


def find_groups(model: nn.Module, example_inputs: Any) -> list[ChannelGroup]:
    """Return the channel groups of a model, which is left as it is.

    Args:
        model: The plain model.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Raises:
        ConfigError: If it is no model that can be pruned, or nothing can be traced with the inputs.
        GraphError: If the model's forward fails on the example inputs, or the graph cannot be built.
    """
    refuse_unusable(model, "finding channel groups")
    try:
        duplicate = copy.deepcopy(model)
    except Exception as error:
        raise GraphError(f"the model cannot be copied: {copy_hint(model) or reason_of(error)}") from error
    return DependencyGroups(duplicate, example_inputs).groups


def _without_insides(groups: Sequence[ChannelGroup], heads: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Leave out groups of what computes heads: these channels leave with their heads, or not at all."""
    inside = {part.module for group in heads if group.safety == "exact" for part in group.producers}
    return [group for group in groups if group.name not in inside]


def _tied_layers(names: Mapping[nn.Module, str]) -> dict[str, str]:
    """Return the layers that share a parameter with another one, each with that one."""
    owners: dict[nn.Parameter, list[str]] = {}
    for module, name in names.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    pairs = itertools.chain.from_iterable(itertools.permutations(each, 2) for each in owners.values())
    return dict(pairs)


def _cuts(layers: Sequence[tuple[Item, bool]]) -> list[Cut]:
    """Return what some items cut, as the exactness analysis has it."""
    return [((item.owner or "", reads), item.positions, item.units) for item, reads in layers]


def _slices(layers: Sequence[tuple[Item, bool]]) -> tuple[tuple[ChannelSlice, ...], tuple[ChannelSlice, ...]]:
    """Return who computes channels, and who reads them."""
    parts = [
        (ChannelSlice(item.owner or "", item.positions, item.units), reads)
        for item, reads in layers
        if not item.is_parameter
    ]
    return tuple(part for part, reads in parts if not reads), tuple(part for part, reads in parts if reads)


def _build_graph(model: nn.Module, example_inputs: Any) -> Any:
    with traceable(model, example_inputs), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.DependencyGraph().build_dependency(
            model,
            example_inputs,
            forward_fn=call_model,
            output_transform=mark_outputs,
            customized_pruners=missing_pruners(model),
            verbose=False,
        )


def mark_outputs(outputs: Any) -> list[Tensor]:
    """Give every output a node of its own: a final layer alone is not recognized as an output."""
    return [tensor.clone() for _, tensor in named_tensors(outputs) if tensor.grad_fn is not None]
