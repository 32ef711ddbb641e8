"""Every exception this project raises on purpose.

All derive from `GumbelPluginError`, and from the built-in exception that fits, so that both
``except GumbelPluginError`` and ``except ValueError`` do what a reader expects. Messages are bounded: what a user
typed, or what a damaged file holds, is shown with `shown`, and no message is longer than `_LONGEST`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

_LONGEST = 2000
"""How many characters a message has at most."""


class _ShortRepr(reprlib.Repr):
    """A ``repr`` that is bounded in length and depth, and that no value can make fail."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = 6
        self.maxstring = self.maxlong = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 10_000:  # Python refuses to write more than 4,300 digits
            return f"an integer of {x.bit_length()} bits"
        return super().repr_int(x, level)


_short = _ShortRepr()


def shown(value: object, limit: int = 160) -> str:
    """Return a value as a message shows it: its repr, shortened in the middle to at most `limit` characters."""
    return shorten(_short.repr(value), limit)


def shown_path(path: object) -> str:
    """Return a path as a message shows it: quoted, and whole unless it is longer than any that is meant."""
    return shorten(repr(str(path)), 400)


def shorten(text: str, limit: int = _LONGEST) -> str:
    """Return a text of at most `limit` characters; what is too much is left out of its middle."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[len(text) - half :]}"


class GumbelPluginError(Exception):
    """Base of all errors of this project."""

    def __init__(self, message: str) -> None:
        super().__init__(shorten(message))


class ConfigError(GumbelPluginError, ValueError):
    """A configuration key or an argument has a value that breaks a rule; nothing was trained or written."""


class TargetError(GumbelPluginError, ValueError):
    """A module, tensor, mask or group that was asked for does not exist or cannot be masked."""


class NothingToGateError(TargetError):
    """No group of a network can be gated.

    Attributes:
        groups: All of its groups, each with its reason, as `GumbelGroupPruner.groups` would return them.
    """

    def __init__(self, message: str, groups: Sequence[Any]) -> None:
        super().__init__(message)
        self.groups = list(groups)

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.groups)


class GraphError(GumbelPluginError, RuntimeError):
    """The network could not be traced, or a change to it would break it."""


class LifecycleError(GumbelPluginError, RuntimeError):
    """A verb was called at the wrong time, for instance `attach` twice."""


class NonFiniteLossError(GumbelPluginError, RuntimeError):
    """The training loss became NaN or infinite."""


class EquivalenceError(GumbelPluginError, RuntimeError):
    """The small model does not compute what the masked model computes."""


class DataError(GumbelPluginError, RuntimeError):
    """A data set is missing or damaged."""


class OutputError(ConfigError, OSError):
    """A file of a result cannot be written, for instance because the disk is full."""


class IncompatibleLibraryError(GumbelPluginError, ImportError):
    """A library that is installed does not work with this Python or torch."""


class MissingExtraError(GumbelPluginError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; install it with: pip install 'gumbel-plugin[{extra}]'")


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return a hint that names the valid choice nearest to a wrong one.

    Args:
        name: What the user wrote.
        choices: What would have been valid.

    Returns:
        ``"; did you mean 'conv1'?"`` where something is near, else ``"; valid: a, b, c"`` (at most eight).
    """
    valid = sorted(set(choices))
    close = get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    first = ", ".join(valid[:8]) + (", ..." if len(valid) > 8 else "")
    return f"; valid: {first}" if valid else "; there is none"
