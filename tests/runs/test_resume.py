"""A run that is killed at any moment goes on to the same result, to the last bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from gumbel_plugin.errors import ConfigError, DataError
from gumbel_plugin.runs import folder as files
from gumbel_plugin.runs.checkpoint import read_checkpoint
from gumbel_plugin.runs.cli import app
from gumbel_plugin.runs.run import run
from gumbel_plugin.runs.run_config import RunConfig

import lightning.pytorch as pl  # isort: skip  (after gumbel_plugin, which makes torchvision importable)

pytestmark = pytest.mark.slow

RUN: dict[str, Any] = {
    "seed": 3,
    "model": {"name": "resumed_network:build"},
    "data": {"name": "digits", "batch_size": 128, "validation_fraction": 0.1},
    "training": {
        "max_epochs": 6,
        "accelerator": "cpu",
        "lr_schedule": "cosine",
        "lr_decay": 0.9,
        "patience": 6,
        "dense_baseline": True,
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    },
    "pruning": {
        "rescale": "learned",
        "config_list": [{"op_names": ["1"], "sparse_ratio": 0.5}],
        "phases": {"dense": 0.2, "fixed": 0.3},
    },
    "distillation": {"logits": 0.3, "hidden": 0.1, "layers": ["1"]},
    "report": {"latency_batches": [], "html": False, "tensorboard": False},
}
NETWORK = """
from torch import nn
def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3),
                         nn.Linear(16, 10))
