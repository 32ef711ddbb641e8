"""Two processes on the CPU: what they learn together is the same in both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gumbel_plugin.masks.base import NoiseSource
from gumbel_plugin.shrinking.mask_file import load_masks

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
Result = dict[str, Any]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """Return what each of two processes has saved."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-W", "ignore", str(HERE / "ddp_worker.py")]
    processes = [
        subprocess.Popen([*command, str(rank), "2", str(folder)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint
    return [torch.load(folder / f"rank{rank}.pth") for rank in range(2)]


def flat(result: Result, *keys: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key in keys:
        for name, value in result[key].items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            found.update({f"{key}.{name}.{target}": tensor for target, tensor in inner})
    return found


@pytest.mark.parametrize("case", ["same", "own", "prior", "nni", "groups"])
def test_masks_weights_and_gates_are_the_same_on_both_ranks(case: str, ranks: list[Result]) -> None:
    first, second = (flat(rank[case], "masks", "weights", "learned") for rank in ranks)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    masks = [tensor for name, tensor in first.items() if name.startswith("masks") and name.endswith("weight")]
    assert [float(mask.mean()) for mask in masks] == [0.5, 0.5]
    assert len(first["learned.logit."].unique()) > 20, "gates have learned, each for itself"


def test_ranks_draw_the_same_samples_unless_asked_for_their_own(ranks: list[Result]) -> None:
    first, second = (rank["same"]["samples"] for rank in ranks)
    assert torch.equal(first, second)
    first, second = (rank["own"]["samples"] for rank in ranks)
    assert not torch.equal(first, second)
    assert torch.equal(first[:2], second[:2]), "open, before they are learned"
    assert torch.equal(first[-2:], second[-2:]), "decided"


def test_initial_scores_do_not_depend_on_the_rank() -> None:
    scores = [NoiseSource(7, per_rank=flag).uniform_like(torch.empty(5), 1) for flag in (False, True)]
    assert torch.equal(*scores)


def test_the_command_line(tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "configs" / "digits.yaml"
    settings = [
        "training.max_epochs=2", "training.strategy=ddp", "training.devices=2", "training.accelerator=cpu",
        "training.dense_baseline=false", "report.html=false", "report.tensorboard=false", "report.latency_batches=[]",
    ]  # fmt: skip
    command = [
        str(Path(sys.executable).with_name("gumbel-prune")),
        "run",
        str(config),
        "--output",
        str(tmp_path / "run"),
    ]
    options = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=200, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equivalent:") == 1, "one process reports"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["equivalence"]["passed"]
    masks = load_masks(tmp_path / "run" / "masks.safetensors")
    assert {float(targets["weight"].mean()) for targets in masks.values()} == {0.5}
