"""JSON that this project wrote, read strictly: a damaged or crafted file is an error that names the key."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gumbel_plugin.errors import DataError, shown


class Record(BaseModel):
    """The keys that are needed of a JSON mapping, and their types; a later version may write more keys."""

    model_config = ConfigDict(strict=True, extra="allow")


def read_record(model: type[Record], text: str | bytes, source: str) -> dict[str, Any]:
    """Return the plain values of a JSON mapping that fits a model, unknown keys included.

    Args:
        model: What the mapping must hold.
        text: The JSON.
        source: What the message begins with.

    Raises:
        DataError: If it is no JSON, or does not fit: with the first key that does not, and its value.
    """
    try:
        return model.model_validate_json(text).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        at = f"{shown(key)} = {shown(first['input'])}: " if key and first["type"] != "missing" else f"{shown(key)}: "
        raise DataError(f"{source}: {at if key else ''}{first['msg']}") from error
