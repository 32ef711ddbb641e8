"""What the benchmarks share: rows that are kept as they come, so that an interrupted benchmark goes on where it was."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows that a file has so far."""
    return json.loads(path.read_text()) if path.exists() else []  # type: ignore[no-any-return]


def add_row(path: Path, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Append a row to a file, to which other processes may have appended; return all of them."""
    rows = [*read_rows(path), dict(row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".part")
    written.write_text(json.dumps(rows, indent=1) + "\n")
    written.replace(path)
    return rows


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.2f}"