"""
# The children of one process that has imported everything: ten kills in the time of ten short trainings. They are
# forked before torch starts a thread.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.runs.run import run
import gumbel_plugin.graph.dependency_groups, sklearn.datasets

def child(folder):
    pid = os.fork()
    if pid == 0:
        config = RunConfig.load(sys.argv[1])
        run(config, folder, resume=(folder / "config.yaml").exists(), log=lambda line: None)
        os._exit(0)
    return pid

whole, killed = Path("whole"), Path("killed")
began = time.monotonic()
assert os.waitpid(child(whole), 0)[1] == 0
seconds = time.monotonic() - began
chance, kills = random.Random(0), []
while len(kills) < 10:
    pid = child(killed)
    time.sleep(chance.uniform(0.2, 0.9) * seconds)
    os.kill(pid, signal.SIGKILL)
    if os.waitpid(pid, 0)[1] == signal.SIGKILL:
        kills.append(sorted(path.name for path in killed.glob("*")) if killed.exists() else [])
    (killed / "summary.json").unlink(missing_ok=True)  # it was faster than the first one, and had finished
assert os.waitpid(child(killed), 0)[1] == 0
print(len(kills), sum("checkpoint.pt" in names for names in kills))
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resumed_network.py").write_text(NETWORK)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.chdir(tmp_path)


def results(folder: Path) -> dict[str, Any]:
    """Return everything of a result that does not measure time."""
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "log.csv").open() as file:
        log = [line.rsplit(",", 1)[0] for line in file]
    return {
        "small": {name: tensor.tolist() for name, tensor in load_file(folder / "small.safetensors").items()},
        "masks": {name: tensor.tolist() for name, tensor in load_file(folder / "masks.safetensors").items()},
        "scores": {name: column["score"] for name, column in summary["columns"].items()},
        "log": log,
        "recalibration": summary["recalibration"],
        "gates": (folder / "gates.jsonl").read_text(),
        "files": {path.name for path in folder.iterdir()},
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are tried on forked processes, which this system lacks")
def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append('.')\n{KILLER}", "run.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    kills, resumed = map(int, done.stdout.split())
    assert kills == 10
    assert resumed > 0  # or nothing was tried but starting anew
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


class Killed(BaseException):
    """Ends a run as abruptly as a test can."""


class TestEveryWrite:
    """Stop at every single file operation in turn: before, and after it."""

    CONFIG = RunConfig.load(
        {
            **RUN,
            # Masks are fixed after two epochs, and the best state is not the last one.
            "training": {
                **RUN["training"],
                "max_epochs": 5,
                "dense_baseline": False,
                "optimizer": {"name": "sgd", "lr": 2.0, "momentum": 0.9},
                "lr_schedule": "constant",
            },
            "pruning": {**RUN["pruning"], "phases": {"fixed": 0.6}},
        }
    )

    @pytest.mark.parametrize("before", [True, False])
    def test_each_rename(self, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run(self.CONFIG, tmp_path / "whole")
        replace = os.replace
        count, stop = 0, 0

        def stopping(source: Any, target: Any) -> None:
            nonlocal count
            count += 1
            if before and count == stop:
                raise Killed
            replace(source, target)
            if not before and count == stop:
                raise Killed

        monkeypatch.setattr(os, "replace", stopping)
        finished = False
        while not finished:
            stop, count = stop + 1, 0
            folder = tmp_path / f"stopped at {stop}"
            try:
                run(self.CONFIG, folder)
                finished = True
            except Killed:
                if not (folder / "summary.json").exists():
                    count = -1000
                    run(self.CONFIG, folder, resume=(folder / "config.yaml").exists())
            left = results(folder)
            assert {**left, "files": left["files"] - {"checkpoint.pt"}} == results(tmp_path / "whole")
            for path in folder.glob("*.partial"):
                raise AssertionError(f"{path.name} is left")
        assert stop >= 6  # config, two checkpoints, masks, small, summary


class Stopping(pl.Callback):  # type: ignore[misc]
    """A follower with a state of its own, such as a progress bar at a terminal."""

    def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
        if trainer.current_epoch == 3:
            raise Killed

    def state_dict(self) -> dict[str, Any]:
        return {"something": 1}


def test_other_followers_than_before(tmp_path: Path) -> None:
    """A run that was begun at a terminal goes on without one."""
    config = RunConfig.load({**RUN, "training": {**RUN["training"], "dense_baseline": False}})
    run(config, tmp_path / "whole")
    with pytest.raises(Killed):
        run(config, tmp_path / "killed", followers=[Stopping()])
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    run(config, tmp_path / "killed", resume=True)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


class TestRefusals:
    def interrupted(self, folder: Path) -> RunConfig:
        config = RunConfig.load(RUN)
        files.create_run_dir(folder, config)
        return config

    def test_another_configuration_is_told_by_its_keys(self, tmp_path: Path) -> None:
        config = self.interrupted(tmp_path / "run")
        other = config.model_copy(update={"seed": 4, "training": config.training.model_copy(update={"max_epochs": 7})})
        with pytest.raises(ConfigError) as caught:
            run(other, tmp_path / "run", resume=True)
        message = str(caught.value)
        assert "training.max_epochs: 6 there, 7 now" in message
        assert "seed: 3 there, 4 now" in message
        assert message.count(" there, ") == 2

    def test_a_finished_run(self, tmp_path: Path) -> None:
        config = self.interrupted(tmp_path / "run")
        (tmp_path / "run" / "summary.json").write_text("{}")
        with pytest.raises(ConfigError, match="holds a finished run; there is nothing to resume"):
            run(config, tmp_path / "run", resume=True)

    def test_no_run(self, tmp_path: Path) -> None:
        config = RunConfig.load(RUN)
        with pytest.raises(DataError, match="does not exist"):
            run(config, tmp_path / "run", resume=True)
        (tmp_path / "run").mkdir()
        with pytest.raises(DataError, match=r"config.yaml is missing; what can be read: nothing"):
            run(config, tmp_path / "run", resume=True)

    def test_a_damaged_checkpoint(self, tmp_path: Path) -> None:
        config = self.interrupted(tmp_path / "run")
        (tmp_path / "run" / "checkpoint.pt").write_bytes(b"no checkpoint")
        with pytest.raises(DataError, match=r"checkpoint\.pt cannot be read: .*without it the run starts anew"):
            run(config.model_copy(), tmp_path / "run", resume=True)

    def test_a_checkpoint_of_another_version(self, tmp_path: Path) -> None:
        torch.save({"format": 0}, tmp_path / "checkpoint.pt")
        with pytest.raises(DataError, match="another version"):
            read_checkpoint(tmp_path / "checkpoint.pt")

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import shutil

        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
        with pytest.raises(ConfigError, match="1 MiB are free, the run needs"):
            run(RunConfig.load(RUN), tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestCommand:
    def call(self, *arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == code, result.output
        return result.output

    def test_goes_on_without_a_configuration_file(self, tmp_path: Path) -> None:
        short = {**RUN, "training": {"max_epochs": 2, "accelerator": "cpu"}, "data": {"name": "digits"}}
        (tmp_path / "good.yaml").write_text(yaml.safe_dump(short))

        def stop(line: str) -> None:
            if line.startswith("epoch 2"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(RunConfig.load(short), tmp_path / "run", log=stop)
        assert "seed: 3 there, 5 now" in self.call("run", "--resume", "run", "--set", "seed=5", code=1)
        assert "going on after epoch 1" in self.call("run", "good.yaml", "--resume", "run")
        assert "nothing to resume" in self.call("run", "--resume", "run", code=1)

    def test_wrong_usage(self) -> None:
        self.call("run", "--resume", "run", "--force", code=2)
        self.call("run", "--resume", "run", "--output", "there", code=2)
