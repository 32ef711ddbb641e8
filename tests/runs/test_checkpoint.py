"""Checkpoints that are damaged, of another training, or of an older version."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gumbel_plugin.errors import DataError
from gumbel_plugin.runs import folder as files
from gumbel_plugin.runs.checkpoint import read_checkpoint, write_checkpoint
from gumbel_plugin.runs.run import run
from gumbel_plugin.runs.run_config import RunConfig

pytestmark = pytest.mark.slow

OLD = Path(__file__).parents[1] / "data" / "written_by_0_1_0" / "checkpoint.pt"
RUN: dict[str, Any] = {  # what the old checkpoint is of
    "model": {"name": "legacy_network:build"},
    "data": {"name": "digits", "batch_size": 512},
    "training": {"max_epochs": 2, "accelerator": "cpu", "optimizer": {"name": "sgd", "lr": 0.05}},
    "pruning": {"config_list": [{"op_names": ["1"], "sparse_ratio": 0.5}]},
    "report": {"latency_batches": [], "html": False, "tensorboard": False},
}
NETWORK = """
from torch import nn
def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))
"""


@pytest.fixture(autouse=True)
def _network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "legacy_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(RunConfig.load(RUN), folder, log=stop)
    return folder


def stop(line: str) -> None:
    if line.startswith("epoch 2"):
        raise KeyboardInterrupt


def resume(folder: Path) -> Any:
    return run(RunConfig.load(RUN), folder, resume=True)


def test_every_flipped_bit_is_found(interrupted: Path) -> None:
    path = interrupted / "checkpoint.pt"
    whole = path.read_bytes()
    for place in [*range(120), *range(120, len(whole), 97), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"checkpoint\.pt cannot be read: .*without it the run starts anew"):
            read_checkpoint(path)
    with pytest.raises(DataError, match=r"checkpoint\.pt cannot be read"):
        resume(interrupted)


def test_one_of_0_1_0_is_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    files.create_run_dir(folder, RunConfig.load(RUN))
    shutil.copy(OLD, folder / "checkpoint.pt")
    lines: list[str] = []
    with pytest.warns(UserWarning, match=r"checkpoint\.pt was written by gumbel-plugin 0\.1\.0, without a digest"):
        run(RunConfig.load(RUN), folder, resume=True, log=lines.append)
    assert "going on after epoch 1" in lines
    assert (folder / "summary.json").exists()


def test_what_is_no_file_is_not_taken_for_none(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path / "nothing") is None
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(DataError, match="cannot be read: it is no regular file"):
            read_checkpoint(path)


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(key)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no epoch": (without("epoch"), "lacks a part"),
    "no weights": (without("model"), "lacks a part"),
    "an epoch that is none": (lambda s: s.update(epoch="1"), "lacks a part"),
    "the last epoch": (lambda s: s.update(epoch=2), "after 2 epochs, the training has 2"),
    "another version": (lambda s: s.update(format=4), "another version"),
    "the dense training": (lambda s: s.update(session=None), "other one of the dense training"),
    "another network": (lambda s: s["model"].update(x=torch.ones(1)), "'x' is a weight of only one of them"),
    "fewer weights": (lambda s: s["model"].popitem(), "is a weight of only one of them"),
    "other shapes": (lambda s: s["model"].update({"3.bias": torch.ones(3)}), "is not of this training"),
    "other masks": (lambda s: s["session"]["masks"].clear(), "mask '.*' is in only one of them"),
    "no steps": (lambda s: s["session"].pop("steps"), "is not of this training"),
    "fewer optimizers": (lambda s: s["optimizers"].clear(), "is not of this training"),
    "another optimizer": (lambda s: s["optimizers"][0].update(param_groups=[]), "is not of this training"),
    "fewer loaders": (lambda s: s["loaders"].clear(), "is not of this training"),
    "no randomness": (lambda s: s["random"].pop("torch"), "is not of this training"),
    "odd randomness": (lambda s: s["random"].update(torch=torch.ones(3)), "is not of this training"),
}


def test_another_trainings_state(interrupted: Path) -> None:
    path = interrupted / "checkpoint.pt"
    whole = path.read_bytes()
    for name, (change, problem) in CHANGES.items():
        path.write_bytes(whole)
        state = read_checkpoint(path)
        assert state is not None
        change(state)
        write_checkpoint(path, state)
        changed = path.read_bytes()
        with pytest.raises(DataError, match=problem):
            resume(interrupted)
        assert path.read_bytes() == changed, name
        assert not (interrupted / "summary.json").exists(), name
    path.write_bytes(whole)
    resume(interrupted)
    assert (interrupted / "summary.json").exists()
