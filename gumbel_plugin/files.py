"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, and rename it; after an error nothing is left."""
    temporary = Path(f"{path}.partial")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
