"""Entries of an NNI config list that learn nothing: their masks follow another module's (``align``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.pruning.tools import sparse_gen

from gumbel_plugin.errors import TargetError, nearest
from gumbel_plugin.learning.session import Masks

TargetSpaces = Mapping[str, Mapping[str, PruningTargetSpace]]


def split_aligned(entries: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the entries that say how much goes, and those whose weights are aligned with another module's."""
    follow = [isinstance(entry, Mapping) and "align" in _weight_settings(entry) for entry in entries]
    learnt = [entry for entry, follows in zip(entries, follow, strict=True) if not follows]
    return learnt, [entry for entry, follows in zip(entries, follow, strict=True) if follows]


@torch.no_grad()
def align_masks(masks: Masks, target_spaces: TargetSpaces) -> None:
    """Set the masks of all target spaces that follow others, and have no mask of their own.

    Args:
        masks: The masks of the modules that may be followed, whole.
        target_spaces: A pruner's target spaces.

    Raises:
        TargetError: If a module that is to be followed has no mask.
    """
    followers: dict[str, dict[str, PruningTargetSpace]] = {}
    for name, spaces in target_spaces.items():
        for target, space in spaces.items():
            if space.align is None or space.target is None or target in masks.get(name, {}):
                continue
            source = space.align["module_name"] or name
            if source in masks:
                followers.setdefault(name, {})[target] = space
            elif source != name:
                raise TargetError(
                    f"{name}.{target} is aligned with {source!r}, which has no mask{nearest(source, masks)}"
                )
    found = sparse_gen._expand_masks(sparse_gen._generate_align_sparsity(masks, followers), followers)
    for name, targets in found.items():
        for target, mask in targets.items():
            target_spaces[name][target].mask = mask


def _weight_settings(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = entry.get("target_settings") or {}
    return {**entry, **(settings.get("weight") or {})}
