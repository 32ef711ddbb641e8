"""Configuration files as they are typed: YAML, with a few rules more."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from gumbel_plugin.config_values import MAX_DEPTH, MAX_VALUES, plain
from gumbel_plugin.errors import ConfigError, shorten, shown, shown_path
from gumbel_plugin.storage.files import problem_of

MAX_BYTES = 1_000_000
"""How large a configuration file may be."""

# YAML 1.1, which PyYAML follows, takes 1e-3 for text because it has no decimal point; YAML 1.2 does not.
_EXPONENT_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))
_TAG = "tag:yaml.org,2002:"
_SCALARS = ("null", "bool", "int", "float", "str")
_VALUE_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without what surprises: no key twice, nothing within itself, bounded nesting."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if self.depth > MAX_DEPTH:
            raise _error(f"nested too deeply: more than {MAX_DEPTH} levels", self._mark())
        if self.nodes > 2 * MAX_VALUES:  # keys and values
            raise _error(f"the configuration holds more than {MAX_VALUES:,} values", self._mark())
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def _mark(self) -> yaml.Mark:
        return self.peek_event().start_mark  # type: ignore[no-untyped-call,no-any-return]

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if node in self.recursive_objects:  # an alias is the same node as its anchor
            raise _error("an alias makes it contain itself", node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            if kind not in _SCALARS:  # a date, for instance
                hint = f"{shown(node.value)} reads as {shown(kind)}; if it is text, put it in quotes"
                raise _error(hint, node.start_mark)
        elif kind != ("map" if isinstance(node, yaml.MappingNode) else "seq"):
            raise _error(f"the tag {shown(kind)} does not belong here", node.start_mark)
        try:
            return super().construct_object(node, deep=True)
        except ConfigError:
            raise
        except _VALUE_ERRORS as error:
            raise _error(f"{shown(node.value)} is no valid {kind}", node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        own: dict[Hashable, Any] = {}
        merged: dict[Hashable, Any] = {}
        lines: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            is_merge = key_node.tag == _TAG + "merge"
            key = "<<" if is_merge else self.construct_object(key_node)
            if not isinstance(key, Hashable):
                raise _error("a key must be text", key_node.start_mark)
            line = key_node.start_mark.line + 1
            if key in lines:
                raise ConfigError(f"line {line}: the key {shown(key)} is given twice, first in line {lines[key]}")
            lines[key] = line
            if is_merge:
                merged = self._merged(value_node)
            else:
                own[key] = self.construct_object(value_node)
        return {**merged, **own}

    def _merged(self, node: yaml.Node) -> dict[Hashable, Any]:
        """Return what ``<<`` takes over: of several mappings the earlier ones win."""
        content = self.construct_object(node)
        mappings = content if isinstance(content, list) else [content]
        merged: dict[Hashable, Any] = {}
        for mapping in mappings:
            if not isinstance(mapping, dict):
                raise _error("<< takes over a mapping, or a list of mappings", node.start_mark)
            merged = {**mapping, **merged}
        return merged


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: text that looks like 1e-3 is quoted, and nothing is an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(*_EXPONENT_FLOAT)


def parse_yaml(text: str) -> Any:
    """Parse a text of YAML into plain data (see `gumbel_plugin.config_values.plain`).

    Ordinary anchors, aliases and merge keys are understood; numbers are those of YAML 1.1, and ``1e-3``.

    Raises:
        ConfigError: If it is no valid YAML, gives a key twice, contains itself, or expands to too much; the message
            names the line or the key.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        return plain(loader.get_single_data())
    except (yaml.YAMLError, *_VALUE_ERRORS) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"it is no valid YAML: {shorten(' '.join(str(error).split()), 500)}") from error
    finally:
        if loader is not None:
            loader.dispose()


def write_yaml(values: dict[str, Any]) -> str:
    """Return plain data as YAML that `parse_yaml` reads back to the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def read_yaml(path: Path) -> Any:
    """Read a YAML file of UTF-8 text, of at most `MAX_BYTES`.

    Raises:
        ConfigError: If the file is missing, no regular file, too large, or is no YAML mapping or list.
    """
    name = f"config {shown_path(path)}"
    raw = _read_bytes(path, name)
    try:
        content = parse_yaml(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is no valid YAML: {error}; save it as UTF-8") from error
    except ConfigError as error:
        raise ConfigError(f"{name} cannot be used: {error}") from error
    if not isinstance(content, dict | list):
        raise ConfigError(f"{name} must hold a mapping or an NNI config list")
    return content


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        path = path.expanduser()
        exists, is_regular = path.exists(), path.is_file()  # a device or a pipe may never end
        if is_regular:
            with path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL character; a home folder that is unknown
        raise ConfigError(f"{name} cannot be read: {problem_of(error)}") from error
    if not is_regular:
        raise ConfigError(f"{name} {'is no regular file' if exists else 'does not exist'}")
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{name} is larger than {MAX_BYTES:,} bytes; that is no configuration")
    return raw


def _error(problem: str, mark: yaml.Mark) -> ConfigError:
    return ConfigError(f"line {mark.line + 1}: {problem}")
