"""What Torch-Pruning's arguments ask of each group, and which groups they rank together."""

from __future__ import annotations

from collections.abc import Mapping

import torch_pruning as tp
from torch import nn

from gumbel_plugin.graph.attention_heads import kind_of
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.graph.dependency_groups import DependencyGroups
from gumbel_plugin.training.group_planner import GroupMetric, Share


def shares(
    pruner: tp.pruner.BasePruner, dependency: DependencyGroups, metric: GroupMetric, step: int
) -> dict[str, Share]:
    """Read from a pruner's arguments what is asked of its groups, by name; of those that are missing, nothing.

    Args:
        pruner: The pruner, of Torch-Pruning.
        dependency: Its groups.
        metric: What its ratios are fractions of.
        step: The iterative step; -1 is the last one.
    """
    found = {}
    modules = dict(pruner.model.named_modules())
    patterns = _patterns(pruner) if pruner.isomorphic else {}
    for group in dependency.groups:
        of_heads = group.name in dependency.heads
        if not of_heads and kind_of(modules[group.root]) is not None:
            continue  # heads that stay
        layers = [modules[part.module] for part in group.producers]
        own = next((layer for layer in layers if layer in pruner._layer_to_scope), None)
        budget, ratios = "all groups" if pruner.global_pruning else group.name, pruner.per_step_pruning_ratio
        if metric != "channels":
            budget = "the network"
        elif of_heads:
            given = pruner.head_pruning_ratio_dict
            ratios = next((given[layer] for layer in layers if layer in given), pruner.per_step_head_pruning_ratio)
            budget = "attention heads" if pruner.global_pruning else group.name
        elif own is not None:
            budget, ratios = pruner._layer_to_scope[own][0], pruner.pruning_ratio_dict[own]
        elif pruner.isomorphic:
            budget = patterns.get(group.name) or _pattern(group, modules)
        if ratios[-1] > 0 or metric != "channels":
            found[group.name] = Share(budget, float(ratios[step]))
    return found


def _pattern(group: ChannelGroup, modules: Mapping[str, nn.Module]) -> str:
    """Return the kinds of layers that a group connects which is none of Torch-Pruning's."""
    sides = [*((part, "out") for part in group.producers), *((part, "in") for part in group.consumers)]
    return "isomorphic " + " ".join(f"{type(modules[part.module]).__name__}-{side}" for part, side in sides)


def _patterns(pruner: tp.pruner.BasePruner) -> dict[str, str]:
    """Return what each group connects: groups of one pattern are comparable (Fang et al., arXiv 2407.04616)."""
    patterns = {}
    for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        kinds = [
            f"{type(dep.source.module).__name__}-{type(dep.target.module).__name__}"
            f"-{'out' if pruner.DG.is_out_channel_pruning_fn(dep.handler) else 'in'}"
            for dep, _ in group
        ]
        patterns[pruner.DG._module2name[group[0].dep.target.module]] = "isomorphic " + " ".join(kinds)
    return patterns
