"""Whole attention heads in `GumbelGroupPruner`: how Torch-Pruning's own way of pruning removes them.

`NamedHeads` are those of layers that a user names with Torch-Pruning's ``num_heads``, for attention that is written
with linear layers of its own. `KnownHeads` are those of layers of a known class, which need no naming; see `attention`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch_pruning as tp
from torch import Tensor, nn

from gumbel_plugin.graph.attention_heads import kind_of, remove_heads
from gumbel_plugin.graph.channel_groups import ChannelGroup, ChannelSlice
from gumbel_plugin.graph.tracing import shared_parts
from gumbel_plugin.shrinking.equivalence import verify_equivalence

# Where attention layers note how many heads they have; their forward may read any of them.
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads")


class Heads(Protocol):
    """The heads of one attention layer."""

    @property
    def group(self) -> ChannelGroup:
        """Their group; a unit is one head, or what must go together with it."""
        ...

    def removal(self, graph: Any, units: Tensor) -> Any:
        """Return Torch-Pruning's group that removes these heads from the graph's model."""
        ...

    def note_removal(self, pruner: tp.pruner.BasePruner) -> None:
        """Note how many heads are left, wherever Torch-Pruning or the model does."""
        ...


@dataclass(frozen=True, eq=False)
class KnownHeads:
    """The heads of an attention layer of a known class; to the graph the layer is one operation.

    Attributes:
        group: Their group, named like the layer.
    """

    group: ChannelGroup

    def removal(self, graph: Any, units: Tensor) -> Any:
        """See `Heads.removal`."""
        return _HeadRemoval(graph, self.group.name, units)

    def note_removal(self, pruner: tp.pruner.BasePruner) -> None:
        """See `Heads.note_removal`: the layer knows it itself."""


class _HeadRemoval(tp.dependency.Group):  # type: ignore[misc]
    """What `GumbelGroupPruner.step` yields for heads that Torch-Pruning knows nothing of: to be pruned like a group."""

    def __init__(self, graph: Any, name: str, units: Tensor) -> None:
        super().__init__()
        self._DG = graph
        self._name, self._units = name, units.cpu()

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Remove the heads, or those of them that are given."""
        units = self._units if idxs is None else torch.tensor(idxs, dtype=torch.int64)
        remove_heads(self._DG.model, self._name, units)
        if record_history:
            self._DG._pruning_history.append((self._name, True, units.tolist()))


