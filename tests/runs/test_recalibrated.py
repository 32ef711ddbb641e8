"""Runs recalibrate batch norms once the masks are decided, and learn from the dense network that they have trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gumbel_plugin.runs import run as run_module
from gumbel_plugin.runs.models import build_model
from gumbel_plugin.runs.reporting import read_result
from gumbel_plugin.runs.run import RunResult, prepare, run
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.runs.train import evaluate, loaders
from gumbel_plugin.training.recalibration import batch_norms, recalibrate

pytestmark = pytest.mark.slow


def config(**changes: Any) -> RunConfig:
    sections: dict[str, Any] = {
        "model": {"name": "digits_cnn"},
        "data": {"name": "digits", "batch_size": 128, "samples": 512},
        "training": {"max_epochs": 2, "accelerator": "cpu", "recalibrate": 3, **changes.pop("training", {})},
        "pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]},
        "report": {"latency_batches": [], "tensorboard": False, "html": False},
        **changes,
    }
    return RunConfig.load(sections)


def scores_of(result: RunResult) -> list[float | None]:
    return [result.columns[name].score for name in ("masked", "small")]


def test_statistics_are_estimated_anew(tmp_path: Path) -> None:
    lines: list[str] = []
    result = run(config(), tmp_path / "run", log=lines.append)
    found = result.recalibration
    assert found is not None
    assert (found.norms, found.batches) == (3, 3)
    assert scores_of(result) == [found.after, found.after]
    assert any("3 batch norms from 3 batches" in line for line in lines)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["recalibration"] == {"norms": 3, "batches": 3, "before": found.before, "after": found.after}
    assert read_result(tmp_path / "run").recalibration == summary["recalibration"]
    off = run(config(training={"recalibrate": 0}))
    assert off.recalibration is None
    assert scores_of(off) == [found.before, found.before]
    train, _, test = loaders(config())
    assert recalibrate(off.small, train, 3) == 3  # what the run did before the cut is what comes of it after the cut
    assert evaluate(off.small, test) == pytest.approx(found.after)
    for ours, theirs in zip(batch_norms(off.small), batch_norms(result.small), strict=True):
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-4, atol=1e-4)


def test_the_page_tells_it(tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    report = {"latency_batches": [], "tensorboard": False}
    assert "statistics of 3 batch norms were estimated anew" in (
        Path(str(run(config(report=report), tmp_path / "run").report)).read_text()
    )


def test_networks_without_batch_norms_are_left_alone() -> None:
    model = {"name": "lenet300", "options": {"in_features": 64}}
    pruning = {"config_list": [{"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": "element"}]}
    assert run(config(model=model, pruning=pruning)).recalibration is None


@pytest.mark.parametrize("baseline", [False, True])
def test_the_dense_teacher(baseline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    prepared = prepare

    def keeping(*arguments: Any) -> Any:
        kept.append(prepared(*arguments))
        return kept[-1]

    monkeypatch.setattr(run_module, "prepare", keeping)
    settings = config(training={"dense_baseline": baseline}, distillation={"logits": 0.5})
    result = run(settings)
    torch.manual_seed(settings.seed)
    initial = build_model("digits_cnn")
    teacher = kept[0].session.distillation.teacher
    assert torch.equal(teacher.conv1.weight, initial.conv1.weight) != baseline
    if baseline:
        assert evaluate(teacher, loaders(settings)[2]) == result.columns["dense"].score
    without = run(config(training={"dense_baseline": baseline}))
    assert result.columns["dense"].score == without.columns["dense"].score
    assert any(
        a.shape != b.shape or not torch.equal(a, b)
        for a, b in zip(result.small.parameters(), without.small.parameters(), strict=True)
    )
