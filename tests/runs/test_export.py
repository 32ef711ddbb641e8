from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from gumbel_plugin import load_pruned
from gumbel_plugin.errors import ConfigError, DataError, EquivalenceError, GraphError
from gumbel_plugin.runs import export
from gumbel_plugin.runs.cli import app
from gumbel_plugin.runs.export import FORMATS, export_run
from gumbel_plugin.runs.folder import SUMMARY, RunFolder
from gumbel_plugin.runs.models import build_model
from gumbel_plugin.runs.reporting import read_result, warnings_of, write_comparison, write_report
from gumbel_plugin.runs.run import run
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.shrinking.pruned_file import read_header

pytestmark = pytest.mark.slow

CONFIG: dict[str, Any] = {
    "model": {"name": "digits_cnn"},
    "data": {"name": "digits", "batch_size": 256},
    "training": {"max_epochs": 1, "accelerator": "cpu"},
    "pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]},
    "report": {"html": False, "tensorboard": False, "latency_batches": [1], "latency_seconds": 0.01},
}
INPUTS = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("export") / "run"
    return folder, run(RunConfig.load(CONFIG), folder).small.eval()


class TestExport:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_is_the_small_network_at_any_batch_size(self, kind: str, finished: Any, tmp_path: Path) -> None:
        folder, small = finished
        if kind == "onnx":
            pytest.importorskip("onnxruntime")
        if kind == "onnx" and torch.__version__.startswith("2.6."):
            with pytest.raises(GraphError, match=r"torch 2\.6 fails on batch norms .* --format pt2"):
                export_run(folder, kind, tmp_path / f"mine.{kind}")
            return
        file, error = export_run(folder, kind, tmp_path / f"mine.{kind}")
        assert error < 1e-5
        assert [path.name for path in tmp_path.iterdir()] == [f"mine.{kind}"]
        expected = small(INPUTS).detach()
        if kind == "onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(str(file))
            assert session.get_inputs()[0].shape[0] == "batch"
            found = torch.from_numpy(session.run(None, {"input": INPUTS.numpy()})[0])
        elif kind == "pt2":
            found = torch.export.load(file).module()(INPUTS)
        else:
            found = load_pruned(file, lambda: build_model("digits_cnn")).eval()(INPUTS)
            assert read_header(file)["kept"] == read_header(folder / "small.safetensors")["kept"]
        assert torch.allclose(found, expected, atol=1e-5)

    def test_what_differs_is_not_written(self, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(model: nn.Module, example: torch.Tensor) -> Any:
            return b"something", lambda inputs: model(inputs) + 1

        monkeypatch.setitem(export.FORMATS, "pt2", wrong)
        with pytest.raises(EquivalenceError, match="was not written"):
            export_run(finished[0], "pt2", tmp_path / "mine.pt2")
        assert list(tmp_path.iterdir()) == []

    def test_errors(self, finished: Any, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="did you mean 'onnx'"):
            export_run(finished[0], "onx")
        with pytest.raises(ConfigError, match="cannot be written"):
            export_run(finished[0], "safetensors", tmp_path / "nowhere" / "small.safetensors")
        for kind in FORMATS:
            with pytest.raises(ConfigError, match="its folder does not exist"):
                export_run(finished[0], kind, tmp_path / "nowhere" / f"small.{kind}")
            with pytest.raises(ConfigError, match="it is a folder"):
                export_run(finished[0], kind, Path(""))
        with pytest.raises(DataError, match="does not exist"):
            export_run(tmp_path / "nowhere", "pt2")

    def test_command(self, finished: Any) -> None:
        result = CliRunner().invoke(app, ["export", str(finished[0]), "--format", "safetensors"])
        assert result.exit_code == 0
        assert result.stdout.startswith(
            f"{finished[0] / 'small.safetensors'}: equal to the small network up to 0.0e+00"
        )


class TestReading:
    """A folder that is unfinished, damaged, or of another version: which file, what is wrong, what can be read."""

    @pytest.fixture
    def folder(self, finished: Any, tmp_path: Path) -> Path:
        for path in finished[0].iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path

    def test_whole(self, folder: Path) -> None:
        data = read_result(folder)
        assert list(data.columns) == ["dense", "masked", "small"]
        assert data.layers[0]["after"] == [1, 16]
        assert [entry["epoch"] for entry in data.gates] == [1]
        assert list(data.gates[0]["masks"]) == ["conv1", "conv2", "conv3"]  # in the network's order
        assert sum(data.gates[0]["masks"]["conv1"]) == 32
        assert data.log[0]["macs"] == data.columns["small"]["macs"] or data.log[0]["macs"] > 0
        assert "seed 0" in data.lead
        assert isinstance(warnings_of(folder), list)

    def test_report_and_comparison(self, folder: Path, finished: Any) -> None:
        pytest.importorskip("matplotlib")
        assert "digits_cnn" in write_report(folder).read_text()
        rows = write_comparison([folder, finished[0]], folder / "comparison.html")
        assert [row[-1] for row in rows] == ["equal", "equal"]
        assert "<svg" in (folder / "comparison.html").read_text()

    def test_unfinished(self, folder: Path) -> None:
        (folder / SUMMARY).unlink()
        with pytest.raises(DataError) as caught:
            read_result(folder)
        message = str(caught.value)
        assert "not finished (summary.json is missing)" in message
        assert f"gumbel-prune run --resume {folder} goes on" in message
        assert "log.csv (1 epochs)" in message

    @pytest.mark.parametrize(
        ("name", "content", "problem"),
        [
            ("summary.json", b"{", "summary.json cannot be read"),
            ("summary.json", b'{"format": 99}', "its format is 99, this version of gumbel-plugin reads format 1"),
            ("summary.json", b"[]", "its format is none"),
            ("summary.json", b'{"format": 1, "columns": {}}', "it lacks ['equivalence', 'finished', 'git'"),
            ("config.yaml", "# größer".encode("latin-1"), "config.yaml cannot be read"),
            ("config.yaml", b"seed: [", "config.yaml cannot be read"),
            ("config.yaml", yaml.safe_dump({"sede": 1}).encode(), "did you mean 'seed'"),
        ],
    )
    def test_damaged(self, name: str, content: bytes, problem: str, folder: Path) -> None:
        (folder / name).write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_result(folder)
        assert problem in str(caught.value)
        assert "what can be read: " in str(caught.value)
        assert "masks.safetensors" in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "content", "problem"),
        [
            ("gates.jsonl", b"{}\n", "line 1 is no mapping of epoch, phase and masks"),
            ("gates.jsonl", b"[1]\n", "line 1 is no mapping"),
            ("gates.jsonl", b"{\n", "holds no histograms"),
            ("log.csv", b"a,b\n1,2\n", "is no epoch log: its heading is 'a,b'"),
            ("log.csv", b"epoch,loss\n1,x\n", "is no epoch log"),
        ],
    )
    def test_damage_that_a_report_can_do_without(self, name: str, content: bytes, problem: str, folder: Path) -> None:
        (folder / name).write_bytes(content)
        assert problem in RunFolder.read(folder).problems[name]
        data = read_result(folder)
        assert not (data.log if name == "log.csv" else data.gates)

    def test_scores_of_different_kinds_are_not_compared(self, folder: Path, finished: Any) -> None:
        path = folder / "config.yaml"
        config = yaml.safe_load(path.read_text())
        config["training"]["loss"] = "mse"
        path.write_text(yaml.safe_dump(config))
        with pytest.raises(ConfigError, match="runs of different scores cannot be compared"):
            write_comparison([folder, finished[0]], folder / "comparison.html")

    def test_a_page_that_cannot_be_written_leaves_nothing(self, folder: Path, finished: Any) -> None:
        pytest.importorskip("matplotlib")
        (folder / "taken").mkdir()
        with pytest.raises(ConfigError, match="cannot be written"):
            write_comparison([finished[0]], folder / "taken")
        assert not list(folder.glob("*.partial"))

    def test_a_truncated_network(self, folder: Path) -> None:
        path = folder / "small.safetensors"
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(DataError, match=r"small\.safetensors cannot be read: .*what can be read: config\.yaml"):
            export_run(folder, "pt2")
        read_result(folder)  # the report does not need it

    def test_a_line_that_was_cut_off_does_not_matter(self, folder: Path) -> None:
        for name in ("log.csv", "gates.jsonl"):
            path = folder / name
            path.write_bytes(path.read_bytes() + path.read_bytes()[-20:-9])
        contents = RunFolder.read(folder).contents
        assert len(contents["log.csv"]) == len(contents["gates.jsonl"]) == 1

    @pytest.mark.parametrize("command", ["report", "compare"])
    def test_commands_say_it_in_a_line(self, command: str, tmp_path: Path) -> None:
        result = CliRunner().invoke(app, [command, str(tmp_path / "nothing")])
        assert result.exit_code == 1
        assert result.stderr == f"error: run folder {str(tmp_path / 'nothing')!r} does not exist\n"