@dataclass(frozen=True, eq=False)
class NamedHeads:
    """The heads of one attention layer that is written with linear layers of its own.

    Attributes:
        group: Their group; a unit is one head.
        reader: The linear layer that reads what the heads compute, the output projection.
        size: How many of its input columns one head has.
        layers: The layers named in ``num_heads``: queries, keys and values, in one or several.
    """

    group: ChannelGroup
    reader: nn.Linear
    size: int
    layers: tuple[nn.Module, ...]

    def removal(self, graph: Any, units: Tensor) -> Any:
        """Return Torch-Pruning's group that removes these heads.

        Its root is the output projection: its columns are the heads, one after the other, however queries, keys and
        values are packed.
        """
        positions = (units.unsqueeze(1) * self.size + torch.arange(self.size)).flatten().tolist()
        prune = graph.get_pruner_of_module(self.reader).prune_in_channels
        return graph.get_pruning_group(self.reader, prune, positions)

    def note_removal(self, pruner: tp.pruner.BasePruner) -> None:
        """Note how many heads are left, where Torch-Pruning does and in the model's attention layers."""
        before, left = pruner.num_heads[self.layers[0]], self.reader.in_features // self.size
        for layer in self.layers:
            pruner.num_heads[layer] = pruner.out_channel_groups[layer] = left
        self.tell(pruner.model, pruner.DG, before)

    def tell(self, model: nn.Module, graph: Any, before: int) -> None:
        """Let the attention layers of a model that note how many heads they have know how many are left."""
        for layer in self.layers:
            owner = model.get_submodule(graph._module2name[layer].rpartition(".")[0])
            for attribute in _HEAD_COUNTS:
                if getattr(owner, attribute, None) == before:
                    setattr(owner, attribute, self.reader.in_features // self.size)


def find_heads_to_prune(
    pruner: tp.pruner.BasePruner, groups: Sequence[ChannelGroup], example_inputs: Any
) -> dict[str, Heads]:
    """Return the heads that a pruner may remove, by group name: named ones where ``num_heads`` names some, else known.

    Args:
        pruner: A pruner of Torch-Pruning, on a model without gates.
        groups: The model's groups, known heads among them.
        example_inputs: What the model is tried with.
    """
    if not pruner.prune_num_heads:
        return {}
    if pruner.num_heads:
        return dict(_find_named_heads(pruner, example_inputs))
    return {g.name: KnownHeads(g) for g in groups if kind_of(pruner.model.get_submodule(g.name)) is not None}


def _find_named_heads(pruner: tp.pruner.BasePruner, example_inputs: Any) -> dict[str, NamedHeads]:
    """Return the heads of the attention layers that a pruner's ``num_heads`` names, by group name.

    Args:
        pruner: A pruner of Torch-Pruning, on a model without gates.
        example_inputs: What the model is tried with.
    """
    found = {}
    for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        is_attention, layers = pruner._is_atten_group(group)
        seen = pruner._downstream_node_as_root_if_attention(group) if is_attention else None
        if seen is not None and isinstance(seen[0].dep.target.module, nn.Linear):
            heads = _describe(pruner, pruner.DG._module2name[group[0].dep.target.module], seen, layers)
            safety, reason = _analyze(pruner, heads, example_inputs)
            found[heads.group.name] = replace(heads, group=replace(heads.group, safety=safety, reason=reason))
    return found


def _describe(pruner: tp.pruner.BasePruner, name: str, group: Any, layers: list[nn.Module]) -> NamedHeads:
    """Translate a group whose root is the output projection: what reads and computes each head."""
    reader = group[0].dep.target.module
    count = max(pruner.num_heads[layer] for layer in layers)
    size = reader.in_features // count
    producers: list[ChannelSlice] = []
    consumers: list[ChannelSlice] = []
    for item in group.items:
        module = item.dep.target.module
        known = pruner.DG._module2name.get(module, "") if isinstance(module, nn.Module) else ""
        if not known or not isinstance(getattr(module, "weight", None), Tensor):
            continue
        part = ChannelSlice(known, torch.tensor(item.idxs), torch.tensor(item.root_idxs) // size)
        reads = pruner.DG.is_in_channel_pruning_fn(item.dep.handler) and isinstance(module, nn.Linear)
        (consumers if reads else producers).append(part)
    return NamedHeads(ChannelGroup(name, count, tuple(producers), tuple(consumers)), reader, size, tuple(layers))


def _analyze(pruner: tp.pruner.BasePruner, heads: NamedHeads, example_inputs: Any) -> tuple[Any, str]:
    """Return how safe it is to remove heads, after a trial on a copy of the model."""
    counts = {pruner.num_heads[layer] for layer in heads.layers}
    if len(counts) > 1:
        return "unsupported", f"its layers have different numbers of heads, {sorted(counts)} (grouped queries)"
    if heads.group.size < 2:
        return "unsupported", "it has one head, which must stay"
    if heads.reader.in_features % heads.group.size:
        return "unsupported", f"{heads.reader.in_features} columns are no multiple of {heads.group.size} heads"
    model, graph, heads = copy.deepcopy((pruner.model, pruner.DG, heads), shared_parts(pruner.DG))
    gone = torch.arange(0, heads.group.size - 1, 2)
    _close(model, heads, gone)
    masked = copy.deepcopy(model)
    try:
        heads.removal(graph, gone).prune()
        heads.tell(model, graph, heads.group.size)
        report = verify_equivalence(masked, model, example_inputs, samples=1, dtypes=(torch.float64,))
    except Exception as error:
        return "unsupported", f"the model does not run with fewer heads: {error}"
    return ("exact", "") if report.passed else ("inexact", "something mixes the heads before they are read")


@torch.no_grad()
def _close(model: nn.Module, heads: NamedHeads, gone: Tensor) -> None:
    """Shake what the heads compute and zero what is read of some of them: nothing may hide behind a zero."""
    generator = torch.Generator().manual_seed(0)
    for part in (*heads.group.producers, *heads.group.consumers):
        weight = model.get_submodule(part.module).weight
        assert isinstance(weight, Tensor)
        weight.add_(torch.randn(weight.shape, generator=generator).to(weight) * weight[0].numel() ** -0.5)
    for part in heads.group.consumers:
        weight = model.get_submodule(part.module).weight
        assert isinstance(weight, Tensor)
        weight[:, part.positions[torch.isin(part.units, gone)].to(weight.device)] = 0.0


__all__ = ["Heads", "find_heads_to_prune"]
