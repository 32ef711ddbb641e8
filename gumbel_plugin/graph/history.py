"""Torch-Pruning's pruning history: what was removed, in which order, removed again from an unpruned network."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gumbel_plugin.errors import TargetError, nearest
from gumbel_plugin.graph.attention_heads import kind_of, remove_heads
from gumbel_plugin.graph.dependency_groups import DependencyGroups
from gumbel_plugin.graph.tracing import catch_up


def replay(model: nn.Module, dependency: DependencyGroups, history: Sequence[Any]) -> None:
    """Remove what a history says from a model.

    Entries that remove units of the model's groups do so wherever the groups say; the first one that does not, and all
    after it, go through Torch-Pruning's graph.

    Args:
        model: The unpruned model, without gates; half pruned if this raises.
        dependency: Its groups, of which nothing was removed yet.
        history: Entries of a root's name, whether its output channels go, and their numbers.

    Raises:
        TargetError: If an entry does not fit what is left of the model.
    """
    graph, known = dependency.graph, True
    for name, of_outputs, positions in copy.deepcopy(list(history)):
        modules = dict(model.named_modules())
        layer = modules.get(name)
        kind = None if layer is None or name not in dependency.heads else kind_of(layer)
        group = None if kind is None else kind.describe(name, model)
        if group is None and layer not in graph.module2node:
            raise TargetError(f"pruning history: layer {name!r} is not in the graph{nearest(str(name), modules)}")
        pruner = None if group else graph.get_pruner_of_module(layer)
        width = group.size if group else _width(pruner, layer, of_outputs)
        if len(set(positions)) >= width or not all(0 <= position < width for position in positions):
            raise TargetError(f"pruning history: {name!r} has {width} units left, of which {positions} cannot go")
        if pruner is None:
            remove_heads(model, name, torch.tensor(positions))
        elif known and (found := dependency.group_at(name, of_outputs, positions)) is not None:
            found.prune(record_history=False)
        else:
            known = False
            function = pruner.prune_out_channels if of_outputs else pruner.prune_in_channels
            graph.get_pruning_group(layer, function, positions).prune(record_history=False)
            catch_up(graph, {})


def _width(pruner: Any, layer: Any, of_outputs: bool) -> int:
    return int(pruner.get_out_channels(layer) if of_outputs else pruner.get_in_channels(layer))
