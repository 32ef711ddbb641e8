"""States that do not fit what they are put into, found before anything is taken over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gumbel_plugin.errors import TargetError, shown
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.training.plan import Plan

_PHASES = [phase.value for phase in Phase]


def check_session_state(plan: Plan, state: object) -> None:
    """Refuse what is no state of a session with these masks.

    Args:
        plan: The session's plan.
        state: What should be put into it.

    Raises:
        TargetError: With the first key that is missing or does not fit.
    """
    keys = ("masks", "phases", "folded", "scales", "steps", "total_steps", "forward")
    found = require_keys(state, keys, "a session's state")
    masks, phases = require_keys(found["masks"], (), "masks"), require_keys(found["phases"], (), "phases")
    for mapping in (masks, phases):
        other = sorted(map(str, set(mapping) ^ set(plan.masks)))
        if other:
            raise TargetError(f"the state is of another plan: mask {shown(other[0])} is in only one of them")
    for name, mask in plan.masks.items():
        check_tensors(mask.state_dict(), masks[name], f"masks[{name!r}]")
    if any(phase not in _PHASES for phase in phases.values()) or len(set(phases.values())) > 1:
        raise TargetError(f"phases is {shown(dict(phases))}; all masks are in one phase, one of {', '.join(_PHASES)}")
    folded = found["folded"]
    if (
        not isinstance(folded, Sequence)
        or isinstance(folded, str)
        or any(name not in plan.gated_layers for name in folded)
    ):
        raise TargetError(f"folded is {shown(folded)}; it must list layers that are gated")
    scales = found["scales"]
    if not isinstance(scales, Sequence) or len(scales) != len(plan.scales()):
        raise TargetError(f"scales is {shown(scales)}; it must list the scales of {len(plan.scales())} layers")
    for number, (scale, given) in enumerate(zip(plan.scales(), scales, strict=True)):
        _check_tensor(scale, given, f"scales[{number}]")
    for key, least in (("steps", 0), ("total_steps", 1), ("forward", 0)):
        value = found[key]
        unknown = key == "total_steps" and value is None
        if not unknown and (type(value) is not int or value < least):
            raise TargetError(f"{key} is {shown(value)}; it must be a whole number of at least {least}")


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: object, what: str) -> None:
    """Refuse what is no state of an optimizer of these parameters; torch itself does not look at the shapes.

    Args:
        optimizer: The optimizer.
        state: What should be put into it.
        what: The state's name, for the message.

    Raises:
        TargetError: With the first key that is missing or does not fit.
    """
    found = require_keys(state, ("state", "param_groups"), what)
    groups, moments = found["param_groups"], require_keys(found["state"], (), f"{what}['state']")
    own = [len(group["params"]) for group in optimizer.param_groups]
    try:
        given = [len(group["params"]) for group in groups]
    except (TypeError, KeyError):
        given = []
    if own != given:
        raise TargetError(f"{what} has groups of {shown(given)} parameters; the optimizer's have {own}")
    numbers = [number for group in groups for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in require_keys(moments.get(number, {}), (), f"{what}['state'][{number!r}]").items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != parameter.shape:
                raise TargetError(
                    f"{what}['state'][{number!r}][{shown(key)}] has shape {tuple(value.shape)}, its parameter "
                    f"{tuple(parameter.shape)}"
                )


def require_keys(value: object, keys: Sequence[str], what: str) -> Mapping[Any, Any]:
    """Return a mapping that has these keys.

    Raises:
        TargetError: If it is none, or lacks one.
    """
    if not isinstance(value, Mapping):
        raise TargetError(f"{what} is {shown(value)}; it must be a mapping, as state_dict() returns it")
    missing = [key for key in keys if key not in value]
    if missing:
        raise TargetError(f"{what} lacks {missing[0]!r}; it must be what state_dict() returned")
    return value


def check_tensors(own: Mapping[str, Tensor], given: object, what: str) -> None:
    """Refuse what is not a tensor of the same shape and kind for each of one's own.

    Raises:
        TargetError: With the first one that is missing, unknown or does not fit.
    """
    found = require_keys(given, list(own), what)
    other = [key for key in found if key not in own]
    if other:
        raise TargetError(f"{what}[{shown(other[0])}] is unknown here; was it learned by another method?")
    for key, tensor in own.items():
        _check_tensor(tensor, found[key], f"{what}[{key!r}]")


def _check_tensor(own: Tensor, given: object, what: str) -> None:
    if not isinstance(given, Tensor):
        raise TargetError(f"{what} is {shown(given)}; it must be a tensor of shape {tuple(own.shape)}")
    if given.shape != own.shape:
        raise TargetError(f"{what} has shape {tuple(given.shape)}; here it has {tuple(own.shape)}")
    if given.is_floating_point() != own.is_floating_point():
        raise TargetError(f"{what} has dtype {given.dtype}; here it has {own.dtype}")
    if given.is_meta or (given.is_floating_point() and not bool(torch.isfinite(given).all())):
        raise TargetError(f"{what} has values that are no finite numbers")
