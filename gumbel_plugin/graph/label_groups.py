"""Channel groups that Torch-Pruning's graph does not describe, from the labels that the exactness analysis followed.

The graph numbers channels along its edges. Where a layer's output is cut into parts, joined with what no layer computes
or read piece by piece, those numbers are wrong. The analysis knows which channels leave together wherever they are, so
the groups can be read from it: units of all parts at once, or a group of its own for every part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency.dependency import Dependency

from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.graph.exactness import Cut, ExactnessAnalysis, LabelClasses, Safety
from gumbel_plugin.graph.removal import Item
from gumbel_plugin.layers.geometry import is_depthwise


@dataclass(frozen=True, eq=False)
class LabelGroup:
    """A group as the labels have it.

    Attributes:
        root: The layer whose output channels define it.
        size: How many units it has.
        items: What it cuts; the first one is the root.
        outputs: By layer, which of its output channels belong to it.
        safety: Whether a unit can leave exactly.
        reason: Why not.
    """

    root: str
    size: int
    items: Sequence[Item]
    outputs: Mapping[str, Tensor]
    safety: Safety
    reason: str

    def named(self, used: Collection[str]) -> str:
        """Return a name that no other group has: the root's, or that and which of its channels are meant."""
        first, last = int(self.items[0].positions.min()), int(self.items[0].positions.max())
        name = self.root if self.root not in used else f"{self.root}[{first}:{last + 1}]"
        while name in used:
            name += "'"
        return name


class LabelGroups:
    """Reads groups from an analysis, for a graph whose functions cut the layers."""

    def __init__(self, graph: Any, names: Mapping[nn.Module, str], pruner: Any, roots: tuple[type, ...]) -> None:
        """Take what is needed to cut layers.

        Args:
            graph: A `torch_pruning.DependencyGraph`.
            names: The names of the model's modules.
            pruner: A pruner of Torch-Pruning, whose arguments are respected, or None.
            roots: The kinds of layers whose output channels may define a group.
        """
        self._graph = graph
        self._roots = roots
        self._modules = {name: module for module, name in names.items()}
        self._parameters = {name: parameter for parameter, name in graph._param_to_name.items()}
        ignored = () if pruner is None else pruner.ignored_layers
        self._ignored = {part for layer in ignored for part in layer.modules()}
        norms = [(module, name) for module, name in names.items() if isinstance(module, nn.GroupNorm)]
        self._blocks = {(name, False): module.num_groups for module, name in norms}
        for reads in (False, True) if pruner is not None else ():
            for layer, count in (pruner.in_channel_groups if reads else pruner.out_channel_groups).items():
                if layer in names and not _is_depthwise(layer):
                    self._blocks[names[layer], reads] = count

    def read(self, analysis: ExactnessAnalysis, taken: Sequence[Cut]) -> list[LabelGroup]:
        """Return all groups that a layer defines, in the order of the forward.

        Args:
            analysis: Of a forward of the graph's model.
            taken: Channels that belong to other groups.
        """
        found = [self._group(classes) for classes in analysis.classes(self._blocks, taken)]
        return [group for group in found if group is not None]

    def _group(self, classes: LabelClasses) -> LabelGroup | None:
        """Translate classes that are found in the same places; None if no layer defines them, or one is ignored."""
        owners = [self._modules.get(name) for name, reads in classes.places if not reads]
        root = next((name for name, reads in classes.places if not reads and self._is_root(name)), None)
        if root is None or any(owner in self._ignored for owner in owners):
            return None
        positions, numbers = classes.places[root, False]
        size = int(numbers.max()) + 1
        order = torch.full((size,), len(positions)).scatter_reduce(0, numbers, torch.arange(len(numbers)), "amin")
        units, firsts = torch.argsort(torch.argsort(order)), positions[order]  # units in the root's order
        safety, reason = classes.safety, classes.reason
        items = []
        for name, reads in sorted(classes.places, key=lambda side: side != (root, False)):
            where, members = classes.places[name, reads]
            item = self._item(name, reads, where, firsts[members], units[members])
            if item is None:
                safety, reason = "unsupported", f"Torch-Pruning does not know how to cut {name}"
                continue
            items.append(item)
        outputs = {name: where for (name, reads), (where, _) in classes.places.items() if not reads}
        return LabelGroup(root, size, items, outputs, safety, reason) if items else None

    def _item(self, name: str, reads: bool, positions: Tensor, roots: Tensor, units: Tensor) -> Item | None:
        """Return how Torch-Pruning cuts some channels of one side of a layer; None if it does not know."""
        target = self._modules.get(name, self._parameters.get(name))
        node = self._graph.module2node.get(target)
        pruner = None if node is None else self._graph.get_pruner_of_module(target)
        ignored = any(target is parameter for parameter in self._graph.ignored_params)
        if node is None or pruner is None or ignored:
            return None
        function = pruner.prune_in_channels if reads else pruner.prune_out_channels
        return Item(Dependency(function, function, source=node, target=node), name, positions, roots, units)

    def _is_root(self, name: str) -> bool:
        module = self._modules.get(name)
        return module is not None and isinstance(module, self._roots) and not _is_depthwise(module)


def _is_depthwise(module: nn.Module) -> bool:
    """Whether a module of any kind is a depthwise convolution."""
    return isinstance(module, tp.ops.TORCH_CONV) and is_depthwise(module)


def merged(
    described: Sequence[ChannelGroup],
    found: Sequence[tuple[LabelGroup, ChannelGroup]],
    width_of: Callable[[str], int | None],
) -> tuple[list[ChannelGroup], dict[str, Sequence[Item]]]:
    """Put groups from labels in the place of groups that cannot be cut as Torch-Pruning describes them.

    Args:
        described: Torch-Pruning's groups.
        found: The groups from labels, with what is known of them.
        width_of: Returns how many output channels a layer has.

    Returns:
        All groups, and what those from labels cut, by name.
    """
    usable = [(label, group) for label, group in found if group.safety != "unsupported"]
    reasons: dict[str, str] = {}
    for label, group in found:
        if group.safety == "unsupported":
            reasons |= {name: reasons.get(name, group.reason) for name in label.outputs}
    groups = []
    for group in described:
        parts = [label.outputs[group.name] for label, _ in usable if group.name in label.outputs]
        if group.safety == "unsupported":
            if parts and sum(map(len, parts)) == width_of(group.name):
                continue
            if group.reason.startswith("Torch-Pruning") or parts:
                group = replace(group, reason=reasons.get(group.name, group.reason))
        groups.append(group)
    added: dict[str, Sequence[Item]] = {}
    for label, group in usable:
        name = label.named({each.name for each in groups})
        added[name] = label.items
        groups.append(replace(group, name=name))
    return groups, added
