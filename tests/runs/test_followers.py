"""What follows a training: TensorBoard, MLflow, the live line at a terminal."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from gumbel_plugin.errors import MissingExtraError
from gumbel_plugin.runs import progress as progress_module
from gumbel_plugin.runs.progress import ProgressBar, following
from gumbel_plugin.runs.result_files import read_log
from gumbel_plugin.runs.run import run
from gumbel_plugin.runs.run_config import RunConfig

CONFIG: dict[str, Any] = {
    "model": {"name": "digits_cnn"},
    "data": {"name": "digits", "batch_size": 512, "validation_fraction": 0.1},
    "training": {"max_epochs": 3, "accelerator": "cpu"},
    "pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], "phases": {"fixed": 0.3}},
    "report": {"html": False, "latency_batches": []},
}


@pytest.mark.slow
def test_tensorboard_has_the_rows_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(RunConfig.load(CONFIG), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = read_log(tmp_path / "log.csv")
    for name in ("loss", "sparsity", "validation_score", "macs"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([row[name] for row in rows], rel=1e-6)
    assert rows[-1]["macs"] == 451_904  # half of every convolution's channels, as the small network has


@pytest.mark.filterwarnings("ignore")  # of what MLflow stands on
def test_mlflow(tmp_path: Path) -> None:
    config = RunConfig.load({**CONFIG, "report": {**CONFIG["report"], "mlflow": f"sqlite:///{tmp_path}/flow.db"}})
    if importlib.util.find_spec("mlflow") is None:
        with pytest.raises(MissingExtraError, match=r"gumbel-plugin\[mlflow\]"):
            run(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        pytest.skip("MLflow is not installed; its absence was tested")
    run(config, tmp_path / "run")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/flow.db")
    experiment = client.get_experiment_by_name("gumbel-plugin")
    runs = client.search_runs([experiment.experiment_id])
    assert [len(client.get_metric_history(found.info.run_id, "loss")) for found in runs] == [3]


class TestProgress:
    @pytest.mark.slow
    def test_a_live_line_at_a_terminal(self) -> None:
        console = Console(file=io.StringIO(), force_terminal=True, width=160)
        whole = progress_module._progress()
        with Progress(*whole.columns, console=console, transient=True, auto_refresh=False) as progress:
            short = {**CONFIG, "training": {"max_epochs": 4, "accelerator": "cpu"}}
            short["pruning"] = {**CONFIG["pruning"], "phases": {"fixed": 0.5}}
            run(RunConfig.load(short), followers=[ProgressBar(progress)])
        drawn = console.file.getvalue()  # type: ignore[attr-defined]
        for text in ("gates", "epoch 4/4", "loss ", "validation ", "sparsity 0.500", "MACs 451,904"):
            assert text in drawn

    def test_none_in_a_log_file_and_nothing_when_quiet(self, capsys: pytest.CaptureFixture[str]) -> None:
        with following(quiet=False) as (log, followers):
            log("hello")
        assert followers == []
        assert capsys.readouterr().err == "hello\n"
        with following(quiet=True) as (log, followers):
            log("hello")
        assert followers == []
        assert capsys.readouterr() == ("", "")
