"""Repairs of NNI's pruners and quantizers: each breakage is shown first, with the repair undone, and then repaired."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from nni.compression import TorchEvaluator
from nni.compression.base import apply_method
from nni.compression.base import config as nni_config
from nni.compression.base.compressor import Compressor, Pruner
from nni.compression.base.target_space import TargetType
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.pruning import L1NormPruner, LevelPruner, SlimPruner, TaylorPruner
from nni.compression.pruning.basic_pruner import _NormPruner
from nni.compression.pruning.tools import sparse_gen
from torch import Tensor, nn

from gumbel_nni.compat import stacking, training_length
from gumbel_nni.compat.patching import innermost
from gumbel_plugin.errors import ConfigError
from tests.gumbel_nni.helpers import evaluator_of, without

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def trainer_of(model: nn.Module) -> TorchEvaluator:
    return evaluator_of(model, X, optimizer=torch.optim.SGD, lr=0.1)


def rules(layer: str, ratio: float = 0.5) -> list[dict[str, Any]]:
    return [{"op_names": [layer], "sparse_ratio": ratio}]


def two_on_one_layer() -> tuple[Pruner, Pruner, nn.Module]:
    model = network()
    evaluator = trainer_of(model)
    first = L1NormPruner(model, rules("0"))
    first.compress()
    second = TaylorPruner.from_compressor(first, rules("0", 0.25), training_steps=2, evaluator=evaluator)
    second.compress(2, None)
    return first, second, model


def test_two_pruners_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as undo:
        without(undo, ModuleWrapper, "extend_target_spaces", "_apply_mask_helper")
        without(undo, Pruner, "get_masks", "update_masks")
        _, second, _ = two_on_one_layer()
        assert second._target_spaces["0"] == {}, "the second pruner's settings are dropped"
    first, second, model = two_on_one_layer()
    own = [pruner._target_spaces["0"]["weight"].mask.expand(8, 6) for pruner in (first, second)]
    assert [float(mask.mean()) for mask in own] == [0.5, 0.75]
    for pruner in (first, second):
        assert torch.equal(pruner.get_masks()["0"]["weight"].expand(8, 6), own[0] * own[1])
    weight, bias = model[0]._nni_wrapper.weight, model[0]._nni_wrapper.bias
    expected = nn.functional.linear(X, weight * own[0] * own[1], bias * (own[0] * own[1])[:, 0])
    torch.testing.assert_close(model[0](X), expected)
    second.update_masks(second.get_masks())
    assert torch.equal(first._target_spaces["0"]["weight"].mask.expand(8, 6), own[0]), "the first one's is left alone"


def test_hidden_spaces_are_not_reported() -> None:
    model = network()
    pruner = L1NormPruner(model, rules("0"))
    wrapper = pruner._module_wrappers["0"]
    space = stacking.add_space(wrapper, "weight", {"sparse_ratio": None})
    space.mask = torch.zeros(8, 6)
    assert not pruner.get_masks()["0"]["weight"].any()
    stacking.hide(space)
    assert pruner.get_masks()["0"]["weight"].all()
    torch.testing.assert_close(model[0](X), wrapper.bias.expand(16, 8)), "it acts all the same"


def test_masks_of_unknown_modules_are_ignored(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    pruner = L1NormPruner(network(), rules("0"))
    masks = {"elsewhere": {"weight": torch.zeros(1)}, "0": {"weight": torch.zeros(8, 1)}}
    with monkeypatch.context() as undo:
        without(undo, Pruner, "update_masks")
        with pytest.raises(KeyError, match="elsewhere"):
            pruner.update_masks(masks)
    pruner.update_masks(masks)
    assert not pruner.get_masks()["0"]["weight"].any()
    assert "masks of elsewhere are ignored: this pruner does not wrap it" in caplog.messages


def test_slim_factors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> tuple[SlimPruner, nn.Module]:
        model = network()
        pruner = SlimPruner(model, rules("0"), trainer_of(model), training_steps=5)
        pruner.compress()
        return pruner, model

    def masked(model: nn.Module, pruner: SlimPruner) -> Tensor:
        masks = pruner.get_masks()["0"]
        weight, bias = (masks[name].expand_as(getattr(model[0], name)) for name in ("weight", "bias"))
        return model[2](torch.tanh(nn.functional.linear(X, model[0].weight * weight, model[0].bias * bias)))

    with monkeypatch.context() as undo:
        without(undo, ModuleWrapper, "unwrap")
        pruner, model = trained()
        expected = model(X)
        pruner.unwrap_model()
        assert float((masked(model, pruner) - expected).detach().abs().max()) > 1e-3
    pruner, model = trained()
    expected = model(X)
    pruner.unwrap_model()
    torch.testing.assert_close(masked(model, pruner), expected)
    pruner.wrap_model()
    torch.testing.assert_close(model(X), expected)


def test_biases_of_batch_norms_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    def masks() -> dict[str, Tensor]:
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        rules = [{"op_types": ["BatchNorm1d", "Linear"], "exclude_op_names": ["2"], "sparse_ratio": 0.5}]
        pruner = SlimPruner(model, rules, trainer_of(model), training_steps=2)
        found = pruner.compress()[1]
        assert torch.equal(found["0"]["bias"], found["0"]["weight"].flatten(1)[:, 0])
        return found["1"]

    with monkeypatch.context() as undo:
        without(undo, sparse_gen, "_generate_align_sparsity")
        assert bool(masks()["bias"].all())
    found = masks()
    assert torch.equal(found["bias"], found["weight"])
    assert float(found["bias"].mean()) == 0.5


@pytest.mark.parametrize("cls", [LevelPruner, L1NormPruner])
def test_norm_pruners_prune_in_a_fusion(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def fused() -> Tensor:
        model = network()
        first = TaylorPruner(model, rules("2"), trainer_of(model), training_steps=2)
        masks: Tensor = cls.from_compressor(first, rules("0")).compress(2, None)[1]["0"]["weight"]
        return masks.mean()

    with monkeypatch.context() as undo:
        without(undo, _NormPruner, "_fuse_preprocess")
        assert fused() == 1.0
    assert fused() == 0.5


def test_norm_pruners_do_not_prune_twice_or_beside_a_schedule() -> None:
    model = network()
    pruner = L1NormPruner(model, rules("0"), trainer_of(model))
    pruner.compress()
    before = pruner.get_masks()["0"]["weight"]
    pruner._module_wrappers["0"].weight.data = pruner._module_wrappers["0"].weight.flip(0)
    TaylorPruner.from_compressor(pruner, rules("2"), training_steps=2).compress(2, None)
    assert torch.equal(pruner.get_masks()["0"]["weight"], before)
    model = network()
    pruner = L1NormPruner(model, rules("0"), trainer_of(model))
    pruner.interval_steps = 5
    TaylorPruner.from_compressor(pruner, rules("2"), training_steps=2).compress(2, None)
    assert bool(pruner.get_masks()["0"]["weight"].all()), "step 5 was not reached"


def test_layers_survive_unwrapping(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwrapped() -> tuple[nn.Module, list[nn.Parameter]]:
        model = network()
        before = list(model.parameters())
        pruner = L1NormPruner(model, [{**rules("0")[0], "target_names": ["weight"]}])
        with torch.no_grad():
            pruner._module_wrappers["0"].weight.fill_(3.0)
        pruner._module_wrappers["0"].weight.requires_grad_(False)
        pruner.unwrap_model()
        return model, before

    with monkeypatch.context() as undo:
        without(undo, ModuleWrapper, "wrap", "unwrap")
        model, before = unwrapped()
        assert model[0].weight is not before[0]
        assert [name for name, _ in model.named_parameters()][:2] == ["0.bias", "0.weight"]
        assert "forward" in vars(model[0])
    model, before = unwrapped()
    assert all(new is old for new, old in zip(model.parameters(), before, strict=True))
    assert bool((model[0].weight == 3.0).all())
    assert not model[0].weight.requires_grad
    assert "forward" not in vars(model[0])
    assert copy.deepcopy(model)[0].forward.__self__ is not model[0]


def test_all_compressors_of_a_fusion_know_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[tuple[int | None, int | None]] = []

    class Curious(TaylorPruner):
        def _fuse_preprocess(self, evaluator: TorchEvaluator) -> None:
            known.append(training_length.planned_length(evaluator))
            super()._fuse_preprocess(evaluator)

    def train() -> None:
        model = network()
        curious = Curious(model, rules("0"), trainer_of(model), training_steps=2)
        TaylorPruner.from_compressor(curious, rules("2"), training_steps=2).compress(3, None)

    with monkeypatch.context() as undo:
        without(undo, Compressor, "_fusion_compress")
        train()
    train()
    assert known == [(None, None), (3, None)]


@pytest.mark.parametrize("name", ["QATClampRound", "BNNClampRound"])
def test_gradients_of_quantized_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Space:
        _scaler, zero_point, scale, qmin, qmax = None, torch.zeros(()), torch.ones(()), -1, 1
        type = TargetType.OUTPUT

    function = getattr(apply_method, name)
    x = torch.tensor([-3.0, 0.4, 2.0], requires_grad=True)
    weights = torch.ones(3)

    def gradient() -> Tensor:
        (result,) = torch.autograd.grad(function.apply(x, Space()), x, weights)
        return result

    with monkeypatch.context() as undo, warnings.catch_warnings():
        warnings.simplefilter("error")
        undo.setattr(function, "backward", staticmethod(innermost(function.backward)))
        with pytest.raises(DeprecationWarning, match="saved_variables"):
            gradient()
        warnings.simplefilter("ignore")
        assert gradient().tolist() == [0.0, 1.0, 0.0]
        assert weights.tolist() == [0.0, 1.0, 0.0], "NNI wrote into what it was given"
    weights = torch.ones(3)
    assert gradient().tolist() == [0.0, 1.0, 0.0]
    assert weights.tolist() == [1.0, 1.0, 1.0]


def test_old_config_lists_may_share_a_budget() -> None:
    old = [{"op_names": ["0", "2"], "total_sparsity": 0.5}]
    translate = nni_config.trans_legacy_config_list.__wrapped__
    with pytest.raises(ConfigError, match="Wrong key 'group_id'"):
        L1NormPruner(network(), translate(old))
    masks = LevelPruner(network(), old).compress()[1]
    assert sum(float((masks[name]["weight"] == 0).sum()) for name in masks) == 0.5 * (48 + 32)
    assert old == [{"op_names": ["0", "2"], "total_sparsity": 0.5}]


def test_fused_kernels_do_not_read_past_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def outputs() -> tuple[Tensor, Tensor, nn.Module, L1NormPruner]:
        torch.manual_seed(0)
        model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(4, 6, 8)
        with torch.no_grad():
            dense = model(x)
            pruner = L1NormPruner(model, [{"op_names": ["linear1"], "sparse_ratio": 0.5}])
            pruner.compress()
            return dense, model(x), model, pruner

    with monkeypatch.context() as undo:
        without(undo, ModuleWrapper, "wrap", "unwrap")
        dense, masked, *_ = outputs()
        torch.testing.assert_close(masked, dense)  # as if nothing was masked
    dense, masked, model, pruner = outputs()
    assert float((masked - dense).abs().max()) > 1e-3
    pruner.unwrap_model()
    assert not any(module._forward_pre_hooks for module in model.modules())
