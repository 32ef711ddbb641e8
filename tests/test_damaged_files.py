"""Hundreds of damaged files of every kind: what is damaged is refused in a short message, or it is read as it was."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gumbel_plugin import load_pruned
from gumbel_plugin.errors import DataError, GumbelPluginError
from gumbel_plugin.insight.report_data import agreement_rows, comparison_rows, latency_warnings, result_rows
from gumbel_plugin.runs.checkpoint import read_checkpoint
from gumbel_plugin.runs.export import read_small
from gumbel_plugin.runs.folder import GATES, LOG, MASKS, SMALL, SUMMARY
from gumbel_plugin.runs.reporting import read_result
from gumbel_plugin.runs.result_files import read_gates, read_log
from gumbel_plugin.runs.run import run
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.shrinking.mask_file import load_masks

pytestmark = pytest.mark.slow

RUN: dict[str, Any] = {
    "model": {"name": "damaged_network:build"},
    "data": {"name": "digits", "batch_size": 512},
    "training": {"max_epochs": 2, "accelerator": "cpu", "optimizer": {"name": "sgd", "lr": 0.05}},
    "pruning": {"config_list": [{"op_names": ["1"], "sparse_ratio": 0.5}]},
    "report": {"latency_batches": [1], "latency_seconds": 0.01, "html": False, "tensorboard": False},
}
NETWORK = """
from torch import nn
def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))
"""
CHECKPOINT = "checkpoint.pt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the folder of a finished run, with the checkpoint that it had before its last epoch."""
    place = tmp_path_factory.mktemp("damaged")
    (place / "damaged_network.py").write_text(NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(place))

        def keep(line: str) -> None:
            if line.startswith("epoch 2"):
                shutil.copy(place / "run" / CHECKPOINT, place)

        run(RunConfig.load(RUN), place / "run", log=keep)
        shutil.copy(place / CHECKPOINT, place / "run")
        yield place / "run"


def dense() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))


def show(folder: Path) -> Any:
    """Return everything of a report but its pictures, which are drawn of nothing else."""
    data = read_result(folder)
    rows = comparison_rows([data]), result_rows(data.columns), latency_warnings(data)
    return data, rows, agreement_rows(data.agreement) if data.agreement else None


READERS: dict[str, Callable[[Path], Any]] = {
    MASKS: lambda folder: load_masks(folder / MASKS),
    SMALL: lambda folder: load_pruned(folder / SMALL, dense).state_dict(),
    CHECKPOINT: lambda folder: read_checkpoint(folder / CHECKPOINT),
    SUMMARY: show,
    GATES: lambda folder: read_gates(folder / GATES),
    LOG: lambda folder: read_log(folder / LOG),
}


def same(first: Any, second: Any) -> bool:
    """Return whether two values are equal to the last bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second) or (first != first and second != second)


@dataclass
class Damage:
    """What is done to a file: a few bits flipped, and a part repeated, lost, turned or made of zeros."""

    flips: list[tuple[float, int]]
    cut: tuple[str, float, float]

    def of(self, whole: bytes) -> bytes:
        content = bytearray(whole)
        for place, bit in self.flips:
            content[int(place * (len(content) - 1))] ^= 1 << bit
        how, *ends = self.cut
        begin, end = sorted(int(end * len(content)) for end in ends)
        part = content[begin:end]
        middle = {"none": part, "lost": b"", "twice": part + part, "zero": bytes(len(part)), "turned": part[::-1]}
        return bytes(content[:begin] + (b"" if how == "truncated" else middle[how] + content[end:]))


FRACTION = st.floats(0, 1)
DAMAGE = st.builds(
    Damage,
    st.lists(st.tuples(FRACTION, st.integers(0, 7)), max_size=3),
    st.tuples(st.sampled_from(["none", "lost", "twice", "zero", "turned", "truncated"]), FRACTION, FRACTION),
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 10**30, 1e308, -0.5, float("nan"), float("inf"), "", "x" * 9000, "\0", "-1"]),
    st.sampled_from([[], {}, [[]], [None], {"": {}}, {"1": None}, [1, 2, 3]]),
)
FAST = settings(
    derandomize=True,
    deadline=None,
    max_examples=120,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class Reader:
    """Reads a folder with other contents of one file.

    Attributes:
        whole: The file's content.
        refused: How many other contents were refused.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._read = folder, READERS[name]
        self._file = folder / name
        self.whole = self._file.read_bytes()
        self._expected = self._read(folder)
        self.refused = 0

    def reads(self, content: bytes, *, exact: bool) -> bool:
        """Return whether the content was read, to the last bit the same where `exact`; or refuse it in short words."""
        try:
            self._file.write_bytes(content)
            found = self._read(self._folder)
        except GumbelPluginError as error:
            problem = str(error)
        else:
            problem = ""
        finally:
            self._file.write_bytes(self.whole)
        if problem:
            self.refused += 1
            assert content != self.whole
            assert len(problem) <= 2000
            return False
        assert not exact or same(found, self._expected)
        return True


