"""Two processes never write into one run's folder, and a crash leaves no lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.runs.cli import app
from gumbel_plugin.runs.lock import LOCK, locked
from gumbel_plugin.runs.run import run
from gumbel_plugin.runs.run_config import RunConfig

pytestmark = pytest.mark.slow

RUN: dict[str, Any] = {
    "model": {"name": "lockable_network:build"},
    "data": {"name": "digits", "batch_size": 256},
    "training": {"max_epochs": 2, "accelerator": "cpu"},
    "pruning": {"config_list": [{"op_names": ["1"], "sparse_ratio": 0.5}]},
    "report": {"latency_batches": [], "html": False, "tensorboard": False},
}
NETWORK = """
import os, time
from torch import nn

class Waiting(nn.Module):
    def forward(self, x):
        if self.training and "WAIT_IN_TRAINING" in os.environ:
            print("waiting", flush=True)
            time.sleep(120)
        return x

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), Waiting(), nn.Linear(8, 10))
"""
COMMAND = "from gumbel_plugin.runs.cli import app; app()"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lockable_network.py").write_text(NETWORK)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def training(here: None) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a run in the folder ``out``."""
    arguments = [sys.executable, "-c", COMMAND, "run", "run.yaml", "--output", "out", "--quiet"]
    environment = {**os.environ, "WAIT_IN_TRAINING": "1"}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        yield process
        process.kill()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_run_is_refused_until_the_first_is_killed(training: subprocess.Popen[str], tmp_path: Path) -> None:
    config, folder = RunConfig.load(RUN), tmp_path / "out"
    before = contents(folder)
    for options in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(ConfigError, match=rf"output '.*out' is in use by process {training.pid} on "):
            run(config, folder, **options)
    for command in (["run", "run.yaml", "--output", "out"], ["report", "out"], ["export", "out", "--format", "pt2"]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 1
        assert f"in use by process {training.pid}" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert contents(folder) == before
    training.send_signal(signal.SIGKILL)
    training.wait()
    assert (folder / LOCK).exists()  # the file stays, the lock does not
    assert run(config, folder, resume=True).equivalence.passed
    assert not (folder / LOCK).exists()


@pytest.mark.usefixtures("here")
def test_a_run_that_ends_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is looked at again once it is held: the first look was before the data were loaded."""
    from gumbel_plugin.runs import run as module

    config, folder, prepare = RunConfig.load(RUN), tmp_path / "out", module.prepare

    def slowly(config: RunConfig, distillation: Any) -> module.Prepared:
        prepared = prepare(config, distillation)
        folder.mkdir()
        (folder / "summary.json").write_text("{}")
        return prepared

    monkeypatch.setattr(module, "prepare", slowly)
    with pytest.raises(ConfigError, match="holds a finished run"):
        run(config, folder)
    assert contents(folder) == {"summary.json": b"{}"}


class TestLocked:
    def test_is_released_and_leaves_nothing(self, tmp_path: Path) -> None:
        for _ in range(2):
            with locked(tmp_path):
                assert f"process {os.getpid()} on " in (tmp_path / LOCK).read_text()
                with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} "), locked(tmp_path):
                    pass
            assert list(tmp_path.iterdir()) == []

    def test_after_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), locked(tmp_path):
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []

    def test_its_file_may_be_gone(self, tmp_path: Path) -> None:
        with locked(tmp_path):
            (tmp_path / LOCK).unlink()
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_in_its_place(self, tmp_path: Path) -> None:
        (tmp_path / LOCK).mkdir()
        with pytest.raises(ConfigError, match="cannot be written"), locked(tmp_path):
            pass

    def test_a_file_system_without_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fcntl = pytest.importorskip("fcntl")

        def refuse(*args: Any) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", refuse)
        with pytest.warns(UserWarning, match="cannot be locked.*start no second run"), locked(tmp_path):
            pass
