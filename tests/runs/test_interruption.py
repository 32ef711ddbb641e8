"""Ctrl-C and SIGTERM end a run at any moment, say how it goes on, and lose nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from gumbel_plugin.runs.interruption import Interruption

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _sigint_interrupts() -> Iterator[None]:
    """Let Ctrl-C interrupt, also where the suite runs in the background: a shell starts such jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


RUN: dict[str, Any] = {
    "seed": 3,
    "model": {"name": "pausing_network:build"},
    "data": {"name": "digits", "batch_size": 128},
    "training": {"max_epochs": 4, "accelerator": "cpu", "optimizer": {"name": "sgd", "lr": 0.05}},
    "pruning": {"config_list": [{"op_names": ["1"], "sparse_ratio": 0.5}], "phases": {"fixed": 0.3}},
    "report": {"latency_batches": [], "tensorboard": False},
}
NETWORK = """
import sys, time
from torch import nn

point, steps = "", 0

def pause(*args, **kwargs):
    print("pausing", file=sys.stderr, flush=True)
    time.sleep(60)

class Finalized:
    def __del__(self):
        pause()

class Pausing(nn.Module):
    def forward(self, x):
        global steps
        steps += self.training
        if self.training and steps == 20:  # of 12 an epoch
            if point == "a batch":
                pause()
            if point == "a finalizer":
                Finalized()
        return x

def build():
    if point == "the preparation":
        pause()
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), Pausing(), nn.Linear(16, 10))
"""
# Children of one process that has imported everything, forked before torch starts a thread; each is sent the signal
# when it says that it pauses.
CHILDREN = """
import json, os, signal, sys
sys.path.append(".")
import torch
torch.set_num_threads(1)
import gumbel_plugin.graph.dependency_groups, jinja2, matplotlib.figure, sklearn.datasets
import gumbel_plugin.insight.report, gumbel_plugin.runs.progress, pausing_network
from gumbel_plugin.runs import cli, run

def child(arguments, point, number=None):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        pausing_network.point = point
        if hasattr(run, point):
            setattr(run, point, pausing_network.pause)
        try:
            cli.app(arguments)
        except SystemExit as stop:
            os._exit(stop.code)
        os._exit(99)
    os.close(write)
    lines = []
    with os.fdopen(read) as said:
        for line in said:
            if "far from the budget" not in line:  # after so few steps
                lines.append(line.rstrip())
            if line == "pausing\\n":
                os.kill(pid, number)
    print(json.dumps([folder, point, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), lines]))

folder = "whole"
child(["run", "run.yaml", "--quiet", "--output", "whole"], "nothing")
points = ("the preparation", "a batch", "a finalizer", "remove_dead_units", "verify_equivalence", "evaluate",
          "save_masks", "write_report")
for number, points in ((signal.SIGTERM, points), (signal.SIGINT, ("a finalizer", "remove_dead_units", "write_report"))):
    folder = f"interrupted-{number:d}"
    for point in points:
        begun = os.path.exists(f"{folder}/config.yaml")
        where = ["--resume", folder] if begun else ["run.yaml", "--output", folder]
        child(["run", *where, "--quiet"], point, number)
"""


def tensors(folder: Path) -> dict[str, list[Any]]:
    return {
        f"{file}/{name}": tensor.tolist()
        for file in ("small.safetensors", "masks.safetensors")
        for name, tensor in load_file(folder / file).items()
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals are tried on forked processes, which this system lacks")
def test_at_every_phase(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "pausing_network.py").write_text(NETWORK)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN], capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    whole, *ended = map(json.loads, done.stdout.splitlines())
    assert whole == ["whole", "nothing", 0, []]
    assert len(ended) == 11
    for folder, point, code, lines in ended:
        where = {
            "the preparation": "there is no result, and nothing was begun",
            "write_report": f"{folder} holds a finished run; gumbel-prune report {folder} writes its report anew",
        }.get(point, f"there is no result; gumbel-prune run --resume {folder} goes on")
        expected = (128 + int(folder.split("-")[1]), ["pausing", f"interrupted: {where}"])
        assert (code, lines) == expected, point
    for number in (signal.SIGINT, signal.SIGTERM):
        assert tensors(tmp_path / f"interrupted-{number:d}") == tensors(tmp_path / "whole")
        assert {path.name for path in (tmp_path / f"interrupted-{number:d}").iterdir()} == {
            path.name for path in (tmp_path / "whole").iterdir()
        } - {"report.html"}


class TestInterruption:
    def test_a_swallowed_exception_is_raised_again(self) -> None:
        def swallow(interruption: Interruption) -> None:
            with contextlib.suppress(BaseException):  # as some libraries do
                signal.raise_signal(signal.SIGINT)
            interruption.check()
            raise AssertionError("it goes on")

        with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
            swallow(interruption)

    def test_what_it_was_turned_into_does_not_matter(self) -> None:
        def turn() -> None:
            try:
                signal.raise_signal(signal.SIGTERM)
            except SystemExit as error:
                raise RuntimeError("a worker has ended") from error

        with pytest.raises(SystemExit) as caught, Interruption():
            turn()
        assert caught.value.code == 143

    def test_handlers_are_given_back(self) -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], sys.unraisablehook
        with Interruption():
            assert signal.getsignal(signal.SIGINT) != before[0][0]
        assert ([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], sys.unraisablehook) == before

    def test_what_is_ignored_stays_ignored(self) -> None:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with Interruption() as interruption:
                signal.raise_signal(signal.SIGINT)
            assert interruption.received is None
        finally:
            signal.signal(signal.SIGINT, before)

    def test_in_another_thread_it_does_nothing(self) -> None:
        errors: list[BaseException] = []

        def enter() -> None:
            try:
                with Interruption() as interruption:
                    interruption.check()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert errors == []
