from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.masks import METHODS
from gumbel_plugin.runs.cli import app
from gumbel_plugin.runs.run import prepare
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.runs.starter import SCHEMA_FILE, json_schema, starter_text, write_starter


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_run_that_can_be_prepared(method: str) -> None:
    config = RunConfig.load(yaml.safe_load(starter_text(method, "lenet300", "digits")))
    assert config.pruning.method == method
    prepare(config)


def test_the_loss_fits_the_targets() -> None:
    config = RunConfig.load(yaml.safe_load(starter_text("gumbel_softmax", "toy_mlp", "toy_regression")))
    assert config.training.loss == "mse"
    prepare(config)


def test_every_comment_can_become_a_key() -> None:
    """What is commented out is the default: all of it uncommented is still valid, and means the same."""
    text = starter_text("gumbel_softmax", "digits_cnn", "digits")
    lines = [re.sub(r"^( *)# (\s*\w+:( .*)?)$", r"\1\2", line) for line in text.split("\n")]
    keys = [line for line in lines if not line.strip().startswith("#")]
    uncommented = [line for line in keys if "may also have" not in line]
    config = RunConfig.load(yaml.safe_load("\n".join(uncommented)))
    before = RunConfig.load(yaml.safe_load(text))
    assert config.model_dump(exclude={"pruning"}) == before.model_dump(exclude={"pruning"})
    assert config.pruning.budget == before.pruning.budget
    assert config.pruning.method_options() == before.pruning.method_options()
    assert len(uncommented) > 40


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["init", "mine.yaml", "--method", "edge_popup", "--model", "lenet300"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "mine.yaml").read_text().startswith(f"# yaml-language-server: $schema=./{SCHEMA_FILE}\n")
    assert json.loads((tmp_path / SCHEMA_FILE).read_text()) == json_schema()
    again = CliRunner().invoke(app, ["init", "mine.yaml"])
    assert again.stderr == "error: 'mine.yaml' exists; pass --force to replace it\n"
    printed = CliRunner().invoke(app, ["schema"]).stdout
    assert json.loads(printed) == json_schema()


@pytest.mark.parametrize(
    ("method", "model", "data", "hint"),
    [("gumbel", "lenet300", "digits", "gumbel_softmax"), ("gibbs", "lenet30", "digits", "lenet300"),
     ("gibbs", "lenet300", "digit", "digits")],
)  # fmt: skip
def test_misspelt(method: str, model: str, data: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{hint}'"):
        write_starter(tmp_path / "run.yaml", method, model, data)
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_not_there_is_no_obstacle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig.load(yaml.safe_load(starter_text("supermask", "conv2", "cifar10")))
    assert config.model is not None
    assert config.model.num_classes is None


class TestSchema:
    def test_every_key_is_in_it(self) -> None:
        schema = json_schema()
        assert set(schema["properties"]) == set(RunConfig.model_fields)
        assert schema["additionalProperties"] is False
        training = schema["$defs"]["TrainingConfig"]["properties"]
        assert training["max_epochs"]["minimum"] == 1
        assert training["patience"]["description"].startswith("Stop after this many epochs")

    def test_the_configurations_of_this_project_fit(self) -> None:
        jsonschema = pytest.importorskip("jsonschema")
        for path in (Path(__file__).parents[2] / "configs").rglob("*.yaml"):
            jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())
