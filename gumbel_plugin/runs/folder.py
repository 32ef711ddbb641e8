"""A run's folder: what lies in it, how it is written, and how it is read again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gumbel_plugin.errors import ConfigError, DataError, GumbelPluginError, shown, shown_path
from gumbel_plugin.runs.result_files import read_gates, read_log, read_summary
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.shrinking.mask_file import load_masks
from gumbel_plugin.shrinking.pruned_file import read_header
from gumbel_plugin.storage.files import check_writable, write_bytes

CONFIG = "config.yaml"
SUMMARY = "summary.json"
MASKS = "masks.safetensors"
SMALL = "small.safetensors"
LOG = "log.csv"
GATES = "gates.jsonl"
REPORT = "report.html"

_OWN = frozenset((CONFIG, SUMMARY, MASKS, SMALL, LOG, GATES, REPORT))
_SPARE = 16 * 2**20


@dataclass
class RunFolder:
    """What could be read of a run's folder.

    Attributes:
        path: The folder.
        contents: By file name; a file that is missing or damaged is not in it.
        problems: What is wrong, by file name.
    """

    path: Path
    contents: dict[str, Any] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read every file of a run's folder, as far as they can be read.

        Raises:
            DataError: If there is no such folder.
        """
        if not path.is_dir():
            raise DataError(f"run folder {shown_path(path)} does not exist")
        folder = cls(path)
        for name, reader in _READERS.items():
            file = path / name
            if not file.is_file():
                folder.problems[name] = "is missing"
                continue
            try:
                folder.contents[name] = reader(file)
            except (GumbelPluginError, OSError, ValueError, KeyError, RecursionError) as error:
                folder.problems[name] = f"cannot be read: {error}"
        return folder

    def require(self, *names: str) -> None:
        """Refuse a folder that lacks what is needed.

        Raises:
            DataError: With the file, what is wrong with it, and what can still be read.
        """
        wrong = next((name for name in names if name in self.problems), None)
        if wrong is None:
            return
        readable = ", ".join(self._described(name) for name in self.contents) or "nothing"
        problem = f"{wrong} {self.problems[wrong]}"
        if self.problems.get(SUMMARY) == "is missing" and CONFIG in self.contents:
            problem = f"the run is not finished ({problem}); gumbel-prune run --resume {self.path} goes on with it"
        raise DataError(f"run folder {shown_path(self.path)}: {problem}; what can be read: {readable}")

    def _described(self, name: str) -> str:
        return f"{name} ({len(self.contents[name])} epochs)" if name in (LOG, GATES) else name


def truncate_gate_log(path: Path, epochs: int) -> None:
    """Keep the histograms of the first epochs only, those that were finished before a training was killed.

    Raises:
        DataError: If the file holds something else.
    """
    if path.is_file():
        kept = [entry for entry in read_gates(path) if entry["epoch"] <= epochs]
        write_bytes(path, "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in kept).encode())


def check_state(output: Path, config: RunConfig, *, force: bool, resume: bool) -> None:
    """Refuse to replace a finished run unasked, or to go on with what cannot be gone on with.

    Raises:
        ConfigError: If so.
        DataError: If there is nothing to resume, or it cannot be read.
    """
    if resume:
        check_resumable(output, config)
    else:
        refuse_finished(output, force)


def refuse_finished(output: Path, force: bool) -> None:
    """Refuse to replace a finished run unasked.

    Raises:
        ConfigError: If the folder holds one, or cannot be read.
    """
    try:
        finished = (output / SUMMARY).exists()
    except OSError as error:
        raise ConfigError(f"output {shown_path(output)} cannot be read: {error}") from error
    if finished and not force:
        raise ConfigError(
            f"output {shown_path(output)} holds a finished run; pass --force to replace it, or choose another --output"
        )


def check_output(file: Path) -> None:
    """Refuse to write an export or a comparison to where it cannot be written, or where it would replace a run's file.

    Raises:
        ConfigError: If so.
    """
    check_writable(file)
    place = file.resolve()
    if place.name.casefold() in _OWN and (place.parent / CONFIG).is_file():
        raise ConfigError(f"{str(file)!r} cannot be written: {place.parent} is a run, which needs its own {place.name}")


def check_resumable(output: Path, config: RunConfig) -> None:
    """Refuse to go on with a run that is none, is finished, or has another configuration.

    Raises:
        ConfigError: If so; for another configuration with the keys that differ.
        DataError: If the folder's own configuration cannot be read.
    """
    folder = RunFolder.read(output)
    if SUMMARY in folder.contents or (output / SUMMARY).exists():
        raise ConfigError(f"output {shown_path(output)} holds a finished run; there is nothing to resume")
    folder.require(CONFIG)
    noted = _flat(folder.contents[CONFIG].model_dump(mode="json"))
    given = _flat(config.model_dump(mode="json"))
    different = [key for key in {**noted, **given} if noted.get(key) != given.get(key)]
    if different:
        listed = "; ".join(f"{key}: {shown(noted.get(key))} there, {shown(given.get(key))} now" for key in different)
        raise ConfigError(f"run folder {shown_path(output)} was begun with another configuration: {listed}")


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings and lists by their dotted keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        return {path: value}
    return {k: v for key, item in items for k, v in _flat(item, f"{path}.{key}".lstrip(".")).items()}


def check_space(output: Path, needed: int) -> None:
    """Refuse a disk that is too full for a run, before it is trained.

    Args:
        output: The run's folder, which need not exist.
        needed: How many bytes the run will write, about.

    Raises:
        ConfigError: If there is not enough space.
    """
    place = next((p for p in (output.absolute(), *output.absolute().parents) if p.is_dir()), None)
    free = shutil.disk_usage(place).free if place is not None else needed
    if free < needed + _SPARE:
        megabytes = (needed + _SPARE) / 2**20
        raise ConfigError(
            f"output {shown_path(output)}: {free / 2**20:.0f} MiB are free, the run needs {megabytes:.0f} MiB"
        )


def make_dir(output: Path) -> None:
    """Create a run's folder, should it not exist.

    Raises:
        ConfigError: If it cannot be created.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output {shown_path(output)} cannot be written: {error}") from error


def create_run_dir(output: Path, config: RunConfig, keep: Sequence[str] = (), leftovers: Iterable[str] = ()) -> None:
    """Create a run's folder without an older run's results, and note the resolved configuration in it.

    Args:
        output: The folder.
        config: What is noted.
        keep: Files of an older run that stay, those of a run that is resumed.
        leftovers: More files that an older run may have left.

    Raises:
        ConfigError: If the folder cannot be written.
    """
    make_dir(output)
    try:
        for name in (SUMMARY, MASKS, SMALL, LOG, GATES, REPORT, *leftovers):  # without a summary no run is finished
            if name not in keep:
                (output / name).unlink(missing_ok=True)
        write_bytes(output / CONFIG, config.to_yaml().encode())
    except OSError as error:
        raise ConfigError(f"output {shown_path(output)} cannot be written: {error}") from error


_READERS: dict[str, Callable[[Path], Any]] = {
    CONFIG: RunConfig.load,
    SUMMARY: read_summary,
    MASKS: load_masks,
    SMALL: read_header,
    LOG: read_log,
    GATES: read_gates,
}
