"""Several pruners on one tensor: each has a target space of its own, and the tensor sees the product of their masks.

A target space may have a function ``before_unwrap``, called whoever unwraps the layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

import torch
from nni.compression.base.compressor import Pruner
from nni.compression.base.setting import canonicalize_settings
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.base.wrapper import ModuleWrapper, create_module_wrapper
from torch import Tensor, nn

from gumbel_nni.compat.patching import replaces

_logger = logging.getLogger(__name__)
_STACK = "_stacked_target_spaces"


class StackedTargetSpace(PruningTargetSpace):  # type: ignore[misc]
    """The target space of a second (third, ...) pruner of a tensor: the same tensor, another mask."""

    def __init__(self, number: int, *args: Any) -> None:
        self._number = number
        super().__init__(*args)

    @property
    def _mask_name(self) -> str:
        return f"{self._target_name}_mask_{self._number}"


def add_space(wrapper: ModuleWrapper, target: str, setting: Mapping[str, Any]) -> StackedTargetSpace:
    """Add one more pruner's target space to a tensor that has one."""
    first = wrapper.pruning_target_spaces[target]
    others = wrapper.__dict__.setdefault(_STACK, {}).setdefault(target, [])
    space = StackedTargetSpace(len(others) + 2, wrapper, target, first.type, dict(setting))
    others.append(space)
    return space


def hide(space: PruningTargetSpace) -> None:
    """Keep a target space's mask out of `get_masks`: nobody asked for it by a config list."""
    space.is_hidden = True


def weight_space(pruner: Pruner, name: str, module: nn.Module) -> PruningTargetSpace:
    """Return a pruner's target space on a layer's weight: a hidden one where its config list does not ask for any."""
    space = pruner._target_spaces.get(name, {}).get("weight")
    if space is not None:
        return space
    wrapper = pruner._module_wrappers.get(name)
    if wrapper is not None and "weight" in wrapper.pruning_target_spaces:
        space = add_space(wrapper, "weight", {"sparse_ratio": None, "granularity": None})
    else:
        if wrapper is not None:
            wrapper.unwrap()
        weight_only = {"target_names": ["weight"]}
        wrapper, spaces = create_module_wrapper(pruner.bound_model, module, name, "pruning", weight_only, wrapper)
        pruner._module_wrappers[name] = wrapper
        wrapper.wrap()
        space = spaces["weight"]
    hide(space)
    return space


def spaces_of(wrapper: ModuleWrapper, target: str) -> Iterator[PruningTargetSpace]:
    """Yield all pruning target spaces of one tensor, the first pruner's first."""
    if target in wrapper.pruning_target_spaces:
        yield wrapper.pruning_target_spaces[target]
        yield from getattr(wrapper, _STACK, {}).get(target, ())


def masks_of(wrappers: Mapping[str, ModuleWrapper]) -> dict[str, dict[str, Tensor | None]]:
    """Return the masks of wrapped layers, in NNI's format: on each tensor the product of all that are not hidden."""
    masks: dict[str, dict[str, Tensor | None]] = {}
    for name, wrapper in wrappers.items():
        for target in wrapper.pruning_target_spaces:
            shown = [space for space in spaces_of(wrapper, target) if not _is_hidden(space)]
            if shown:
                masks.setdefault(name, {})[target] = _product([space.mask for space in shown])
    return masks


@replaces(ModuleWrapper, "extend_target_spaces")
def two_pruners_on_one_layer(
    original: Any, self: ModuleWrapper, sub_config: dict[str, Any], mode: str
) -> dict[str, Any]:
    """Let the masks of two pruners on one tensor multiply.

    Cause (a gap, whatever the versions): NNI drops the second pruner's settings, saying "already configured, the new
    config will be ignored", and its masks then overwrite the first one's.
    """
    known = set(self.pruning_target_spaces) if mode == "pruning" else set()
    settings = canonicalize_settings(self.module, sub_config, mode) if known else {}
    twice = [name for name in settings if name in known]
    fresh = [name for name in settings if name not in known]
    spaces: dict[str, Any] = {}
    if fresh or not twice:
        spaces.update(original(self, {**sub_config, "target_names": fresh} if twice else sub_config, mode))
    shown = [name for name in twice if not all(_is_hidden(space) for space in spaces_of(self, name))]
    if shown:
        _logger.warning("%s: an earlier pruner masks its %s too; the masks multiply", self.name, " and ".join(shown))
    return {**spaces, **{name: add_space(self, name, settings[name]) for name in twice}}


@replaces(ModuleWrapper, "_apply_mask_helper", part_of=two_pruners_on_one_layer)
def _apply_all_masks(original: Any, self: ModuleWrapper, target: Tensor, target_space: PruningTargetSpace) -> Tensor:
    result: Tensor = original(self, target, target_space)
    for space in getattr(self, _STACK, {}).get(target_space._target_name, ()):
        result = original(self, result, space)
    return result


@replaces(ModuleWrapper, "unwrap", part_of=two_pruners_on_one_layer)
def _unwrap(original: Any, self: ModuleWrapper) -> None:
    for target in self.pruning_target_spaces:
        for space in spaces_of(self, target):
            if hasattr(space, "before_unwrap"):
                space.before_unwrap()
    original(self)


@replaces(Pruner, "get_masks", part_of=two_pruners_on_one_layer)
def _get_masks(original: Any, self: Pruner) -> dict[str, dict[str, Tensor | None]]:
    return masks_of(self._module_wrappers)


@replaces(Pruner, "update_masks", part_of=two_pruners_on_one_layer)
@torch.no_grad()
def _update_masks(original: Any, self: Pruner, masks: Mapping[str, Mapping[str, Tensor | None]]) -> None:
    """Write each mask to this pruner's own target space; what it was not configured for goes where NNI puts it."""
    others: dict[str, dict[str, Tensor | None]] = {}
    for name, targets in masks.items():
        for target, mask in targets.items():
            space = self._target_spaces.get(name, {}).get(target)
            if isinstance(space, StackedTargetSpace):
                space.mask = None if mask is None else mask.to(space.target.device)
            else:
                others.setdefault(name, {})[target] = mask
    original(self, others)


def _product(masks: list[Tensor | None]) -> Tensor | None:
    given = [mask for mask in masks if mask is not None]
    return reduce(torch.mul, given).clone() if given else None


def _is_hidden(space: PruningTargetSpace) -> bool:
    return getattr(space, "is_hidden", False)
