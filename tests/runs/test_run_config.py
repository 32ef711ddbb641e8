from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gumbel_plugin import PruningConfig
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.runs.run_config import DataConfig, RunConfig

RULE = {"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": "element"}
RUN: dict[str, Any] = {"pruning": {"config_list": [RULE]}, "data": {"name": "digits"}, "training": {"max_epochs": 3}}
# A section with a key that it does not have, and what the error says.
WRONG = {
    "data": ({"name": "digits", "batch": 3}, r"data\.batch: unknown key; did you mean 'batch_size'"),
    "training": ({"max_epoch": 3}, r"training\.max_epoch: unknown key; did you mean 'max_epochs'"),
    "model": ({"nam": "lenet5"}, r"model\.nam: unknown key; did you mean 'name'"),
    "report": ({"htm": False}, r"report\.htm: unknown key; did you mean 'html'"),
}


def test_what_is_pruned_can_be_read_without_the_run() -> None:
    config = PruningConfig.load(RUN)
    assert config.pruning == RunConfig.load(RUN).pruning
    assert config.data == {"name": "digits"}
    assert config.model is config.report is None


def test_a_run_is_read_from_what_was_read_without_it(tmp_path: Path) -> None:
    run = RunConfig.load(PruningConfig.load(RUN))
    assert run == RunConfig.load(RUN)
    assert run.data == DataConfig(name="digits")
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    assert RunConfig.load(PruningConfig.load(tmp_path / "run.yaml")) == run


@pytest.mark.parametrize("section", WRONG)
def test_a_wrong_key_of_a_run_is_an_error(section: str) -> None:
    values, message = WRONG[section]
    with pytest.raises(ConfigError, match=message):
        RunConfig.load({**RUN, section: values})


@pytest.mark.parametrize("inputs", [None, torch.ones(2, 1, 8, 8)], ids=["inputs of the data", "own inputs"])
@pytest.mark.parametrize("section", ["data", "training"])
def test_a_pruner_finds_it_before_it_trains(section: str, inputs: torch.Tensor | None) -> None:
    pytest.importorskip("nni")
    from gumbel_plugin import GumbelPruner

    values, message = WRONG[section]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = model[1].weight.detach().clone()
    with pytest.raises(ConfigError, match=message):
        GumbelPruner(model, {**RUN, section: values}, example_inputs=inputs).compress(max_steps=1)
    assert torch.equal(model[1].weight, before)
