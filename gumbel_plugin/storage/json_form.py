"""JSON in the headers of files, read strictly: a damaged or crafted file is an error that names the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gumbel_plugin.errors import DataError, shown

Form = Any
"""What a value must be: ``str``, ``None``, a range of whole numbers, ``[form]`` for a list, ``{str: form}`` for a
mapping of any names, or a tuple of forms of which one must fit."""


def read_json(text: str, required: Mapping[str, Form], optional: Mapping[str, Form], source: str) -> dict[str, Any]:
    """Return a JSON mapping whose values have some forms; a later version may write more keys.

    Args:
        text: The JSON.
        required: The form of every key that must be there.
        optional: The forms of keys that may be.
        source: What the message begins with.

    Raises:
        DataError: If it is no JSON, or does not fit: with the first key that does not, and its value.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: Invalid JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{source}: it is {shown(values)}, and must be a mapping")
    for key, form in {**required, **optional}.items():
        if key not in values and key in required:
            raise DataError(f"{source}: {shown(key)}: Field required")
        problem = _misfit(values[key], form, key) if key in values else ""
        if problem:
            raise DataError(f"{source}: {problem}")
    return values


def _misfit(value: Any, form: Form, path: str) -> str:
    """Return which part of a value does not fit, and how; empty if all of it does."""
    for each in form if isinstance(form, tuple) else (form,):
        if type(each) in (dict, list) and type(value) is type(each):
            inner, parts = (each[str], value.items()) if type(each) is dict else (each[0], enumerate(value))
            return next(filter(None, (_misfit(part, inner, f"{path}.{key}") for key, part in parts)), "")
        if isinstance(each, range):
            fits = type(value) is int and value in each
        else:
            fits = value is None if each is None else each is str and isinstance(value, str)
        if fits:
            return ""
    return f"{shown(path)} = {shown(value)}: must be {_in_words(form)}"


def _in_words(form: Form) -> str:
    if isinstance(form, tuple):
        return " or ".join(map(_in_words, form))
    if isinstance(form, range):
        return f"a whole number from {form[0]} to {form[-1]}"
    return "text" if form is str else "null" if form is None else "a mapping" if isinstance(form, dict) else "a list"
