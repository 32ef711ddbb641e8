"""Torch-Pruning adapter: its dependency graph as channel groups, and learned gates as a pruner on it."""

from gumbel_plugin.graph.dependency_groups import DependencyGroups, find_groups
from gumbel_torch_pruning.group_pruner import GumbelGroupPruner
from gumbel_torch_pruning.importance import GateImportance

__all__ = ["DependencyGroups", "GateImportance", "GumbelGroupPruner", "find_groups"]
