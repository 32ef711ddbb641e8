"""Layers in the pruner's arguments: names stand for layers, and what is not the model's is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.errors import ConfigError, GumbelPluginError, TargetError

INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two hidden layers of 16 and 8 units, a learned offset between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        self.offset = nn.Parameter(torch.rand(1, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)) * self.offset)))


def pruned(net: Net, **arguments: Any) -> list[int]:
    given = {"pruning_ratio": 0.5, "unwrapped_parameters": {"offset": 1}, **arguments}
    GumbelGroupPruner(net, INPUTS, **given).step()
    return [net.first.out_features, net.second.out_features]


@pytest.mark.parametrize("form", ["name", "layer", "list of names", "list of both", "generator", "set"])
def test_ignored_layers_are_names_or_layers(form):
    net = Net()
    given = {
        "name": "first",
        "layer": net.first,
        "list of names": ["first", "head"],
        "list of both": ["first", net.head],
        "generator": (name for name in ("first",)),
        "set": {net.first},
    }
    assert pruned(net, ignored_layers=given[form]) == [16, 4]


def test_an_ignored_parameter_has_a_name_too():
    found = []
    for of in (lambda net: ["offset"], lambda net: [net.offset]):
        net = Net()
        found.append(pruned(net, ignored_layers=of(net)))
    assert found[0] == found[1]


def test_dictionaries_take_names():
    assert pruned(Net(), pruning_ratio_dict={"first": 0.25}) == [12, 4]
    assert pruned(Net(), pruning_ratio_dict={("first", "second"): 0.25}, global_pruning=True) != [8, 4]
    net = Net()
    assert pruned(net, unwrapped_parameters={"offset": 1}, out_channel_groups={"first": 2}) == [8, 4]
    assert net.offset.shape == (1, 8)


WRONG: dict[str, tuple[dict[str, Any], type[GumbelPluginError], str]] = {
    "a typo": ({"ignored_layers": ["frist"]}, TargetError, "ignored_layers: .*'frist'; did you mean 'first'"),
    "a typo alone": ({"ignored_layers": "frist"}, TargetError, "did you mean 'first'"),
    "no name": ({"ignored_layers": ""}, TargetError, "no layer ''"),
    "another model's layer": ({"ignored_layers": [nn.Linear(6, 16)]}, TargetError, "a Linear of another model"),
    "another model's parameter": ({"ignored_layers": [nn.Parameter(torch.ones(1))]}, TargetError, "another model"),
    "a class": ({"ignored_layers": [nn.Linear]}, ConfigError, "neither a layer of the model nor the name of one"),
    "a number": ({"ignored_layers": 3}, ConfigError, "ignored_layers = 3: must be a list"),
    "a dictionary": ({"ignored_layers": {"first": 1}}, ConfigError, "must be a list"),
    "nested lists": ({"ignored_layers": [["first"]]}, ConfigError, "neither a layer"),
    "an unknown layer with a ratio": ({"pruning_ratio_dict": {"frist": 0.5}}, TargetError, "did you mean 'first'"),
    "one of several": ({"pruning_ratio_dict": {("first", "secnd"): 0.5}}, TargetError, "did you mean 'second'"),
    "pairs": ({"pruning_ratio_dict": [("first", 0.5)]}, ConfigError, "must be a dictionary"),
    "a class with a ratio": ({"pruning_ratio_dict": {nn.Linear: 0.5}}, ConfigError, "neither a layer"),
    "a ratio as text": ({"pruning_ratio_dict": {"first": "0.5"}}, ConfigError, r"\['first'\] = '0.5'"),
    "heads of a typo": ({"num_heads": {"frist": 2}}, TargetError, "num_heads: .*did you mean 'first'"),
    "heads of another model": ({"num_heads": {nn.Linear(6, 16): 2}}, TargetError, "num_heads: .*another model"),
    "no heads": ({"num_heads": {"first": 0}}, ConfigError, r"num_heads\['first'\] = 0"),
    "half a head": ({"num_heads": {"first": 2.5}}, ConfigError, "= 2.5: must be a whole number"),
    "heads that do not fit": ({"num_heads": {"first": 3}}, ConfigError, "must divide the layer's 16 output channels"),
    "heads for all": ({"num_heads": 4}, ConfigError, "num_heads = 4: must be a dictionary"),
    "groups of a typo": ({"in_channel_groups": {"secnd": 2}}, TargetError, "in_channel_groups.*'second'"),
    "groups that do not fit": ({"in_channel_groups": {"second": 3}}, ConfigError, "16 input channels"),
    "groups as text": ({"channel_groups": {"first": "2"}}, ConfigError, "'2': must be a whole number"),
    "a head ratio of a typo": ({"head_pruning_ratio_dict": {"frist": 0.5}}, TargetError, "'first'"),
    "several share a head ratio": ({"head_pruning_ratio_dict": {("first",): 0.5}}, ConfigError, "neither a layer"),
    "an unknown parameter": ({"unwrapped_parameters": {"ofset": 1}}, TargetError, "did you mean 'offset'"),
    "another model's offset": (
        {"unwrapped_parameters": {nn.Parameter(torch.ones(16)): 0}},
        TargetError,
        "a parameter is a Parameter of another model",
    ),
    "a dimension that is none": ({"unwrapped_parameters": {"offset": 2}}, ConfigError, "2 is no dimension"),
    "no dimension": ({"unwrapped_parameters": ["offset"]}, ConfigError, "and a dimension"),
    "root types by name": ({"root_module_types": ["Linear"]}, ConfigError, "'Linear' is no class of layers"),
    "no root types": ({"root_module_types": []}, ConfigError, "nothing would be pruned"),
    "root types that are none": ({"root_module_types": None}, ConfigError, "root_module_types = None"),
    "a pruner's class": (
        {"customized_pruners": {nn.Linear: tp.pruner.function.LinearPruner}},
        ConfigError,
        "pass an instance",
    ),
    "a pruner of a typo": (
        {"customized_pruners": {"frist": tp.pruner.function.LinearPruner()}},
        TargetError,
        "did you mean 'first'",
    ),
    "a ratio in percent": ({"pruning_ratio": "50%"}, ConfigError, "pruning_ratio = '50%'"),
    "a ratio that is a switch": ({"pruning_ratio": True}, ConfigError, "pruning_ratio = True"),
    "a ratio that is NaN": ({"pruning_ratio": float("nan")}, ConfigError, "pruning_ratio = nan"),
    "a ratio above 1": ({"pruning_ratio": 1.5}, ConfigError, "pruning_ratio = 1.5"),
    "no ratio": ({"pruning_ratio": None}, ConfigError, "pruning_ratio = None"),
    "a limit that is NaN": ({"max_pruning_ratio": float("nan")}, ConfigError, "max_pruning_ratio = nan"),
    "no limit": ({"max_pruning_ratio": None}, ConfigError, "max_pruning_ratio = None"),
    "steps below 0": ({"iterative_steps": -1}, ConfigError, "iterative_steps = -1"),
    "half steps": ({"iterative_steps": 2.5}, ConfigError, "iterative_steps = 2.5"),
    "steps that are a switch": ({"iterative_steps": True}, ConfigError, "iterative_steps = True"),
    "no steps": ({"iterative_steps": None}, ConfigError, "iterative_steps = None"),
    "rounding to 0": ({"round_to": 0}, ConfigError, "round_to = 0"),
    "rounding to text": ({"round_to": "8"}, ConfigError, "round_to = '8'"),
    "a switch as text": ({"global_pruning": "false"}, ConfigError, "global_pruning = 'false'"),
    "a schedule by name": ({"iterative_pruning_ratio_scheduler": "cubic"}, ConfigError, "must be a function"),
    "a schedule that is too short": (
        {"iterative_pruning_ratio_scheduler": lambda ratio, steps: [ratio] * steps},
        ConfigError,
        "must be a list of 2 ratios",
    ),
    "a schedule that removes all": (
        {"iterative_pruning_ratio_scheduler": lambda ratio, steps: [0.0, 1.0]},
        ConfigError,
        "must be a list of 2 ratios",
    ),
    "a measure by name": ({"importance": "magnitude"}, ConfigError, "importance = 'magnitude': must be a function"),
    "the graph's own argument": ({"DG": None}, ConfigError, "'DG' is unknown"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_torch_pruning_would_ignore_or_stumble_over_is_refused(case):
    arguments, error, message = WRONG[case]
    net = Net()
    with pytest.raises(error, match=message):
        pruned(net, **arguments)
    assert [net.first.out_features, net.second.out_features] == [16, 8]
    assert list(net._modules) == ["first", "second", "head"]


def test_a_layer_has_one_ratio():
    net = Net()
    with pytest.raises(ConfigError, match="one Linear is given twice"):
        pruned(net, pruning_ratio_dict={"first": 0.25, net.first: 0.5})
