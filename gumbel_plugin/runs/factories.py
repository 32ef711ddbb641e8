"""What a configuration names as ``package.module:factory``: code of the user's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from gumbel_plugin.errors import ConfigError, nearest, shorten, shown


def import_factory(name: str, what: str) -> Callable[..., Any]:
    """Import the callable that a name of the form ``package.module:factory`` stands for; its module is run.

    Args:
        name: The name.
        what: What the factory makes, for messages: ``model`` or ``data set``.

    Raises:
        ConfigError: If the name has another form, there is no such module or callable, or importing it fails.
        ModuleNotFoundError: If the module imports another one that is missing.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise ConfigError(f"{what} {shown(name)} is not of the form package.module:factory")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists; something that it imports does not
        raise ConfigError(f"{what} {name!r}: there is no module {error.name!r} on the import path") from error
    except Exception as error:  # its own code
        raise ConfigError(f"{what} {name!r}: importing {module_name} raises {shorten(repr(error), 800)}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        hint = nearest(attribute, (key for key, value in vars(module).items() if callable(value)))
        raise ConfigError(f"{what} {name!r}: {module_name} has no callable {attribute!r}{hint}")
    found: Callable[..., Any] = factory
    return found
