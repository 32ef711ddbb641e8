"""Torch-Pruning adapter: its dependency graph as channel groups."""

from gumbel_torch_pruning.groups import DependencyGroups, find_groups

__all__ = ["DependencyGroups", "find_groups"]
