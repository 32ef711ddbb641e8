"""Which heads of attention layers a Torch-Pruning pruner may remove."""

from __future__ import annotations

from typing import Any

import torch_pruning as tp
from torch import nn

from gumbel_plugin.graph.attention_heads import NamedHeads


def find_named_heads(pruner: tp.pruner.BasePruner, group: Any) -> tuple[Any, NamedHeads, set[int]] | None:
    """Return the heads behind a group of a layer that a pruner's ``num_heads`` names; None if that is not its case.

    Args:
        pruner: A pruner of Torch-Pruning, on a model without gates.
        group: One of its groups, with all channels of its root.

    Returns:
        Torch-Pruning's group whose root is the output projection (its columns are the heads, one after the other,
        however queries, keys and values are packed), the heads, and how many heads the named layers have.
    """
    is_attention, layers = pruner._is_atten_group(group) if pruner.prune_num_heads else (False, ())
    behind = pruner._downstream_node_as_root_if_attention(group) if is_attention else None
    reader = None if behind is None else behind[0].dep.target.module
    if not isinstance(reader, nn.Linear):
        return None
    names, counts = pruner.DG._module2name, {pruner.num_heads[layer] for layer in layers}
    heads = NamedHeads(names[reader], reader.in_features // max(counts), tuple(names[layer] for layer in layers))
    return behind, heads, counts
