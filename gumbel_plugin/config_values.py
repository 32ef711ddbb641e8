"""What the values of a configuration may be: plain data, of bounded size, with numbers that are written as numbers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import PurePath
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from gumbel_plugin.errors import ConfigError, shorten, shown

MAX_DEPTH = 50
"""How many levels of mappings and lists may lie in one another."""

MAX_VALUES = 20_000
"""How many values a configuration may hold, each use of a YAML alias counted."""

_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]{1,4}")  # 1e-3, which PyYAML's own loaders read as text
_SMALLEST, _LARGEST = 1.2e-38, 3.4e38  # of float32, in which networks and gates compute
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class Section(BaseModel):
    """Base of every part of a configuration: unknown keys are errors, and so are numbers in disguise."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_written_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        return as_number(value, cls.model_fields[str(info.field_name)].annotation)


def as_number(value: Any, annotation: Any) -> Any:
    """Return a value of a field; text and truth values are refused where the field takes only numbers.

    ``1e-3`` is taken although it is text: PyYAML reads it so because it has no decimal point.

    Args:
        value: What was given.
        annotation: The field's type.

    Raises:
        ValueError: If a number is in quotes, a percentage, or true or false.
    """
    choices = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if isinstance(value, list | tuple):
        of_items = next((get_args(choice)[0] for choice in choices if get_origin(choice) is tuple), Any)
        return [as_number(item, of_items) for item in value]
    if isinstance(value, bool) and not {int, float}.isdisjoint(choices) and bool not in choices:
        raise ValueError(f"{shown(value)} is no number")
    if not isinstance(value, str) or str in choices or {int, float}.isdisjoint(choices):
        return value
    if float in choices and _EXPONENT.fullmatch(value):
        return float(value)
    if _is_number(value):
        raise ValueError("it is text; write the number without quotes")
    if _is_number(value.removesuffix("%")):
        raise ValueError(f"it is text; write the fraction {float(value.removesuffix('%')) / 100:g}")
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def plain(config: object) -> Any:
    """Return a copy of a configuration made of dicts with text keys, lists, text, numbers, truth values and None only.

    Tuples become lists, paths text, NumPy's numbers Python's, and this project's own sections and schedules dicts.

    Raises:
        ConfigError: If something else is in it, if it contains itself, or if it is nested too deeply or too large; the
            message names the key.
    """
    return _Copier().copy(config, ())


class _Copier:
    def __init__(self) -> None:
        self.values = 0
        self.open: set[int] = set()

    def copy(self, value: object, path: tuple[str, ...]) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise ConfigError(
                f"the configuration holds more than {MAX_VALUES:,} values (aliases are counted each time)"
            )
        if isinstance(value, BaseModel):
            value = value.model_dump()
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if isinstance(value, Mapping | Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
            return self._copy_items(value, path)
        return _scalar(value, path)

    def _copy_items(self, value: Mapping[Any, Any] | Sequence[Any], path: tuple[str, ...]) -> Any:
        if id(value) in self.open:
            raise ConfigError(f"{_name(path)} contains itself")
        if len(path) >= MAX_DEPTH:
            raise ConfigError(f"{_name(path)} is nested too deeply: more than {MAX_DEPTH} levels")
        self.open.add(id(value))
        try:
            if not isinstance(value, Mapping):
                return [self.copy(item, (*path, str(number))) for number, item in enumerate(value)]
            for key in value:
                if not isinstance(key, str):
                    raise ConfigError(f"{_name(path)}: the key {shown(key)} is no text; put it in quotes")
            return {_text(key, path): self.copy(item, (*path, str(key))) for key, item in value.items()}
        finally:
            self.open.discard(id(value))


def _text(value: str | PurePath, path: tuple[str, ...]) -> str:
    text = str.__str__(value) if isinstance(value, str) else str(value)
    if _NO_TEXT.search(text):
        raise ConfigError(f"{_name(path)} = {shown(text)}: text holds no NUL characters and no surrogates")
    return text


def _scalar(value: object, path: tuple[str, ...]) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | PurePath):
        return _text(value, path)
    if isinstance(value, Integral):
        number = int(value)
        if not -(2**63) <= number < 2**63:
            raise ConfigError(f"{_name(path)} = {shown(number)}: an integer must be less than 2**63 in size")
        return number
    if isinstance(value, Real):
        real = float(value)
        if not math.isfinite(real) or (real and not _SMALLEST <= abs(real) <= _LARGEST):
            raise ConfigError(f"{_name(path)} = {shown(real)}: a number must be finite and fit into float32")
        return real
    raise ConfigError(
        f"{_name(path)} is a {type(value).__name__} ({shown(value)}); a configuration is made of mappings with text "
        "keys, lists, text, numbers, true, false and null"
    )


def _name(path: tuple[str, ...]) -> str:
    return shorten(".".join(path), 160) or "the configuration"
