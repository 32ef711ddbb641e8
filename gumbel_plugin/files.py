"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gumbel_plugin.errors import OutputError


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, and rename it; after an error nothing is left."""
    temporary = Path(f"{path}.partial")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name the file that the system's error is about.

    Raises:
        OutputError: If the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
