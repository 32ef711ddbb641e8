from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file
from torch import Tensor, nn

from gumbel_plugin import load_pruned
from gumbel_plugin.errors import ConfigError, DataError, EquivalenceError, GraphError, NonFiniteLossError, TargetError
from gumbel_plugin.runs import models
from gumbel_plugin.runs import run as run_module
from gumbel_plugin.runs.run import RunResult, prepare, run
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.shrinking.mask_file import load_masks
from gumbel_plugin.sparsity.counting import count_macs, count_nonzero

pytestmark = pytest.mark.slow

RESULTS = {
    "config.yaml",
    "gates.jsonl",
    "log.csv",
    "masks.safetensors",
    "report.html",
    "small.safetensors",
    "summary.json",
    "tensorboard",
}


def dropout_net(width: int = 12, outputs: int = 10) -> nn.Module:
    """A network whose training draws from torch's global generator."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, outputs)
    )  # fmt: skip


def exploding_net() -> nn.Module:
    """Finite while it is checked, infinite as soon as it is trained."""

    class Explode(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * math.inf if self.training else x

    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10), Explode())


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._REGISTRY, "test_run_dropout", dropout_net)
        patch.setitem(models._REGISTRY, "test_run_exploding", exploding_net)
        yield


def config(**changes: Any) -> RunConfig:
    """A quick run on digits; changes replace or, for mappings, update whole sections."""
    sections: dict[str, Any] = {
        "model": {"name": "test_run_dropout"},
        "data": {"name": "digits", "batch_size": 256},
        "training": {"max_epochs": 2, "accelerator": "cpu"},
        "pruning": {
            "config_list": [{"op_types": ["Linear"], "exclude_op_names": ["4"], "sparse_ratio": 0.5}],
            "phases": {"fixed": 0.5},
        },
        "report": {"latency_batches": [1], "latency_seconds": 0.01},
    }
    for name, change in changes.items():
        old = sections.get(name)
        sections[name] = {**old, **change} if isinstance(old, dict) and isinstance(change, dict) else change
    return RunConfig.load(sections)


def state(result: RunResult) -> dict[str, Tensor]:
    return dict(result.small.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_masks(a: Path, b: Path) -> bool:
    return same(load_file(a / "masks.safetensors"), load_file(b / "masks.safetensors"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path, list[str]]:
    """One finished run with everything on, what it wrote, and what it said."""
    folder = tmp_path_factory.mktemp("finished") / "deep" / "run"
    lines: list[str] = []
    settings = {"dense_baseline": True, "patience": 5}
    return run(config(training=settings, data={"validation_fraction": 0.2}), folder, log=lines.append), folder, lines


class TestResult:
    def test_files(self, finished: tuple[RunResult, Path, list[str]]) -> None:
        _, folder, _ = finished
        assert {path.name for path in folder.iterdir()} == RESULTS

    def test_columns(self, finished: tuple[RunResult, Path, list[str]]) -> None:
        result, _, _ = finished
        assert list(result.columns) == ["dense", "masked", "small"]
        dense, masked, small = result.columns.values()
        assert dense.profile.macs == masked.profile.macs == 64 * 12 + 12 * 10
        assert small.profile.macs == 64 * 6 + 6 * 10
        assert small.profile.parameters == masked.profile.nonzero == 64 * 6 + 6 + 6 * 10 + 10
        assert masked.score == small.score
        assert dense.score is not None
        assert result.sparsity == 0.5
        assert result.equivalence.passed

    def test_summary_is_the_result_as_json(self, finished: tuple[RunResult, Path, list[str]]) -> None:
        result, folder, _ = finished
        summary = json.loads((folder / "summary.json").read_text())
        assert set(summary) >= {
            *("format", "columns", "equivalence", "sparsity", "training_seconds", "layers"),
            *("versions", "git", "machine", "finished"),
        }
        assert summary["layers"][0] == {"name": "1", "kind": "Linear", "before": [64, 12], "after": [64, 6]}
        assert summary["columns"]["small"]["score"] == result.columns["small"].score
        assert summary["columns"]["small"]["macs"] == result.columns["small"].profile.macs
        assert summary["equivalence"]["errors"] == result.equivalence.errors
        assert summary["versions"]["torch"] == torch.__version__

    def test_networks_on_disk_are_the_result(self, finished: tuple[RunResult, Path, list[str]]) -> None:
        result, folder, _ = finished
        rebuilt = load_pruned(folder / "small.safetensors", dropout_net)
        assert same(dict(rebuilt.state_dict()), state(result))
        masks = load_masks(folder / "masks.safetensors")
        kept = masks["1"]["weight"].any(1)
        assert kept.sum() == 6
        assert torch.equal(masks["1"]["bias"] == 1, kept)
        example = torch.zeros(1, 1, 8, 8)
        assert count_macs(rebuilt, example) == result.columns["small"].profile.macs
        assert count_nonzero(rebuilt) == result.columns["small"].profile.nonzero

    def test_log_and_lines(self, finished: tuple[RunResult, Path, list[str]]) -> None:
        _, folder, lines = finished
        with (folder / "log.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["epoch"] for row in rows] == ["1", "2"]
        assert all(float(row["validation_score"]) > 0 for row in rows)
        starts = ["training the dense", "epoch 1/2", "epoch 2/2", "training with gates", "epoch 1/2", "epoch 2/2"]
        assert all(line.startswith(start) for line, start in zip(lines, [*starts, "shrinking"], strict=True))

    def test_its_configuration_repeats_it(self, finished: tuple[RunResult, Path, list[str]], tmp_path: Path) -> None:
        result, folder, _ = finished
        again = run(RunConfig.load(folder / "config.yaml"), tmp_path)
        assert same(state(again), state(result))
        assert again.columns["dense"].score == result.columns["dense"].score
        assert same_masks(tmp_path, folder)
        for name in ("config.yaml", "small.safetensors"):
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


class TestSeed:
    def test_dense_baseline_does_not_disturb_the_gated_run(
        self, finished: tuple[RunResult, Path, list[str]], tmp_path: Path
    ) -> None:
        result, folder, _ = finished
        without = RunConfig.load(folder / "config.yaml")
        without = without.model_copy(update={"training": without.training.model_copy(update={"dense_baseline": False})})
        alone = run(without, tmp_path)
        assert same(state(alone), state(result))
        assert same_masks(tmp_path, folder)
        assert alone.columns["dense"].score is None

    def test_global_random_state_does_not_matter_but_the_seed_does(self) -> None:
        torch.manual_seed(123)
        first = run(config())
        torch.rand(7)
        assert same(state(run(config())), state(first))
        assert not same(state(run(config(seed=1))), state(first))


class TestFrozenWeights:
    @pytest.mark.parametrize("rescale", ["none", "learned"])
    def test_from_beginning_to_end(self, rescale: str, tmp_path: Path) -> None:
        pruning = {
            "weights": "frozen",
            "weight_init": "signed_constant",
            "rescale": rescale,
            "config_list": [{"op_types": ["Linear"], "granularity": "element"}],
            "phases": {},
        }
        model = {"name": "lenet300", "options": {"in_features": 64}}
        result = run(config(pruning=pruning, model=model, data={"batch_size": 64}), tmp_path)
        assert 0.3 < result.sparsity < 0.7
        assert result.equivalence.passed
        assert result.columns["masked"].score > 50
        for mask in load_masks(tmp_path / "masks.safetensors").values():
            assert set(mask) == {"weight"}
        weights = result.small.state_dict()
        assert all(len(weights[f"fc{n}.weight"].abs().unique()) == 2 for n in (1, 2, 3))  # closed, and one magnitude


class TestRefusals:
    """Whatever is wrong is said before training, and nothing is written."""

    CASES: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"model": None}, ConfigError, "model: required"),
        ({"data": None}, ConfigError, "data: required"),
        ({"model": {"name": "test_run_droput"}}, ConfigError, "did you mean 'test_run_dropout'"),
        ({"model": {"options": {"width": 12, "depth": 2}}}, ConfigError, "depth.*its options are: width, outputs"),
        ({"model": {"options": {"outputs": 7}}}, ConfigError, r"two inputs is \(2, 7\), the data needs \(2, 10\)"),
        ({"model": {"name": "lenet5"}}, GraphError, "forward fails on the example inputs"),
        ({"data": {"name": "cifar10", "root": "/nowhere"}}, DataError, "CIFAR10 is missing from /nowhere"),
        ({"data": {"name": "digist"}}, ConfigError, "did you mean 'digits'"),
        ({"data": {"augment": True}}, ConfigError, "augment is true for data set 'digits'"),
        ({"training": {"loss": "mse"}}, ConfigError, "targets are classes; use 'cross_entropy'"),
        ({"training": {"patience": 2}}, ConfigError, "set data.validation_fraction"),
        ({"training": {"accelerator": "abacus"}}, ConfigError, "accelerator 'abacus'"),
        ({"pruning": {"config_list": [{"op_names": ["fc9"]}]}}, TargetError, "'fc9' matches no module"),
        ({"pruning": {"config_list": [{"op_names": ["4"]}]}}, TargetError, "nothing would be gated"),
    )

    @pytest.mark.parametrize(("changes", "error", "message"), CASES)
    def test_nothing_is_written(
        self, changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(error, match=message):
            run(config(**changes), tmp_path / "out", log=self.unexpected)
        assert list(tmp_path.iterdir()) == []

    def test_regression_needs_its_loss(self) -> None:
        toy = {"model": {"name": "toy_mlp"}, "data": {"name": "toy_regression"}}
        with pytest.raises(ConfigError, match="targets are numbers; use 'mse'"):
            prepare(config(**toy, pruning={"config_list": [{"op_types": ["Linear"], "granularity": "element"}]}))

    @pytest.mark.parametrize("place", ["file", "file/below"])
    def test_folder_that_cannot_be_written(self, place: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ConfigError, match="cannot be written"):
            run(config(), tmp_path / place, log=self.unexpected)
        assert (tmp_path / "file").read_text() == "mine"

    def test_finished_run(self, finished: tuple[RunResult, Path, list[str]]) -> None:
        _, folder, _ = finished
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        with pytest.raises(ConfigError, match="holds a finished run; pass --force"):
            run(config(), folder, log=self.unexpected)
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before

    @staticmethod
    def unexpected(line: str) -> None:
        raise AssertionError(f"something was begun: {line}")


class TestOverwriting:
    def test_force_replaces_a_finished_run(self, tmp_path: Path) -> None:
        run(config(), tmp_path)
        before = (tmp_path / "small.safetensors").read_bytes()
        (tmp_path / "notes.txt").write_text("mine")
        run(config(seed=1), tmp_path, force=True)
        assert (tmp_path / "small.safetensors").read_bytes() != before
        assert "seed: 1" in (tmp_path / "config.yaml").read_text()
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_an_interrupted_run_leaves_no_results(self, tmp_path: Path) -> None:
        """Not even those of the run that it was to replace: they would lie beside another configuration."""
        run(config(), tmp_path)

        def interrupt(line: str) -> None:
            if line.startswith("epoch 2"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(config(seed=1), tmp_path, force=True, log=interrupt)
        left = {"checkpoint.pt", "config.yaml", "log.csv", "gates.jsonl", "tensorboard"}
        assert {path.name for path in tmp_path.iterdir()} == left
        run(config(seed=1), tmp_path)  # needs no force: nothing had been finished
        assert {path.name for path in tmp_path.iterdir()} == RESULTS


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    lines: list[str] = []
    result = run(config(), tmp_path / "out", log=lines.append)
    assert result.equivalence.passed
    assert result.output is None
    assert list(tmp_path.iterdir()) == lines == []


class TestFailures:
    def test_a_loss_that_explodes(self, tmp_path: Path) -> None:
        exploding = config(
            model={"name": "test_run_exploding"},
            pruning={"config_list": [{"op_types": ["Linear"], "granularity": "element"}]},
        )
        with pytest.raises(NonFiniteLossError, match="loss became nan at step 0"):
            run(exploding, tmp_path)
        assert not {"summary.json", "masks.safetensors", "small.safetensors"} & {p.name for p in tmp_path.iterdir()}

    def test_a_small_network_that_is_not_equal(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def disturb(shrink: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
            def disturbed(*args: Any) -> nn.Module:
                small = shrink(*args)
                with torch.no_grad():
                    small[4].bias[0] += 1
                return small

            return disturbed

        monkeypatch.setattr(run_module, "remove_dead_units", disturb(run_module.remove_dead_units))
        with pytest.raises(EquivalenceError, match=r"NOT equivalent: float32 error \d"):
            run(config(), tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == RESULTS
        assert json.loads((tmp_path / "summary.json").read_text())["equivalence"]["passed"] is False

    def test_a_summary_with_nan_is_valid_json(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        check = run_module.verify_equivalence

        def not_a_number(*args: Any) -> Any:
            report = check(*args)
            return replace(report, errors={**report.errors, "float32": math.nan})

        monkeypatch.setattr(run_module, "verify_equivalence", not_a_number)
        with pytest.raises(EquivalenceError, match="float32 error nan"):
            run(config(), tmp_path)

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
        assert summary["equivalence"]["errors"]["float32"] is None
