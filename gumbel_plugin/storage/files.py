"""How files are written: whole or not at all, or line by line; and which are safe to open."""

from __future__ import annotations

import os
from pathlib import Path

from gumbel_plugin.errors import DataError, OutputError, shorten, shown_path


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, and rename it; after an error nothing is left.

    Raises:
        OutputError: If the file cannot be written (no folder, no permission, a full disk), or what has its name is no
            regular file: folders, devices, pipes and links are never replaced.
    """
    check_writable(path)
    temporary = Path(f"{path}.partial")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed; a link there must not be followed
        try:
            with temporary.open("xb") as file:
                file.write(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # a ValueError: a NUL in the name
        raise OutputError(f"{shown_path(path)} cannot be written: {problem_of(error)}") from error


def append_text(path: str | Path, text: str) -> None:
    """Append to a file in UTF-8, or begin it; after an error, part of the text may be there.

    Raises:
        OutputError: If the file cannot be written.
    """
    try:
        with Path(path).open("ab") as file:
            file.write(text.encode())
    except OSError as error:
        raise OutputError(f"{shown_path(path)} cannot be written: {problem_of(error)}") from error


def check_writable(path: str | Path) -> None:
    """Refuse a file that cannot be written, before anything is computed for it.

    Raises:
        OutputError: If its folder does not exist, or what has its name is no regular file.
    """
    file = Path(path)
    try:
        problem = None if file.parent.is_dir() else "its folder does not exist"
        if file.is_symlink():
            problem = "it is a symbolic link; name the file that it points to"
        elif file.exists() and not file.is_file():
            problem = "it is a folder" if file.is_dir() else "it is no regular file"
    except (OSError, ValueError) as error:  # a name that is too long, or that holds a NUL
        problem = problem_of(error)
    if problem is not None:
        raise OutputError(f"{shown_path(path)} cannot be written: {problem}")


def check_readable(path: str | Path, kind: str) -> None:
    """Refuse to open what is no regular file: a pipe would block, and a device may never end.

    Args:
        path: The file.
        kind: What it should be, for the message.

    Raises:
        DataError: If there is no such file.
    """
    try:
        regular, exists = os.path.isfile(path), os.path.lexists(path)
    except (OSError, ValueError):
        regular = exists = False
    if not regular:
        problem = "it is no regular file" if exists else "it does not exist"
        raise DataError(f"{kind} {shorten(str(path), 400)} cannot be read: {problem}")


def problem_of(error: Exception) -> str:
    """Return what an error says, without the path that an OSError's own text repeats."""
    return getattr(error, "strerror", None) or str(error)
