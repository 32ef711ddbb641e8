"""Entries of an NNI config list that learn nothing: their masks follow another module's (``align``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.pruning.tools import sparse_gen
from torch import nn

from gumbel_plugin.errors import TargetError, nearest
from gumbel_plugin.storage.mask_format import Masks

TargetSpaces = Mapping[str, Mapping[str, PruningTargetSpace]]


def split_aligned(entries: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the entries with a sparsity of their own, and those whose weights are aligned with another module's."""
    return [entry for entry in entries if not _is_aligned(entry)], [entry for entry in entries if _is_aligned(entry)]


def check_followers(model: nn.Module, entries: Sequence[Mapping[str, Any]]) -> None:
    """Refuse entries that align modules which the model does not have; NNI trains first and fails then.

    Raises:
        TargetError: With the name and the nearest one.
    """
    modules = dict(model.named_modules())
    for entry in entries:
        for name in entry.get("op_names") or ():
            if name not in modules:
                raise TargetError(f"op_names: {name!r} matches no module of the model{nearest(name, modules)}")


def followers_in(target_spaces: TargetSpaces) -> set[str]:
    """Return the modules whose weights follow another module's masks.

    Raises:
        TargetError: If a module that is to be followed is not pruned.
    """
    found = set()
    for name, spaces in target_spaces.items():
        space = spaces.get("weight")
        if space is None or space.align is None:
            continue
        source = space.align["module_name"]
        if source not in target_spaces:
            hint = nearest(str(source), target_spaces)
            raise TargetError(f"{name}.weight is aligned with {source!r}, which the config list does not prune{hint}")
        found.add(name)
    return found


@torch.no_grad()
def align_masks(masks: Masks, target_spaces: TargetSpaces) -> None:
    """Set the masks of the modules that follow others.

    Args:
        masks: The masks of the modules that are followed; one without follows nothing, and closes nothing.
        target_spaces: Target spaces of the followers, by module.
    """
    known: Masks = {name: dict(targets) for name, targets in masks.items()}
    for own in (False, True):  # a bias may follow its own weight, which follows another module's
        ready: dict[str, dict[str, PruningTargetSpace]] = {}
        for name, spaces in target_spaces.items():
            for target, space in spaces.items():
                if space.align is not None and space.target is not None:
                    source = space.align["module_name"] or name
                    if own is (source == name) and source in known:
                        ready.setdefault(name, {})[target] = space
        found = sparse_gen._expand_masks(sparse_gen._generate_align_sparsity(known, ready), ready)
        for name, targets in found.items():
            for target, mask in targets.items():
                target_spaces[name][target].mask = mask
                known.setdefault(name, {})[target] = target_spaces[name][target].mask


def _is_aligned(entry: Any) -> bool:
    settings = (entry.get("target_settings") or {}) if isinstance(entry, Mapping) else {}
    return isinstance(entry, Mapping) and "align" in {**entry, **(settings.get("weight") or {})}
