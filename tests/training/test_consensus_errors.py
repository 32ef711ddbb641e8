"""What gates of samples cannot do, said before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.config import PruningConfig
from gumbel_plugin.errors import ConfigError, TargetError
from gumbel_plugin.graph.channel_groups import ChannelGroup, ChannelSlice
from gumbel_plugin.runs.models import CifarResNet
from gumbel_plugin.training.plan import Plan
from gumbel_plugin.training.session import MaskingSession

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def resnet() -> CifarResNet:
    return CifarResNet(2)


def block_session(model: nn.Module, ratio: float = 0.5, example: Tensor | None = IMAGES, **keys: Any) -> MaskingSession:
    options = {"unit": "block", **keys.pop("options", {})}
    entry = {"op_types": ["ResidualBlock"], "sparse_ratio": ratio, **keys.pop("entry", {})}
    pruning = {"method": "consensus", "options": options, "config_list": [entry], **keys}
    return MaskingSession(model, PruningConfig.load({"pruning": pruning}).pruning, example_inputs=example)


def test_down_sampling_blocks_are_never_gated() -> None:
    for shortcut in ("conv", "pad"):
        model = CifarResNet(2, shortcut=shortcut)
        assert not {"stage2.0", "stage3.0"} & set(block_session(model, example=IMAGES).plan.masks)


@pytest.mark.parametrize("entry", [{"op_types": ["Linear"]}, {"op_names": ["0"]}, {"op_names_re": [".*"]}])
def test_a_network_without_residual_blocks_has_none_to_gate(entry: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"options\.unit 'block': none of the modules.*'0': it has no layers inside"):
        block_session(nn.Sequential(nn.Linear(2, 2)), example=None, entry={"op_types": None, **entry})


@pytest.mark.parametrize(
    ("key", "value"),
    [("granularity", "element"), ("max_sparse_ratio", 0.5), ("min_sparse_ratio", 0.5), ("dependency_group_id", 1)],
)
def test_a_block_has_one_gate(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}: residual blocks"):
        block_session(resnet(), entry={key: value})


def test_channels_need_a_channel_granularity(section: Any, make_network: Any) -> None:
    network = make_network("no_bn")
    config = section(network.model, method="consensus", sparse_ratio=0.5, granularity="element")
    with pytest.raises(ConfigError, match=r"granularity.*method 'consensus'"):
        MaskingSession(network.model, config)


def test_a_budget_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"sparse_ratio.*is missing: method 'consensus'"):
        block_session(resnet(), entry={"sparse_ratio": None})


@pytest.mark.parametrize("rescale", ["learned", "dynamic"])
def test_weights_are_not_rescaled(rescale: str) -> None:
    with pytest.raises(ConfigError, match=f"rescale '{rescale}'.*method 'consensus'"):
        block_session(resnet(), rescale=rescale)


def test_channel_groups_are_no_blocks(make_network: Any) -> None:
    network = make_network("residual")
    pruning = {"method": "consensus", "options": {"unit": "block"}, "config_list": [{"op_types": ["Conv2d"]}]}
    plan = Plan(network.model, PruningConfig.load({"pruning": pruning}).pruning, 0)
    with pytest.raises(ConfigError, match=r"options\.unit 'block'"):
        plan.gate_group(next(iter(network.groups().values())))


def test_a_layer_that_is_never_called_cannot_gate_samples() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.add_module("attention", nn.MultiheadAttention(4, 2))
    pruning = PruningConfig.load({"pruning": {"method": "consensus", "config_list": [{"op_types": ["Linear"]}]}})
    plan = Plan(model, pruning.pruning, 0)
    every = torch.arange(4)
    consumers = (ChannelSlice("attention.out_proj", every, every),)
    plan.gate_group(ChannelGroup("0", 4, (ChannelSlice("0", every, every),), consumers))
    with pytest.raises(TargetError, match=r"'attention\.out_proj' is never called"):
        plan.finish([])