@pytest.mark.parametrize("name", [MASKS, SMALL, CHECKPOINT, SUMMARY])
def test_damaged_bytes(name: str, finished: Path) -> None:
    reader = Reader(finished, name)

    @FAST
    @given(DAMAGE)
    def damage(damage: Damage) -> None:
        reader.reads(damage.of(reader.whole), exact=True)

    damage()
    assert reader.refused > 60


@pytest.mark.parametrize("name", [GATES, LOG])
def test_damaged_lines(name: str, finished: Path) -> None:
    """Lines are appended as a run goes on, without a digest: what is read of them has at least the right form."""

    reader = Reader(finished, name)

    @FAST
    @given(DAMAGE)
    def damage(damage: Damage) -> None:
        reader.reads(damage.of(reader.whole), exact=False)

    damage()
    assert reader.refused > 30


def changed(value: Any, way: list[float], new: Any, drop: bool) -> Any:
    """Return JSON with one value, at the end of some way into it, replaced or left out."""
    value = copy.deepcopy(value)
    owner, place = None, None
    at = value
    for step in way:
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else []
        if not keys:
            break
        owner, place = at, keys[int(step * (len(keys) - 1))]
        at = at[place]
    if owner is not None and drop:
        del owner[place]
    elif owner is not None:
        owner[place] = new
    return value


CHANGE = st.tuples(st.lists(FRACTION, min_size=1, max_size=5), VALUES, st.booleans())


@pytest.mark.parametrize("name", [SUMMARY, GATES])
def test_changed_json(name: str, finished: Path) -> None:
    """A summary has a digest; without it, as 0.1.0 wrote them, what is read has the right form."""
    reader = Reader(finished, name)
    lines = reader.whole.decode().splitlines() if name == GATES else [reader.whole.decode()]

    @FAST
    @given(CHANGE, st.booleans())
    def change(change: tuple[list[float], Any, bool], digest: bool) -> None:
        first = json.loads(lines[0])
        other = changed(first, *change)
        if not digest:
            other.pop("digest", None)
        text = "\n".join([json.dumps(other), *lines[1:]]) + "\n"
        read = reader.reads(text.encode(), exact=False)
        assert not (read and digest and name == SUMMARY) or "digest" not in other or same(other, first)

    change()
    assert reader.refused > 50


def test_space_in_json_is_nothing(finished: Path) -> None:
    reader = Reader(finished, SUMMARY)
    summary = json.loads(reader.whole)
    assert reader.reads(json.dumps(summary, indent=7).encode(), exact=True)
    assert reader.reads(json.dumps(summary, separators=(",", ":")).encode(), exact=True)


def test_every_verb_refuses_a_flipped_bit(finished: Path) -> None:
    for name, verb in {
        SMALL: read_small,
        SUMMARY: read_result,
        MASKS: lambda folder: load_masks(folder / MASKS),
    }.items():
        file = finished / name
        whole = file.read_bytes()
        for place in range(9, len(whole), len(whole) // 20):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            if name == SUMMARY and json.loads(whole) == _json(damaged):
                continue
            with pytest.raises(DataError, match=name):
                verb(finished)
        file.write_bytes(whole)
        verb(finished)


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None
