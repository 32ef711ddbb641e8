"""The files of a run that hold plain numbers: ``summary.json``, ``gates.jsonl`` and ``log.csv``, read strictly."""

from __future__ import annotations

import csv
import json
import math
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, StringConstraints

from gumbel_plugin.errors import DataError, shorten, shown
from gumbel_plugin.runs.json_record import Record, read_record
from gumbel_plugin.storage.files import write_bytes

FORMAT = 1
"""The format of a summary; a folder with another one was written by another version of this project."""
DIGEST = "digest"

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Time = Annotated[float, Field(ge=0, le=1e12)]
_Score = Annotated[float, Field(ge=-1e15, le=1e15)]  # of what is larger no picture can be drawn
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Pair = Field(min_length=2, max_length=2)
_Batch = Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")]


class _Latency(Record):
    median_ms: _Time
    iqr_ms: _Time


class _Column(Record):
    parameters: _Count
    nonzero: _Count
    macs: _Count
    file_bytes: _Count
    latency: dict[_Batch, _Latency]
    score: _Score | None


class _Equivalence(Record):
    passed: bool
    samples: _Count
    errors: dict[str, FiniteFloat | None]  # an infinite error is null in JSON
    absolute_errors: dict[str, FiniteFloat | None]
    tolerances: dict[str, FiniteFloat]


class _Layer(Record):
    name: str
    kind: str
    before: Annotated[list[Annotated[_Count, Field(ge=1)]], _Pair]
    after: Annotated[list[_Count], _Pair] | None


class _Agreement(Record):
    samples: _Count
    unanimous: _Fraction
    gates: dict[str, Annotated[list[_Fraction], Field(min_length=1)]]


class _Recalibration(Record):
    norms: _Count
    batches: _Count
    before: _Score | None
    after: _Score | None


class _Summary(Record):
    columns: dict[str, _Column]
    equivalence: _Equivalence
    sparsity: _Fraction
    training_seconds: _Time
    layers: list[_Layer]
    versions: dict[str, str]
    git: str | None
    machine: str
    finished: str
    agreement: _Agreement | None = None
    recalibration: _Recalibration | None = None


class _Gates(Record):
    epoch: Annotated[int, Field(ge=1, lt=2**31)]
    phase: Literal["open", "learning", "fixed"]
    masks: Annotated[dict[str, Annotated[list[_Count], Field(min_length=1)]], Field(min_length=1)]


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write a run's summary with its digest; NaN and infinities, which JSON does not have, become null.

    Raises:
        ConfigError: If the file cannot be written.
    """
    write_json(path, {**summary, DIGEST: _digest(_json_ready(summary))})


def write_json(path: Path, value: Any) -> None:
    """Write JSON that appears whole or not at all; NaN and infinities, which JSON does not have, become null."""
    write_bytes(path, json.dumps(_json_ready(value), indent=2, allow_nan=False).encode())


def read_summary(path: Path) -> dict[str, Any]:
    """Read a run's summary.

    Raises:
        DataError: If it is no summary of this version, was changed after it was written, or a value is impossible.
    """
    summary = _mapping(path)
    found = summary.get("format", "none")
    if type(found) is not int or found != FORMAT:
        raise DataError(f"its format is {shorten(str(found), 80)}, this version of gumbel-plugin reads format {FORMAT}")
    missing = {name for name, field in _Summary.model_fields.items() if field.is_required()} - set(summary)
    if missing:
        raise DataError(f"it lacks {sorted(missing)}")
    if DIGEST in summary and summary[DIGEST] != _digest(summary):
        raise DataError(
            "it was damaged or changed after it was written: its digest does not fit its content; if you changed it on "
            f"purpose, delete its entry {DIGEST!r}"
        )
    read = read_record(_Summary, json.dumps(summary), "it is damaged")
    columns, proof = read["columns"], read["equivalence"]
    if not set(proof["errors"]) == set(proof["absolute_errors"]) == set(proof["tolerances"]):
        raise DataError("it is damaged: the errors and tolerances of its equivalence are of different data types")
    if not {"dense", "small"} <= set(columns):
        raise DataError(f"it is damaged: its networks are {shown(sorted(columns))}, which lack 'dense' or 'small'")
    batches = {name: list(column["latency"]) for name, column in columns.items()}
    if len({tuple(found) for found in batches.values()}) > 1:
        raise DataError(f"it is damaged: the networks were measured at different batch sizes: {shown(batches)}")
    return summary


def read_gates(path: Path) -> list[dict[str, Any]]:
    """Read the histograms of the gates, an entry an epoch; a last line that was cut off is left out.

    Raises:
        DataError: If it holds something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except ValueError as error:
        raise DataError(f"{path} holds no histograms of gates: {error}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        source = f"{path} holds no histograms of gates: line {number} is no mapping of epoch, phase and masks"
        entries.append(read_record(_Gates, line, source))
        first, last = ({name: len(c) for name, c in e["masks"].items()} for e in (entries[0], entries[-1]))
        if first != last or entries[-1]["epoch"] != number:
            raise DataError(
                f"{path} holds no histograms of gates: line {number} has other masks, gates or another epoch"
            )
    return entries


def read_log(path: Path) -> list[dict[str, float]]:
    """Read an epoch log; empty cells become NaN, and a last line that was cut off is left out.

    Raises:
        DataError: If it is no epoch log.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        heading = rows[0] if rows else []
        whole = [row for row in rows[1:] if len(row) == len(heading)]
        if whole and not {"epoch", "seconds"} <= set(heading):
            raise ValueError(f"its heading is {shown(','.join(heading))}")
        found = [{k: float(cell) if cell else math.nan for k, cell in zip(heading, row, strict=True)} for row in whole]
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path} is no epoch log: {error}") from error
    for number, row in enumerate(found, 1):
        if row["epoch"] != number or not math.isfinite(row["seconds"]):
            raise DataError(
                f"{path} is no epoch log: row {number} is of epoch {row['epoch']}, {row['seconds']} seconds"
            )
    return found


def _mapping(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is no JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _digest(summary: dict[str, Any]) -> str:
    content = {key: value for key, value in summary.items() if key != DIGEST}
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
