"""One process a run's folder: a lock that the system releases when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gumbel_plugin.errors import ConfigError, shown_path

LOCK = "run.lock"
"""The locked file; it names the process that writes into its folder, and is removed when that process is done."""

_HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, 2**30, os.SEEK_SET)  # a locked byte cannot be read: one that no name reaches
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let no other process write into a run's folder; where the file system has no locks, warn and go on.

    Args:
        folder: The folder, which exists.

    Raises:
        ConfigError: If another process holds the folder (the message names it), or the folder cannot be written.
    """
    path = folder / LOCK
    try:
        file = _open_locked(path)
        while not _is_at(path, file):  # its last holder removed it between our opening and our locking it
            file.close()
            file = _open_locked(path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    except OSError as error:
        raise ConfigError(f"output {shown_path(folder)} cannot be written: {error}") from error
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # removed with its folder; or still open, when Windows keeps it
                path.unlink()


def _open_locked(path: Path) -> IO[str]:
    file = path.open("a+", encoding="utf-8", errors="replace")
    try:
        _lock(file.fileno())
    except OSError as error:
        if error.errno in _HELD:
            with file:
                file.seek(0)
                holder = file.read(100) or "another process"
            raise ConfigError(
                f"output {shown_path(path.parent)} is in use by {holder}; wait for it, or choose another folder"
            ) from None
        warnings.warn(
            f"{path} cannot be locked ({error}): start no second run in this folder before this one ends", stacklevel=2
        )
    return file


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
