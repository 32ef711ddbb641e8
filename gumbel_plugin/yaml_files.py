"""Configuration files as they are typed: YAML, and settings of the command line that override it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gumbel_plugin.errors import ConfigError


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        ConfigError: If the file is missing or is no YAML mapping.
    """
    if not path.is_file():
        raise ConfigError(f"config {str(path)!r} does not exist")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {str(path)!r} is no valid YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"config {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict | list):
        raise ConfigError(f"config {str(path)!r} must hold a mapping or an NNI config list")
    return content


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values with ``a.b=c`` settings applied; c is read as YAML, list items go by number.

    Raises:
        ConfigError: If a setting is not of that form or its path runs through a plain value.
    """
    result: dict[str, Any] = yaml.safe_load(yaml.safe_dump(values))
    for setting in overrides:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {setting!r} must read key.subkey=value")
        *parents, last = path.split(".")
        place: Any = result
        for key in parents:
            place = place[_item(place, key, setting)] if isinstance(place, list) else place.setdefault(key, {})
            if not isinstance(place, dict | list):
                raise ConfigError(f"--set {setting!r}: {key!r} is a plain value, it has no sub-keys")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting!r}: {text!r} is no valid YAML: {error}") from error
        place[_item(place, last, setting) if isinstance(place, list) else last] = value
    return result


def _item(place: list[Any], key: str, setting: str) -> int:
    if not key.isdecimal() or int(key) >= len(place):
        raise ConfigError(f"--set {setting!r}: {key!r} is no number of an item; the list has {len(place)}, from 0 on")
    return int(key)
