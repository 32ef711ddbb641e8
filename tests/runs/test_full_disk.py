"""A disk that is full in the middle of a run: an error that names the file, and a run that can be resumed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gumbel_plugin.errors import OutputError
from gumbel_plugin.runs import trackers
from gumbel_plugin.runs.run import run
from gumbel_plugin.runs.run_config import RunConfig

pytestmark = pytest.mark.slow

resource = pytest.importorskip("resource")

CONFIG = RunConfig.load(
    {
        "model": {"name": "lenet300", "options": {"in_features": 64}},
        "data": {"name": "digits", "batch_size": 256},
        "training": {"max_epochs": 4, "accelerator": "cpu"},
        "pruning": {"config_list": [{"op_names": ["fc1", "fc2"], "sparse_ratio": 0.5}]},
        "report": {"latency_batches": [], "html": False, "tensorboard": False},
    }
)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write more into any file, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("moment", "file"), [("epoch 2", "checkpoint.pt"), ("shrinking", "masks.safetensors")])
def test_the_run_can_be_resumed(moment: str, file: str, tmp_path: Path) -> None:
    run(CONFIG, tmp_path / "whole")
    with contextlib.ExitStack() as stack:

        def fill(line: str) -> None:
            if line.startswith(moment):
                stack.enter_context(largest_file(20_000))

        with pytest.raises(OutputError, match=rf"{file}' cannot be written: .*gumbel-prune run --resume .* goes on"):
            run(CONFIG, tmp_path / "out", log=fill)
    assert (tmp_path / "out" / "checkpoint.pt").exists()
    assert not list((tmp_path / "out").glob("*.partial"))
    run(CONFIG, tmp_path / "out", resume=True)
    whole, resumed = (load_file(tmp_path / name / "small.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class TestTrackers:
    def test_a_training_goes_on_without_its_event_files(self, tmp_path: Path, caplog: Any) -> None:
        pytest.importorskip("tensorboard")
        (tmp_path / "tensorboard").write_text("a file where the folder would be")
        report = CONFIG.report.model_copy(update={"tensorboard": True})
        result = run(CONFIG.model_copy(update={"report": report}), tmp_path)
        assert result.equivalence.passed
        assert caplog.text.count("the training goes on without it") == 1

    def test_a_full_disk_ends_them_with_one_warning(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        track = trackers.tensorboard(tmp_path)
        assert track is not None
        with caplog.at_level(logging.WARNING), largest_file(400):
            for epoch in range(1, 40):
                track({"loss": 0.5}, epoch)
        (warning,) = caplog.messages
        assert f"TensorBoard ({tmp_path}) gets no epochs from " in warning
        assert "File too large" in warning
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        assert [event.step for event in events.Scalars("loss")][:3] == [1, 2, 3]
