"""Torch-Pruning adapter: its dependency graph as channel groups, and learnt gates as a pruner on it."""

from gumbel_torch_pruning.groups import DependencyGroups, find_groups
from gumbel_torch_pruning.importance import GateImportance
from gumbel_torch_pruning.pruner import GumbelGroupPruner

__all__ = ["DependencyGroups", "GateImportance", "GumbelGroupPruner", "find_groups"]
