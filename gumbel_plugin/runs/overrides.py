"""Settings of the command line, ``--set a.b=c``, that override a configuration file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from gumbel_plugin.config_values import MAX_DEPTH
from gumbel_plugin.errors import ConfigError, shown
from gumbel_plugin.storage.yaml_files import parse_yaml


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values with ``a.b=c`` settings applied; c is read as YAML, list items go by number.

    Raises:
        ConfigError: If a setting is not of that form or its path runs through a plain value.
    """
    result = copy.deepcopy(values)
    for setting in overrides:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {shown(setting)} must read key.subkey=value")
        *parents, last = path.split(".")
        if len(parents) >= MAX_DEPTH:
            raise ConfigError(f"--set {shown(setting)} is nested too deeply: more than {MAX_DEPTH} levels")
        place: Any = result
        for key in parents:
            place = place[_item(place, key, setting)] if isinstance(place, list) else place.setdefault(key, {})
            if not isinstance(place, dict | list):
                raise ConfigError(f"--set {shown(setting)}: {shown(key)} is a plain value, it has no sub-keys")
        try:
            value = parse_yaml(text)
        except ConfigError as error:
            raise ConfigError(f"--set {shown(setting)}: {error}") from error
        place[_item(place, last, setting) if isinstance(place, list) else last] = value
    return result


def _item(place: list[Any], key: str, setting: str) -> int:
    if not (key.isdecimal() and len(key) < 10) or int(key) >= len(place):
        count = len(place)
        raise ConfigError(
            f"--set {shown(setting)}: {shown(key)} is no number of an item; the list has {count}, from 0 on"
        )
    return int(key)
