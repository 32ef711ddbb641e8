"""What GumbelPruner refuses before anything is trained: evaluators that are none, lengths that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nni.compression import TorchEvaluator
from torch import nn

from gumbel_plugin import GumbelPruner
from gumbel_plugin.errors import ConfigError, GumbelPluginError, LifecycleError
from tests.gumbel_nni.helpers import evaluator_of

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
RULES = [{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": "element"}]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("evaluator", "shown"),
    [
        ("TorchEvaluator", "evaluator is 'TorchEvaluator'; it must be one of NNI's"),
        (TorchEvaluator, "evaluator is the class TorchEvaluator; it must be one of NNI's"),
        (lambda model: 0.0, "evaluator is <function .*; it must be one of NNI's"),
        ({"op_types": []}, "it must be one of NNI's"),
        (0, "evaluator is 0; it must be one of NNI's"),
    ],
)
def test_an_evaluator_that_is_none(evaluator: Any, shown: str) -> None:
    model = network()
    with pytest.raises(ConfigError, match=shown):
        GumbelPruner(model, RULES, evaluator)
    assert [name for name, _ in model.named_modules()] == ["", "0", "1", "2"], "as it was"


@pytest.mark.parametrize("value", [0, -1, 2.5, "10", True, float("nan")])
@pytest.mark.parametrize("name", ["max_steps", "max_epochs"])
def test_a_length_that_is_none(name: str, value: Any) -> None:
    model = network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    pruner = GumbelPruner(model, RULES, evaluator_of(model, X))
    with pytest.raises(ConfigError, match=f"{name} = .*: it must be a whole number of at least 1, or None"):
        pruner.compress(**{name: value})
    pruner.unwrap_model()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("config", [None, 3, [], {}, "", [None]])
def test_a_configuration_that_is_none(config: Any) -> None:
    with pytest.raises(GumbelPluginError):
        GumbelPruner(network(), config)


@pytest.mark.parametrize("compressor", [None, "pruner", network(), GumbelPruner])
def test_a_compressor_that_is_none(compressor: Any) -> None:
    with pytest.raises(ConfigError, match="from_compressor needs a compressor of NNI's"):
        GumbelPruner.from_compressor(compressor, RULES)


def test_a_second_one_that_learns_at_the_same_time() -> None:
    model = network()
    first = GumbelPruner(model, RULES, evaluator_of(model, X))
    with pytest.raises(LifecycleError, match="two cannot learn at once: name all"):
        GumbelPruner.from_compressor(first, [{**RULES[0], "op_names": ["2"]}])
    first.compress(max_steps=2)
    second = GumbelPruner.from_compressor(first, [{**RULES[0], "op_names": ["2"]}])
    second.compress(max_steps=2)
    assert set(second.get_masks()) >= {"2"}
