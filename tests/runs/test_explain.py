from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner, Result

from gumbel_plugin.errors import DataError
from gumbel_plugin.insight.interpret import disjoint_parts, feature_importance, pathways, symmetries
from gumbel_plugin.runs import run as run_module
from gumbel_plugin.runs.cli import app
from gumbel_plugin.runs.explain import explain
from gumbel_plugin.runs.run import RunResult, run
from gumbel_plugin.runs.run_config import RunConfig

pytestmark = pytest.mark.slow

RUNS: dict[str, dict[str, Any]] = {
    "toy": {
        "model": {"name": "toy_mlp"},
        "data": {"name": "toy_regression", "batch_size": 1000},
        "training": {"max_epochs": 40, "loss": "mse", "optimizer": {"lr": 0.01}, "accelerator": "cpu"},
        "pruning": {"config_list": [{"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 0.8}]},
    },
    "digits": {
        "model": {"name": "lenet300", "options": {"in_features": 64}},
        "data": {"name": "digits", "batch_size": 256},
        "training": {"max_epochs": 2, "accelerator": "cpu"},
        "pruning": {
            "config_list": [
                {"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 0.98, "global_group_id": "network"}
            ]
        },
    },
    "convolutions": {
        "model": {"name": "digits_cnn"},
        "data": {"name": "digits", "batch_size": 256},
        "training": {"max_epochs": 1, "accelerator": "cpu"},
        "pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.9}]},
    },
}
FILES = {
    "importance.png", "importance.svg", "pathways.png", "pathways.svg", "explanation.json", "explanation.md"
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Time for a few milliseconds only; nothing here depends on a latency."""
    whole = run_module.profile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "profile", lambda *args, **kwargs: whole(*args, **{**kwargs, "min_run_time": 0.01}))
        yield


@dataclass
class Explained:
    """A finished run, its folder, and what the command said of it."""

    name: str
    folder: Path
    run: RunResult
    command: Result


@pytest.fixture(scope="module", params=RUNS)
def explained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Explained:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    result = run(RunConfig.load(RUNS[request.param]), folder)
    return Explained(request.param, folder, result, CliRunner().invoke(app, ["explain", str(folder)]))


def test_writes_pictures_and_a_summary(explained: Explained) -> None:
    assert explained.command.exit_code == 0, explained.command.output
    assert "explanation.md" in explained.command.stdout
    folder = explained.folder / "explain"
    assert {path.name for path in folder.iterdir()} == FILES
    for name in ("importance", "pathways"):
        assert imread(folder / f"{name}.png").std() > 0.01
        root = ElementTree.parse(folder / f"{name}.svg").getroot()
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 3
    text = (folder / "explanation.md").read_text()
    links = re.findall(r"\]\((.*?)\)", text)
    assert sorted(links) == ["importance.svg", "pathways.svg"]


def test_says_what_the_network_of_the_run_says(explained: Explained) -> None:
    """The network is read back from its file; what is written is what the run's own network gives."""
    shape, small = (4,) if explained.name == "toy" else (1, 8, 8), explained.run.small
    found = json.loads((explained.folder / "explain" / "explanation.json").read_text())
    importance = feature_importance(small, {}, shape)
    flat = [number for row in found["importance"]["per_output"] for number in _flat(row)]
    assert flat == pytest.approx(importance.per_output.flatten().tolist())
    parts = disjoint_parts(pathways(small, {}, shape))
    assert [(tuple(p["inputs"]), tuple(p["outputs"]), p["connections"]) for p in found["parts"]] == [
        (part.inputs, part.outputs, part.connections) for part in parts
    ]
    assert [tuple(s["inputs"]) for s in found["symmetries"]] == [s.inputs for s in symmetries(small, {}, shape)]
    text = (explained.folder / "explain" / "explanation.md").read_text()
    assert f"{sum(part.connections for part in parts):,} weights lie on a path" in text
    assert {"toy": "| y1", "digits": "| class 0", "convolutions": "channel 1"}[explained.name] in text


def _flat(values: Any) -> list[float]:
    return [number for value in values for number in _flat(value)] if isinstance(values, list) else [values]


def test_explains_anew(explained: Explained) -> None:
    if explained.name == "toy":
        folder = explained.folder / "explain"
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert explain(explained.folder) == folder
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def fails(folder: Path) -> str:
    result = CliRunner().invoke(app, ["explain", str(folder)])
    assert result.exit_code == 1
    assert not (folder / "explain").exists()
    (line,) = result.stderr.splitlines()
    return line


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert fails(tmp_path / "nowhere") == f"error: run folder '{tmp_path / 'nowhere'}' does not exist"
    assert "summary.json is missing; what can be read: nothing" in fails(tmp_path)


def test_a_run_that_is_not_finished(explained: Explained, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((explained.folder / "config.yaml").read_bytes())
    assert "the run is not finished" in fails(tmp_path)


def test_a_damaged_network(explained: Explained, tmp_path: Path) -> None:
    for file in explained.folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "small.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"small\.safetensors cannot be read"):
        explain(tmp_path)
