"""How a repair replaces what is NNI's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def replace_once(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Put a function in the place of a class's or module's own, which it carries on as ``__wrapped__``; once.

    Several repairs may replace one function, each the one before it.
    """
    current = original = getattr(owner, name)
    while current is not None:
        if current is replacement:
            return
        current = getattr(current, "__wrapped__", None)
    setattr(owner, name, functools.update_wrapper(replacement, original))


def innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return NNI's own function under all repairs of it."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
