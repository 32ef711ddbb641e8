"""`gumbel_nni.speedup` for the masks of NNI's own pruners: the small model is what the wrapped one was."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nni.compression.pruning import (
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    MovementPruner,
    SlimPruner,
    TaylorPruner,
)
from nni.compression.speedup import ModelSpeedup
from torch import Tensor, nn

import gumbel_nni
from gumbel_nni.any_masks import Backend
from gumbel_nni.compat.exact_speedup import column_masks
from gumbel_plugin.errors import ConfigError, DataError
from gumbel_plugin.layers.geometry import input_channels, read_channels
from gumbel_plugin.shrinking.mask_file import save_masks
from gumbel_plugin.shrinking.shrink import masked_copy
from tests.gumbel_nni.helpers import Masks, evaluator_of, size

BACKENDS: tuple[Backend, ...] = ("torch_pruning", "nni")
NETWORKS = ("conv_bn_relu", "residual", "depthwise", "concat", "squeeze_excite", "sigmoid", "grouped", "flatten_linear")


def trained(cls: type, **arguments: int) -> Callable[..., Any]:
    return lambda model, rules, inputs: cls(model, rules, evaluator_of(model, inputs), **arguments)


PRUNERS: dict[str, Callable[..., Any]] = {
    "level": lambda model, rules, inputs: LevelPruner(model, rules),
    "l1norm": lambda model, rules, inputs: L1NormPruner(model, rules),
    "l2norm": lambda model, rules, inputs: L2NormPruner(model, rules),
    "fpgm": lambda model, rules, inputs: FPGMPruner(model, rules),
    "taylor": trained(TaylorPruner, training_steps=3),
    "slim": trained(SlimPruner, training_steps=3),
    "movement": trained(MovementPruner, warmup_step=1, cooldown_begin_step=3),
}


def prune(name: str, model: nn.Module, inputs: Tensor, rules: list[dict[str, Any]]) -> tuple[Masks, Tensor]:
    """Prune a model with one of NNI's pruners; return the masks, and what the wrapped model computed."""
    pruner = PRUNERS[name](model, rules, inputs)
    pruner.compress(*((3, None) if name == "movement" else ()))
    training = model.training
    expected = model.eval()(inputs).detach()
    model.train(training)
    pruner.unwrap_model()
    return pruner.get_masks(), expected


def hidden_layers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))][:-1]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network_name", NETWORKS)
@pytest.mark.parametrize("name", PRUNERS)
def test_the_small_model_is_the_wrapped_one(
    name: str, network_name: str, backend: Backend, make_network: Callable[..., Any]
) -> None:
    network = make_network(network_name)
    rules = [{"op_names": hidden_layers(network.model), "sparse_ratio": 0.6}]
    masks, expected = prune(name, network.model, network.inputs, rules)
    small = gumbel_nni.speedup(network.model, masks, network.inputs, backend=backend)
    torch.testing.assert_close(small.eval()(network.inputs), expected, rtol=1e-4, atol=1e-5)
    if name != "level" and network_name != "squeeze_excite":  # whose channels are multiplied by something open
        assert size(small) < size(network.model)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "level"])
def test_tied_residual_channels_leave(name: str, backend: Backend, make_network: Callable[..., Any]) -> None:
    network = make_network("residual")
    rules = [
        {"op_names": ["conv1", "conv3"], "sparse_ratio": 0.5, "dependency_group_id": 0},
        {"op_names": ["conv2"], "sparse_ratio": 0.5},
    ]
    masks, expected = prune(name, network.model, network.inputs, rules)
    small = gumbel_nni.speedup(network.model, masks, network.inputs, backend=backend)
    torch.testing.assert_close(small.eval()(network.inputs), expected, rtol=1e-4, atol=1e-5)
    assert (small.conv1.out_channels, small.conv2.out_channels) <= (4, 5), "half, and one that carries constants"


def test_slims_batch_norm_scales_shrink_the_network(make_network: Callable[..., Any]) -> None:
    network = make_network("residual")
    rules = [
        {"op_names": ["bn1", "bn3"], "sparse_ratio": 0.5, "dependency_group_id": 0},
        {"op_names": ["bn2"], "sparse_ratio": 0.5},
    ]
    masks, expected = prune("slim", network.model, network.inputs, rules)
    assert set(masks) == {"bn1", "bn2", "bn3"}
    nnis = copy.deepcopy(network.model)
    ModelSpeedup(nnis, network.inputs, copy.deepcopy(masks)).speedup_model()
    assert size(nnis) == size(network.model), "NNI removes nothing"
    small = gumbel_nni.speedup(network.model, masks, network.inputs)
    torch.testing.assert_close(small.eval()(network.inputs), expected, rtol=1e-4, atol=1e-5)
    assert (small.conv1.out_channels, small.conv2.out_channels, small.conv3.out_channels) == (3, 4, 3)


