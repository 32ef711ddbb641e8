"""What is wrong with a configuration, in one line: which key, its value, the rule, and the nearest valid choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from gumbel_plugin.errors import nearest, shorten, shown

_SCALARS = ("int", "float", "str")
_MOST = 8  # errors that are listed; the others are counted


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Return in one line what pydantic found.

    Args:
        error: What pydantic raised.
        model: The section that was validated.
        prefix: What the keys begin with, such as ``options.``.
    """
    lines: list[str] = []
    items = error.errors(include_url=False)
    for item in items:
        unknown = item["type"] in ("extra_forbidden", "unexpected_keyword_argument")
        keys = item["loc"][:-1] if unknown else item["loc"]  # the last one is as the user wrote it, brackets and all
        path = [part for part in keys if not _is_alternative(part)] + list(item["loc"][len(keys) :])
        key = shorten(prefix + ".".join(str(part) for part in path), 160)
        scalar = item["loc"] and item["loc"][-1] in _SCALARS
        if scalar and isinstance(item["input"], dict | list | tuple) and (lines or item is not items[-1]):
            continue  # "a number or a schedule" was given a mapping: what is wrong with the schedule is enough
        if unknown:
            lines.append(f"{key}: unknown key{nearest(str(path[-1]), _fields_at(model, path[:-1]))}")
        elif item["type"] == "missing":
            lines.append(f"{key}: required, but missing")
        else:
            rule = item["msg"].removeprefix("Value error, ") + _fraction_hint(item)
            whole_section = isinstance(item["input"], dict | BaseModel)
            lines.append(f"{key}: {rule}" if whole_section else f"{key} = {shown(item['input'])}: {rule}")
    more = f"; and {len(lines) - _MOST} more" if len(lines) > _MOST else ""
    return "; ".join(lines[:_MOST]) + more


def _fraction_hint(item: Mapping[str, Any]) -> str:
    """Return a hint where a percentage was given for a fraction, such as 50 for 0.5."""
    value = item["input"]
    limits = item.get("ctx", {})
    below_one = item["type"] in ("less_than", "less_than_equal") and limits.get("lt", limits.get("le")) == 1
    return (
        f"; did you mean {value / 100:g}?" if below_one and isinstance(value, int | float) and 2 <= value < 100 else ""
    )


def _is_alternative(part: int | str) -> bool:
    """Whether a part of an error's location is no key, but which type of ``A | B`` was tried."""
    return part in _SCALARS or "[" in str(part)


def _fields_at(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """Return the valid keys of the section at a path of keys."""
    fields: Mapping[str, Any] = model.model_fields
    for key in path:
        field = fields.get(str(key))
        annotation = getattr(field, "annotation", None)
        for candidate in (annotation, *getattr(annotation, "__args__", ())):
            found = getattr(candidate, "model_fields", getattr(candidate, "__pydantic_fields__", None))
            if found:
                fields = found
                break
    return list(fields)
