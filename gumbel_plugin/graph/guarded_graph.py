"""A dependency graph that is read group by group: what cannot be read costs one group, not the network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch_pruning as tp
from torch import nn
from torch_pruning._helpers import GroupItem, _HybridIndex
from torch_pruning.dependency import Dependency, index_mapping, shape_infer

from gumbel_plugin.errors import GraphError

_ROUNDS = 4
"""How often a walk may pass each edge of the graph, on average. Of those that end, the longest pass half of them."""

_STRETCH = 8
"""How many times as many channels as the widest layer has a walk may meet in one place."""


class _EndlessWalkError(GraphError):
    """A walk found ever new channel numbers in the same layers."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__("the walk along them does not end, because their numbers change on every round")
        self.layers = layers


class GuardedGraph(tp.DependencyGraph):  # type: ignore[misc]
    """Torch-Pruning's graph, whose walks end, and whose groups are read one by one.

    Torch-Pruning's own walk does not end where channel numbers change on every round through the graph, and whatever
    goes wrong in one group is an error for all. The walk here finds the same groups, in the same order.

    Attributes:
        unread: Layers whose groups could not be read when all were, and why.
        unnumbered: Operations whose channels could not be numbered, and why.
    """

    unread: dict[nn.Module, str]
    unnumbered: dict[Any, str]

    @classmethod
    def guard(cls, graph: tp.DependencyGraph) -> None:
        """Make a graph that was not traced yet one of this class."""
        graph.__class__ = cls
        graph.unread, graph.unnumbered = {}, {}

    def get_all_groups(
        self, ignored_layers: Sequence[Any] = (), root_module_types: Sequence[Any] = (tp.ops.TORCH_CONV,)
    ) -> Iterator[Any]:
        """Yield the groups that can be read, with all channels; the others are in `unread` afterwards."""
        ignored = {*ignored_layers, *self.IGNORED_LAYERS_IN_TRACING}
        visited: set[Any] = set()
        roots: Any = tuple(root_module_types)
        self.unread = {}
        for module in list(self.module2node):
            if module in ignored or module in visited or not isinstance(module, roots):
                continue
            pruner = self.get_pruner_of_module(module)
            width = None if pruner is None else pruner.get_out_channels(module)
            if width is None:
                continue
            try:
                group = self.get_pruning_group(module, pruner.prune_out_channels, list(range(width)))
            except _EndlessWalkError as error:  # nor does it from the other layers on the way
                known = [layer for layer in error.layers if isinstance(layer, roots)]
                self.unread |= dict.fromkeys((layer for layer in known if layer not in ignored | visited), _text(error))
                visited.update(known)
                continue
            except Exception as error:
                self.unread[module] = _text(error)
                continue
            cut = [dep.target.module for dep, _ in group if self.is_out_channel_pruning_fn(dep.handler)]
            visited.update(cut)
            if ignored.isdisjoint(cut):
                yield group

    def get_pruning_group(self, module: nn.Module, pruning_fn: Callable[..., Any], idxs: Any) -> Any:
        """Return the group of some channels of a layer.

        Raises:
            GraphError: If the layer is not in the graph, or the walk from it fails or does not end.
        """
        if module not in self.module2node:
            raise GraphError(f"{type(module).__name__} is not in the dependency graph")
        if isinstance(module, tp.ops.TORCH_CONV) and module.groups == module.out_channels > 1:
            pruning_fn = self.REGISTERED_PRUNERS[tp.ops.OPTYPE.DEPTHWISE_CONV].prune_out_channels
        index_mapping.update_index_mapping(self)
        node = self.module2node[module]
        channels = [_HybridIndex(idx=idx, root_idx=idx) for idx in ([idxs] if isinstance(idxs, int) else idxs)]
        return self._merged(self._walk(Dependency(pruning_fn, pruning_fn, source=node, target=node), channels))

    def _walk(self, root: Any, channels: Sequence[Any]) -> list[tuple[Any, Sequence[Any]]]:
        """Follow channels along all edges that they trigger, each list of them once; the last found is followed first.

        Raises:
            GraphError: If an operation on the way could not be numbered, or there is no end to it.
        """
        longest = _ROUNDS * sum(len(node.dependencies) for node in self.module2node.values()) + 1000
        widest = _STRETCH * max((max(p.shape, default=1) for p in self.model.parameters()), default=1)
        found, met = [(root, channels)], {(root.target, root.handler, tuple(channels))}
        stack, visited = [(root, channels)], set()
        while stack:
            edge, here = stack.pop()
            visited.add(edge.target)
            if edge.target in self.unnumbered:
                raise GraphError(f"{_name(edge.target)}: {self.unnumbered[edge.target]}")
            for following in edge.target.dependencies:
                if not following.is_triggered_by(edge.handler):
                    continue
                there = here
                for mapping in following.index_mapping:
                    there = there if mapping is None else mapping(there)
                key = (following.target, following.handler, tuple(there))
                if len(there) == 0 or (following.target in visited and key in met):
                    continue
                if len(found) > longest or len(there) > widest:
                    outputs = [e.target.module for e, _ in found if self.is_out_channel_pruning_fn(e.handler)]
                    raise _EndlessWalkError(list(dict.fromkeys(outputs)))
                met.add(key)
                found.append((following, there))
                stack.append((following, there))
        return found

    def _merged(self, found: Sequence[tuple[Any, Sequence[Any]]]) -> Any:
        """Return a group in which every place comes once; a channel leaves with the root that reached it first."""
        places: dict[Any, tuple[Any, list[Any]]] = {}
        for edge, channels in found:
            if any(edge.target.module is ignored for ignored in self.ignored_params):
                continue
            place = edge.target, edge.handler
            if place in places:
                merged = {index.idx: index for index in reversed([*places[place][1], *channels])}
                first = dict.fromkeys(index.idx for index in [*places[place][1], *channels])
                places[place] = places[place][0], [merged[idx] for idx in first]
            else:
                places[place] = edge, list(channels)
        group = tp.dependency.Group()
        group._DG = self
        for edge, channels in places.values():
            item = GroupItem(edge, [index.idx for index in channels])
            item.root_idxs = [index.root_idx for index in channels]
            group._group.append(item)
        return group


