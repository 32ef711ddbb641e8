"""Every exception this project raises on purpose.

All derive from `GumbelPluginError`, and from the built-in exception that fits, so that both
``except GumbelPluginError`` and ``except ValueError`` do what a reader expects.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class GumbelPluginError(Exception):
    """Base of all errors of this project."""


class ConfigError(GumbelPluginError, ValueError):
    """A configuration key or an argument has a value that breaks a rule; nothing was trained or written."""


class TargetError(GumbelPluginError, ValueError):
    """A module, tensor, mask or group that was asked for does not exist or cannot be masked."""


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
    shown = ", ".join(valid[:8]) + (", ..." if len(valid) > 8 else "")
    return f"; valid: {shown}" if valid else "; there is none"
