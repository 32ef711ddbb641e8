"""Arguments that speak of layers: names are as good as modules, and what matches nothing is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.errors import ConfigError, LifecycleError, TargetError

INPUTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("form", ["name", "names", "module", "modules", "tuple", "mixed"])
def test_ignored_layers_may_be_names_or_modules_one_or_some(form: str) -> None:
    model = network()
    first = model[0]
    ignored: Any = {
        "name": "0",
        "names": ["0"],
        "module": first,
        "modules": [first],
        "tuple": (first,),
        "mixed": ["0", model[4]],
    }[form]
    GumbelGroupPruner(model, INPUTS, pruning_ratio=0.5, ignored_layers=ignored).step()
    assert (model[0].out_features, model[2].out_features) == (16, 4)


def test_ratios_may_be_keyed_by_names() -> None:
    model = network()
    GumbelGroupPruner(model, INPUTS, pruning_ratio=0.5, pruning_ratio_dict={"0": 0.25}).step()
    assert (model[0].out_features, model[2].out_features) == (12, 4)


FOREIGN = nn.Linear(6, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ignored_layers": ["layer0"]}, "ignored_layers: 'layer0' is not in the model; .*0"),
        ({"ignored_layers": "5"}, "ignored_layers: '5' is not in the model"),
        ({"ignored_layers": [""]}, "ignored_layers: '' is not in the model"),
        ({"ignored_layers": [FOREIGN]}, "ignored_layers: Linear of another model"),
        ({"pruning_ratio_dict": {"7": 0.5}}, "pruning_ratio_dict: '7' is not in the model"),
        ({"pruning_ratio_dict": {("0", FOREIGN): 0.5}}, "pruning_ratio_dict: Linear of another model"),
        ({"num_heads": {"attention": 2}}, "num_heads: 'attention' is not in the model"),
        ({"channel_groups": {FOREIGN: 2}}, "channel_groups: Linear of another model"),
        ({"out_channel_groups": {"x": 2}}, "out_channel_groups: 'x' is not in the model"),
        ({"customized_pruners": {FOREIGN: None}}, "customized_pruners: Linear of another model"),
        ({"unwrapped_parameters": {nn.Parameter(torch.ones(3)): 0}}, "unwrapped_parameters: Parameter is no parameter"),
        ({"unwrapped_parameters": [("0.wieght", 0)]}, "'0.wieght' is no parameter.*did you mean '0.weight'"),
    ],
)
def test_a_layer_that_is_not_in_the_model_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        GumbelGroupPruner(network(), INPUTS, pruning_ratio=0.5, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"ignored_layers": 3},
        {"ignored_layers": [0]},
        {"ignored_layers": [nn.Linear]},
        {"pruning_ratio_dict": [0.5]},
        {"pruning_ratio_dict": {"0": "0.5"}},
        {"num_heads": {"0": 0}},
        {"num_heads": {"0": True}},
        {"channel_groups": {"0": 2.5}},
        {"unwrapped_parameters": 3},
        {"unwrapped_parameters": [("0.weight", 2)]},
        {"root_module_types": nn.Linear},
        {"root_module_types": ["Linear"]},
        {"pruning_ratio": "0.5"},
        {"pruning_ratio": float("nan")},
        {"pruning_ratio": True},
        {"pruning_ratio": -0.1},
        {"max_pruning_ratio": None},
        {"max_pruning_ratio": "1"},
        {"iterative_steps": None},
        {"iterative_steps": True},
        {"iterative_steps": 2.5},
        {"round_to": "8"},
        {"round_to": True},
    ],
    ids=str,
)
def test_a_value_of_a_wrong_kind_names_its_argument(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        GumbelGroupPruner(network(), INPUTS, **{"pruning_ratio": 0.5, **arguments})


def test_a_model_without_anything_to_gate_says_why() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 3))
    with pytest.raises(TargetError, match="can be gated: 1: it reaches the network's output"):
        GumbelGroupPruner(model, INPUTS, pruning_ratio=0.5, ignored_layers="0")


def test_after_a_step_that_failed_halfway_the_next_one_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = GumbelGroupPruner(network(), INPUTS, pruning_ratio=0.5, iterative_steps=3)

    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pruner, "_update_graph", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        pruner.step()
    with pytest.raises(LifecycleError, match="failed halfway"):
        pruner.step()
