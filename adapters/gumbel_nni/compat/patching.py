"""How a repair replaces what is NNI's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def replace_once(owner: type, name: str, replacement: Callable[..., Any]) -> None:
    """Put a function in the place of a class's own, which it carries on as ``__wrapped__``; once."""
    original = getattr(owner, name)
    if original is not replacement:
        setattr(owner, name, functools.update_wrapper(replacement, original))
