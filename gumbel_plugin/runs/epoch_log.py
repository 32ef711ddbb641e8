"""What each epoch of a training brought: a row of a CSV file, and now and then a line."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gumbel_plugin.errors import MissingExtraError
from gumbel_plugin.runs.result_files import read_log
from gumbel_plugin.runs.trackers import Tracker
from gumbel_plugin.storage.files import append_text, write_bytes

try:
    from lightning.pytorch.loggers.logger import Logger
    from lightning.pytorch.utilities import rank_zero_only
except ImportError as error:
    raise MissingExtraError("lightning", "lightning") from error

_BUDGET = ("target_density", "hard_density", "expected_density", "undecided_gates")
COLUMNS = (
    *("epoch", "loss", "sparsity", "soft_sparsity", *_BUDGET, "validation_score", "learning_rate", "macs", "seconds"),
)
_LINES = 10
_LONGEST_PAUSE = 30.0


def other_rank() -> bool:
    """Whether this process is not the first one of a distributed run."""
    return bool(rank_zero_only.rank != 0)


class EpochLog(Logger):  # type: ignore[misc]
    """A Lightning logger of one row an epoch.

    A line is logged about ten times in a training, and after half a minute without one, so that a log file stays short
    and a terminal does not look dead.

    Args:
        epochs: How many epochs the training may have.
        path: The CSV file, replaced if it exists; None writes none.
        log: Called with a line at a time; None logs none.
        trackers: Called with every row too.
        finished: How many epochs of the file stay, those that were finished before a training was killed.
    """

    def __init__(
        self,
        epochs: int,
        path: Path | None = None,
        log: Callable[[str], None] | None = None,
        *,
        trackers: Sequence[Tracker] = (),
        finished: int = 0,
    ) -> None:
        super().__init__()
        self._epochs = epochs
        self._path = path
        self._log = log
        self._trackers = trackers
        self._row: dict[str, float] = {}
        self._began = self._logged = time.monotonic()
        self._rows = 0
        if path is not None and finished:
            self._truncate(path, finished)

    @property
    def name(self) -> str:
        """Lightning asks for it; nothing is named after it."""
        return "epochs"

    @property
    def version(self) -> str:
        """Lightning asks for it; nothing is named after it."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a run's resolved configuration is written elsewhere."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Collect an epoch's numbers; Lightning sends those of validation first, those of training end the epoch."""
        self._row.update(metrics)
        if "loss" in metrics and not other_rank():
            self._finish_epoch()

    def _finish_epoch(self) -> None:
        now = time.monotonic()
        number = int(self._row["epoch"]) + 1
        row = {**self._row, "epoch": number, "seconds": round(now - self._began, 3)}
        self._row = {}
        if self._path is not None:
            if self._rows:
                append_text(self._path, _text([row]))
            else:
                write_bytes(self._path, _text([row], heading=True).encode())
        for track in self._trackers:
            track({name: value for name, value in row.items() if name in COLUMNS[1:]}, number)
        self._rows += 1
        due = number % math.ceil(self._epochs / _LINES) == 0 or now - self._logged >= _LONGEST_PAUSE
        if self._log is not None and (due or number in (1, self._epochs)):
            self._logged = now
            self._log(_line(row, self._epochs))

    def _truncate(self, path: Path, finished: int) -> None:
        rows = [row for row in read_log(path) if row["epoch"] <= finished] if path.is_file() else []
        write_bytes(
            path, _text([{k: v for k, v in row.items() if not math.isnan(v)} for row in rows], heading=True).encode()
        )
        self._rows = len(rows)
        self._began -= rows[-1]["seconds"] if rows else 0.0


def _text(rows: Sequence[Mapping[str, float]], *, heading: bool = False) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    if heading:
        writer.writeheader()
    for row in rows:
        writer.writerow({**row, "epoch": int(row["epoch"])})
    return text.getvalue()


def _line(row: Mapping[str, float], epochs: int) -> str:
    parts = [f"loss {row['loss']:.4f}"]
    if "sparsity" in row:
        parts.append(f"sparsity {row['sparsity']:.4f}")
    if "validation_score" in row:
        parts.append(f"validation {row['validation_score']:.2f}")
    if "hard_density" in row:
        target, hard, undecided = (100 * row[key] for key in ("target_density", "hard_density", "undecided_gates"))
        parts.append(f"{hard:.1f} % of the cost (target {target:.1f} %), {undecided:.1f} % of the gates undecided")
    return f"epoch {row['epoch']:.0f}/{epochs}: {', '.join(parts)}, {row['seconds']:.0f} s"