class GuardedPruner(tp.pruner.BasePruner):  # type: ignore[misc]
    """Torch-Pruning's pruner; attention layers whose output projection is not found stay whole."""

    def _downstream_node_as_root_if_attention(self, group: Any) -> Any:
        try:
            return super()._downstream_node_as_root_if_attention(group)
        except Exception:
            return None  # as where Torch-Pruning finds none


def number_channels(graph: Any, of: Callable[[Any], None] = index_mapping.update_index_mapping) -> None:
    """Let Torch-Pruning number the channels of every operation, or find out their sizes, one by one.

    Args:
        graph: A `GuardedGraph`. Operations at which Torch-Pruning fails are noted there.
        of: Torch-Pruning's function for a whole graph.
    """
    one = copy.copy(graph)
    for module, node in graph.module2node.items():
        one.module2node = {module: node}
        try:
            of(one)
            _keep_roots(node)
        except Exception as error:
            graph.unnumbered[node] = f"Torch-Pruning cannot number its channels ({_text(error)})"
        for sizes in ("split_sizes", "concat_sizes"):
            if None in (getattr(module, sizes, None) or ()):
                setattr(module, sizes, None)  # Torch-Pruning would count with them when channels leave


class _RepeatedHeads:
    """Numbers of repeated heads of keys and values (grouped queries), which keep the root that they leave with."""

    def __init__(self, numbers: Any) -> None:
        self._numbers = numbers

    def __call__(self, channels: Sequence[Any]) -> list[Any]:
        numbers = self._numbers(channels)  # none, or as many
        return [_HybridIndex(new.idx, old.root_idx) for new, old in zip(numbers, channels, strict=False)]


def _keep_roots(node: Any) -> None:
    """Repair Torch-Pruning's numbering of expansions, which it takes for repeated heads of keys and values.

    It loses the root's numbers, and divides by zero where nothing is repeated (windows of Hiera, GCViT and Twins).
    """
    edges = [*node.dependencies, *(edge for before in node.inputs for edge in before.dependencies)]
    for edge in edges if node.type == tp.ops.OPTYPE.EXPAND else ():
        numbers = edge.index_mapping[0]
        if isinstance(numbers, index_mapping._GQAIndexMapping):
            edge.index_mapping[0] = _RepeatedHeads(numbers) if numbers.repeat > 1 else None


def find_sizes(graph: Any, of: Callable[[Any], None] = shape_infer.init_shape_information) -> None:
    """Let Torch-Pruning find out the sizes of the parts of every split, one by one; see `number_channels`."""
    number_channels(graph, of)


def _name(node: Any) -> str:
    kind = type(node.module).__name__
    return node._name or kind.removeprefix("_").removesuffix("Op").lower()


def _text(error: Exception) -> str:
    kind, text = type(error).__name__, str(error).strip()
    return text if isinstance(error, GraphError) else f"{kind}: {text}" if text else kind
