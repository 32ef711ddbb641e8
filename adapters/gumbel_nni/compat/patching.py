"""How a repair replaces what is NNI's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

REPAIRS: dict[str, list[Callable[[], bool]]] = {}
"""By its name, the steps of each repair; made in this order, each returns whether it is in force."""


def repair(step: Callable[[], bool]) -> Callable[[], bool]:
    """Register a repair that replaces no function; it may be called again, and returns whether it is in force."""
    REPAIRS[step.__name__] = [step]
    return step


def replaces(
    owner: Any, name: str, *importers: Any, part_of: Callable[..., Any] | None = None, where: bool = True
) -> Callable[[Function], Function]:
    """Let the decorated function run in the place of NNI's own, which it gets as its first argument.

    Several repairs may replace one function, each the one before it.

    Args:
        owner: The class or module that has the function.
        name: The function's name.
        *importers: Modules that have imported it.
        part_of: The repair that this belongs to; by default the decorated function is one itself.
        where: Whether what it repairs is broken here; if not, nothing is replaced.
    """

    def register(replacement: Function) -> Function:
        if where:
            step = functools.partial(_replace_once, replacement, name, owner, *importers)
            REPAIRS.setdefault((part_of or replacement).__name__, []).append(step)
        return replacement

    return register


def _replace_once(replacement: Callable[..., Any], name: str, *owners: Any) -> bool:
    """Put a function in the place of NNI's, unless it is there; return True."""
    current = original = getattr(owners[0], name)
    while current is not None:
        if getattr(current, "replacement", None) is replacement:
            return True
        current = getattr(current, "__wrapped__", None)

    @functools.wraps(original)
    def repaired(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    repaired.replacement = replacement  # type: ignore[attr-defined]
    static = isinstance(inspect.getattr_static(owners[0], name), staticmethod)
    for owner in owners:
        setattr(owner, name, staticmethod(repaired) if static else repaired)
    return True


def innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return NNI's own function under all repairs of it."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
