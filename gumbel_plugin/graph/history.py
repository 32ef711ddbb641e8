"""Torch-Pruning's pruning history: what was removed, in which order, removed again from an unpruned network."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gumbel_plugin.errors import TargetError, nearest
from gumbel_plugin.graph.prunable_heads import KnownHeads
from gumbel_plugin.graph.tracing import catch_up


def replay(model: nn.Module, graph: Any, heads: Mapping[str, Any], history: Sequence[Any]) -> None:
    """Remove what a history says from a model.

    Args:
        model: The unpruned model, without gates; try on a copy whether the history is this model's.
        graph: The model's `torch_pruning.DependencyGraph`.
        heads: The attention heads that may leave, by their group's name.
        history: Entries of a root's name, whether its output channels go, and their numbers.

    Raises:
        TargetError: If an entry does not fit what is left of the model.
    """
    modules = dict(model.named_modules())
    for name, of_outputs, positions in copy.deepcopy(list(history)):
        known = heads.get(name) if isinstance(heads.get(name), KnownHeads) else None
        if known is None and modules.get(name) not in graph.module2node:
            raise TargetError(f"pruning history: layer {name!r} is not in the graph{nearest(str(name), modules)}")
        layer = modules.get(name)
        width = known.group.size if known else _width(graph, layer, of_outputs)
        if len(set(positions)) >= width or not all(0 <= position < width for position in positions):
            raise TargetError(f"pruning history: {name!r} has {width} units left, of which {positions} cannot go")
        if known:
            known.removal(graph, torch.tensor(positions)).prune()
            continue
        pruner = graph.get_pruner_of_module(layer)
        function = pruner.prune_out_channels if of_outputs else pruner.prune_in_channels
        graph.get_pruning_group(layer, function, positions).prune(record_history=False)
        catch_up(graph, {})


def _width(graph: Any, layer: Any, of_outputs: bool) -> int:
    pruner = graph.get_pruner_of_module(layer)
    return int(pruner.get_out_channels(layer) if of_outputs else pruner.get_in_channels(layer))
