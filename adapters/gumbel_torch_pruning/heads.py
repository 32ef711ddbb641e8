"""Whole attention heads of the layers that a user names with Torch-Pruning's ``num_heads``, as channel groups.

For attention that is written with linear layers of its own, as Torch-Pruning's users have it. Layers of a known class
need no naming; see `attention`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from gumbel_plugin.masks.targets import ChannelGroup, ChannelSlice
from gumbel_plugin.shrinking.equivalence import verify_equivalence
from gumbel_torch_pruning.tracing import shared_parts

# Where attention layers note how many heads they have; their forward may read any of them.
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads")


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads of one attention layer.

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


def find_named_heads(pruner: tp.pruner.BasePruner, example_inputs: Any) -> dict[str, Heads]:
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
            safety, reason = _judge(pruner, heads, example_inputs)
            found[heads.group.name] = replace(heads, group=replace(heads.group, safety=safety, reason=reason))
    return found


def _describe(pruner: tp.pruner.BasePruner, name: str, group: Any, layers: list[nn.Module]) -> Heads:
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
    return Heads(ChannelGroup(name, count, tuple(producers), tuple(consumers)), reader, size, tuple(layers))


def _judge(pruner: tp.pruner.BasePruner, heads: Heads, example_inputs: Any) -> tuple[Any, str]:
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
def _close(model: nn.Module, heads: Heads, gone: Tensor) -> None:
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


__all__ = ["Heads", "find_named_heads"]
