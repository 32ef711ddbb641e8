from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn
from typer.testing import CliRunner, Result

from gumbel_plugin.insight.profile import Latency, Profile
from gumbel_plugin.runs import cli
from gumbel_plugin.runs import run as run_module
from gumbel_plugin.runs.cli import app

RUN = {
    "model": {"name": "lenet300", "options": {"in_features": 64}},
    "data": {"name": "digits", "batch_size": 256},
    "training": {"max_epochs": 2, "accelerator": "cpu"},
    "pruning": {
        "config_list": [
            {"op_names": ["fc1"], "sparse_ratio": 0.5},
            {"op_names": ["fc2"], "sparse_ratio": 0.25},
        ],
        "phases": {"fixed": 0.5},
    },
    "report": {"latency_batches": [1, 8], "latency_seconds": 0.01},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with one good configuration; latencies are timed for milliseconds only."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text(yaml.safe_dump(RUN))
    return tmp_path


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def the_error(*arguments: str) -> str:
    """Return the one line that a command leaves on stderr."""
    result = call(*arguments, code=1)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


class TestRun:
    @pytest.mark.slow
    def test_prints_the_three_columns_and_writes(self, folder: Path) -> None:
        result = call("run", "good.yaml")
        lines = result.stdout.splitlines()
        assert [word for word in ("dense", "masked", "small") if any(word in line for line in lines)]
        table = {
            cells[1].strip(): [cell.strip() for cell in cells[2:5]] for cells in map(split, lines) if len(cells) > 4
        }
        summary = json.loads((folder / "runs" / "good" / "summary.json").read_text())
        columns = summary["columns"]
        assert table["MACs"] == [f"{columns[name]['macs']:,}" for name in ("dense", "masked", "small")]
        assert table["non-zero"] == [f"{columns[name]['nonzero']:,}" for name in ("dense", "masked", "small")]
        assert table["test score"] == ["-", *(f"{columns[name]['score']:.2f}" for name in ("masked", "small"))]
        assert table.keys() >= {"parameters", "latency (batch 1)", "latency (batch 8)", "file size"}
        assert lines[-3].startswith("equivalent: float32 error ")
        assert lines[-2].endswith(f"everything is in {Path('runs/good')}")
        assert lines[-1] == f"report: {Path('runs/good/report.html')}"
        assert "epoch 2/2: loss" in result.stderr
        assert "\x1b" not in result.output  # no colors, no progress bar where nobody is at a terminal
        assert "\r" not in result.output

    @pytest.mark.slow
    def test_quiet_prints_the_result_only(self) -> None:
        result = call("run", "good.yaml", "--quiet", "--output", "here")
        assert result.stderr == ""
        assert "MACs" in result.stdout
        assert Path("here/summary.json").exists()

    @pytest.mark.slow
    def test_where_samples_have_gates_of_their_own_it_says_how_far_they_agree(self) -> None:
        options = {"unit": "channel", "hidden": 4}
        pruning = {
            "method": "consensus",
            "options": options,
            "config_list": [{"op_names": ["fc1"], "sparse_ratio": 0.5}],
        }
        Path("good.yaml").write_text(yaml.safe_dump({**RUN, "pruning": pruning}))
        lines = call("run", "good.yaml", "--quiet", "--set", "report.latency_batches=[]").stdout.splitlines()
        assert re.fullmatch(r"agreement: \d+\.\d % of \d+ held-out samples have .*", lines[-4])
        assert lines[-4] in call("report", "runs/good").stdout.splitlines()
        assert "<h2>Agreement</h2>" in Path("runs/good/report.html").read_text()

    @pytest.mark.slow
    def test_a_finished_run_needs_force(self) -> None:
        call("run", "good.yaml", "--quiet")
        error = the_error("run", "good.yaml")
        ways = "pass --force to replace it, or choose another --output"
        assert error == f"error: output {str(Path('runs/good'))!r} holds a finished run; {ways}"
        call("run", "good.yaml", "--quiet", "--force")

    @pytest.mark.slow
    def test_a_small_network_that_is_not_equal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shrink = run_module.remove_dead_units

        def disturbed(*args: Any) -> nn.Module:
            small = shrink(*args)
            with torch.no_grad():
                small.fc3.bias[0] += 1
            return small

        monkeypatch.setattr(run_module, "remove_dead_units", disturbed)
        result = call("run", "good.yaml", "--quiet", code=1)
        assert "NOT equivalent: float32 error" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert Path("runs/good/summary.json").exists()

    def test_ctrl_c(self, folder: Path) -> None:
        (folder / "network_that_waits.py").write_text(
            "from torch import nn\n"
            "class Waits(nn.Module):\n"
            "    def forward(self, x):\n"
            "        if self.training:\n"
            "            raise KeyboardInterrupt\n"
            "        return x\n"
            "def build():\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Waits(), nn.Linear(8, 10))\n"
        )
        rules = "pruning.config_list=[{op_types: [Linear], granularity: element}]"
        result = call("run", "good.yaml", "--set", "model={name: 'network_that_waits:build'}", "--set", rules, code=130)
        hint = f"gumbel-prune run --resume {Path('runs/good')} goes on"
        assert result.stderr.splitlines() == ["training with gates", f"interrupted: there is no result; {hint}"]
        assert {path.name for path in Path("runs/good").iterdir()} == {"config.yaml"}

    @pytest.mark.slow
    def test_set(self) -> None:
        overrides = ("seed=3", "training.max_epochs=1", "pruning.config_list.1.sparse_ratio=0.9")
        arguments = [argument for override in overrides for argument in ("--set", override)]
        call("run", "good.yaml", "--quiet", *arguments)
        resolved = yaml.safe_load(Path("runs/good/config.yaml").read_text())
        assert resolved["seed"] == 3
        assert resolved["training"]["max_epochs"] == 1
        assert [rule["sparse_ratio"] for rule in resolved["pruning"]["config_list"]] == [0.5, 0.9]


class TestCheck:
    def test_says_what_would_be_gated_and_writes_nothing(self, folder: Path) -> None:
        result = call("check", "good.yaml", "--set", "pruning.config_list.1.sparse_ratio=null")
        assert result.stdout.splitlines()[0] == "good.yaml: ok, 400 gates in 2 masks, 2 budgets"
        assert set(result.stdout.splitlines()[1:]) == {
            "  fc1: 300 gates, 50 % of the weights go",
            "  fc2: 100 gates, the gates decide",
        }
        assert [path.name for path in folder.iterdir()] == ["good.yaml"]


class TestErrors:
    """One line on stderr: the key, its value, the rule, and the nearest valid choice; exit code 1; nothing written."""

    CASES: tuple[tuple[str, str], ...] = (
        ("training.max_epochs=0", "training.max_epochs = 0: Input should be greater than or equal to 1"),
        ("training.epochs=3", "training.epochs: unknown key; did you mean 'max_epochs'?"),
        ("model.name=lenet30", "unknown model 'lenet30'; did you mean 'lenet300'?"),
        ("data.name=digit", "unknown data set 'digit'; did you mean 'digits'?"),
        ("pruning.config_list.0.op_names=[fc4]", "op_names: 'fc4' matches no module of the model; did you mean 'fc3'?"),
        ("pruning.config_list.0.sparse_ratio=1.5", "pruning.config_list.0.sparse_ratio = 1.5: "),
        ("pruning.phases.fixed=1.0", "pruning.phases.fixed = 1.0: Input should be less than 1"),
        ("seed.x=1", "--set 'seed.x=1'"),
        ("pruning.config_list.2.sparse_ratio=0.5", "'2' is no number of an item; the list has 2, from 0 on"),
        ("pruning.config_list=[1", "is no valid YAML: "),
        ("nothing", "--set 'nothing' must read key.subkey=value"),
        ("training.devices=999", "training.devices = 999: that are 999 processes on the CPU"),
        ("training.accelerator=abacus", "training: Lightning refuses accelerator 'abacus'"),
    )

    @pytest.mark.parametrize("command", ["run", "check"])
    @pytest.mark.parametrize(("override", "message"), CASES)
    def test_overrides(self, command: str, override: str, message: str, folder: Path) -> None:
        Path("good.yaml").write_text(yaml.safe_dump({"seed": 0, **RUN}))
        assert message in the_error(command, "good.yaml", "--set", override)
        assert [path.name for path in folder.iterdir()] == ["good.yaml"]

    def test_a_file_that_does_not_exist(self) -> None:
        assert the_error("run", "bad.yaml") == "error: config 'bad.yaml' does not exist"

    @pytest.mark.parametrize("content", ["a: [1\nb: 2", "just words", "", "- {op_types: [Linear]}"])
    def test_a_file_that_is_no_run(self, content: str) -> None:
        Path("bad.yaml").write_text(content)
        assert the_error("run", "bad.yaml").startswith("error: config 'bad.yaml' ")

    def test_a_folder_that_cannot_be_written(self) -> None:
        assert "output 'good.yaml' cannot be written" in the_error("run", "good.yaml", "--output", "good.yaml")

    @pytest.mark.parametrize("command", ["report", "explain", "compare", "export", "run", "check", "resume"])
    @pytest.mark.parametrize("path", ["nowhere", "good.yaml", "a" * 5000, "/dev/null"])
    def test_what_is_no_run(self, command: str, path: str) -> None:
        options = {"export": ["--format", "safetensors"], "run": ["--output", "/dev/null/x"]}.get(command, [])
        arguments = ["run", "--resume"] if command == "resume" else [command, *options]
        if command != "check" or path != "good.yaml":
            assert len(the_error(*arguments, path)) < 1000 + len(path)

    @pytest.mark.parametrize("code", ["def (:", "import a_package_nobody_has", "1 / 0", "def build(): return {}[0]"])
    def test_a_factory_that_fails(self, code: str, folder: Path) -> None:
        name = f"network_that_fails_{len(code)}"
        (folder / f"{name}.py").write_text(code)
        assert "error: " in the_error("check", "good.yaml", "--set", f"model={{name: '{name}:build'}}")

    def test_wrong_usage_is_code_2(self) -> None:
        call("run", code=2)
        call("run", "good.yaml", "--fast", code=2)

    def test_a_missing_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("run", "train", "epoch_log"):
            monkeypatch.delitem(sys.modules, f"gumbel_plugin.runs.{name}", raising=False)
        monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
        monkeypatch.setitem(sys.modules, "lightning.pytorch.loggers.logger", None)
        error = the_error("check", "good.yaml")
        assert error == "error: lightning is not installed; install it with: pip install 'gumbel-plugin[lightning]'"


class TestOwnFactories:
    def test_a_module_in_the_current_folder(self, folder: Path) -> None:
        (folder / "networks_of_mine").mkdir()
        (folder / "networks_of_mine" / "small.py").write_text(
            "from torch import nn\n"
            "def tiny():\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))\n"
        )
        rules = 'pruning.config_list=[{op_names: ["1"], sparse_ratio: 0.5}]'
        mine = "model={name: 'networks_of_mine.small:tiny'}"
        assert call("check", "good.yaml", "--set", mine, "--set", rules).stdout.startswith("good.yaml: ok, 8 gates")

    def test_installed_modules_come_first(self, folder: Path) -> None:
        call("check", "good.yaml")
        assert sys.path[-1] == os.getcwd() == str(folder)


class TestTable:
    def test_wide_numbers_are_whole(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        huge = Profile(10**15, 10**15, 10**15, 10**15, {1: Latency(123456.789, 0.0, 1)})
        columns = dict.fromkeys(("dense", "masked", "small"), run_module.NetworkMetrics(huge, 99.99))
        result = run_module.RunResult(columns, None, 0.0, 0.0, [], nn.Identity(), None)  # type: ignore[arg-type]
        assert Console().width == 80
        cli._print_table(cli.result_table(result))
        text = capsys.readouterr().out
        assert text.count("1,000,000,000,000,000") == 9
        assert text.count("123456.789 ± 0.000 ms") == 3
        assert "…" not in text


@pytest.mark.slow
def test_help_is_quick() -> None:
    """Help loads neither Lightning nor Torch-Pruning."""
    code = "import sys, gumbel_plugin.runs.cli; print(sorted({'lightning', 'torch_pruning', 'nni'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def split(line: str) -> list[str]:
    return line.replace("┃", "│").split("│")


def test_groups_lists_every_group_with_its_safety() -> None:
    result = CliRunner().invoke(app, ["groups", str(Path(__file__).parents[2] / "configs" / "digits.yaml")])
    assert result.exit_code == 0
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.startswith("│")}
    assert "exact" in rows["conv1"]
    assert "yes" in rows["conv1"]
    assert "unsupported" in rows["fc"]
    assert "output" in rows["fc"]