def test_nnis_own_result_is_another_network(make_network: Callable[..., Any]) -> None:
    """The reason for all this; if it fails, NNI has a new release."""
    network = make_network("sigmoid")
    masks, expected = prune("l1norm", network.model, network.inputs, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    nnis = copy.deepcopy(network.model)
    ModelSpeedup(nnis, network.inputs, copy.deepcopy(masks)).speedup_model()
    assert float((nnis.eval()(network.inputs) - expected).detach().abs().max()) > 1e-2
    small = gumbel_nni.speedup(network.model, masks, network.inputs)
    torch.testing.assert_close(small.eval()(network.inputs), expected, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_callers_changes(
    make_network: Callable[..., Any], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    network = make_network("residual")
    model = network.model
    masks, _ = prune("l1norm", model, network.inputs, [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.5}])
    model.train()
    model.bn2.eval()
    model.conv1.weight.requires_grad_(False)
    before, given = copy.deepcopy(model.state_dict()), copy.deepcopy(masks)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        small = gumbel_nni.speedup(model, masks, network.inputs)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(masks, given, rtol=0, atol=0)
    assert [module.training for module in small.modules()] == [module.training for module in model.modules()]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]


def test_fine_grained_zeros_do_not_revive(make_network: Callable[..., Any]) -> None:
    network = make_network("no_bn")
    masks, _ = prune("level", network.model, network.inputs, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    small = gumbel_nni.speedup(network.model, masks, network.inputs)
    masked = masked_copy(network.model, masks)
    for name in masks:
        assert int((small.get_submodule(name).weight == 0).sum()) == int((masked.get_submodule(name).weight == 0).sum())


def test_masks_may_lie_in_a_file(make_network: Callable[..., Any], tmp_path: Path) -> None:
    network = make_network("no_bn")
    masks, expected = prune("l1norm", network.model, network.inputs, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    save_masks(tmp_path / "masks.safetensors", masks, "no_bn")
    small = gumbel_nni.speedup(network.model, tmp_path / "masks.safetensors", network.inputs)
    torch.testing.assert_close(small(network.inputs), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="nowhere"):
        gumbel_nni.speedup(network.model, str(tmp_path / "nowhere"), network.inputs)


def test_an_unknown_backend(make_network: Callable[..., Any]) -> None:
    network = make_network("no_bn")
    with pytest.raises(ConfigError, match="'npi' is unknown; did you mean 'nni'"):
        gumbel_nni.speedup(network.model, {}, network.inputs, backend="npi")


class Attention(nn.Module):
    """Two heads of three channels, projected by separate layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 2, 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class TestNothingCanLeave:
    """A warning names the layers and the reasons; the network that is returned computes what the masked one does."""

    def rows_of(self, layer: nn.Module, closed: list[int]) -> dict[str, Tensor]:
        masks = {"weight": torch.ones_like(layer.weight), "bias": torch.ones_like(layer.bias)}
        for mask in masks.values():
            mask[closed] = 0
        return masks

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_rows_without_whole_heads(self, backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
        torch.manual_seed(0)
        model, x = Attention(), torch.randn(2, 5, 6)
        masks = {name: self.rows_of(getattr(model, name), [0, 4]) for name in ("q", "k", "v")}
        small = gumbel_nni.speedup(model, masks, x, backend=backend)
        assert size(small) == size(model)
        assert len(caplog.messages) == 1
        assert "'q', 'k', 'v'" in caplog.text

    def test_fine_grained_masks(self, make_network: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
        network = make_network("no_bn")
        masks, _ = prune("level", network.model, network.inputs, [{"op_names": ["0"], "sparse_ratio": 0.5}])
        gumbel_nni.speedup(network.model, masks, network.inputs)
        (message,) = caplog.messages
        assert "'0': the mask closes no whole channel" in message

    def test_channels_that_other_layers_fill(
        self, make_network: Callable[..., Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        network = make_network("residual")
        masks, _ = prune("l1norm", network.model, network.inputs, [{"op_names": ["conv3"], "sparse_ratio": 0.5}])
        small = gumbel_nni.speedup(network.model, masks, network.inputs)
        assert size(small) >= size(network.model)
        (message,) = caplog.messages
        assert "'conv3': the layers that read its closed channels need them" in message

    def test_the_networks_outputs(self, make_network: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
        network = make_network("residual")
        masks, _ = prune("l1norm", network.model, network.inputs, [{"op_names": ["head"], "sparse_ratio": 0.5}])
        gumbel_nni.speedup(network.model, masks, network.inputs)
        (message,) = caplog.messages
        assert "'head'" in message
        assert "output" in message

    def test_open_masks_are_no_warning(
        self, make_network: Callable[..., Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        network = make_network("no_bn")
        gumbel_nni.speedup(network.model, {"0": {"weight": torch.ones_like(network.model[0].weight)}}, network.inputs)
        assert caplog.messages == []

    def test_a_pruners_own_speedup(self, make_network: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
        network = make_network("no_bn")
        rules = [{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": "element"}]
        pruner = gumbel_nni.GumbelPruner(network.model, rules, example_inputs=network.inputs)
        mask = torch.ones_like(network.model[0].weight)
        mask[:2, 0] = 0
        pruner.update_masks({"0": {"weight": mask}})
        pruner.speedup()
        (message,) = caplog.messages
        assert "'0': the mask closes no whole channel" in message


def test_column_masks_close_the_inputs_of_the_readers(network: Any) -> None:
    groups = network.groups()
    dead = {name: torch.tensor([0, group.size - 1]) for name, group in groups.items()}
    masks = column_masks(network.model, list(groups.values()), dead)
    assert set(masks) == {part.module for group in groups.values() for part in group.consumers}
    for name, mask in masks.items():
        layer = network.model.get_submodule(name)
        assert mask.shape == layer.weight.shape
        with torch.no_grad():
            layer.weight.fill_(1.0).mul_(mask)
        closed = torch.zeros(input_channels(layer), dtype=torch.bool)
        for group in groups.values():
            for part in group.consumers:
                if part.module == name:
                    closed[part.positions[torch.isin(part.units, dead[group.name])]] = True
        assert torch.equal(read_channels(layer), ~closed)
    assert column_masks(network.model, list(groups.values()), {}) == {}
