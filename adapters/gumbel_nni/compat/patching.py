"""How a repair replaces what is NNI's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def replace_once(name: str, replacement: Callable[..., Any], *owners: Any) -> bool:
    """Put a function in the place of NNI's own, which it gets as its first argument; once.

    Several repairs may replace one function, each the one before it.

    Args:
        name: The function's name.
        replacement: What runs instead.
        *owners: The class or module that has the function, and modules that have imported it.

    Returns:
        True: the repair is in force.
    """
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
