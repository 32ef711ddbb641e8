"""What bad input gets: messages that name which entry, which layer, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nni
import pytest
import torch
from nni.compression import TorchEvaluator
from nni.compression.base.compressor import Compressor
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.pruning import L1NormPruner
from nni.compression.quantization import QATQuantizer
from nni.compression.utils import evaluator as evaluators
from nni.compression.utils.constructor_helper import LRSchedulerConstructHelper, OptimizerConstructHelper
from schema import SchemaError
from torch import nn

import gumbel_nni
from gumbel_nni.compat.messages import complaints
from gumbel_plugin import GumbelPruner
from gumbel_plugin.errors import ConfigError, LifecycleError, TargetError
from gumbel_plugin.shrinking.shrink import shrink
from tests.gumbel_nni.helpers import without

X = torch.randn(2, 6)
GOOD = {"op_names": ["0"], "sparse_ratio": 0.5}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))


def evaluator(optimizers: Any, schedulers: Any = None) -> TorchEvaluator:
    return TorchEvaluator(lambda *_: None, optimizers, lambda *_: torch.zeros(()), schedulers)


@pytest.mark.parametrize(
    ("entry", "nnis"),
    [
        ({"op_names": ["3"], "sparsity": 0.5}, "Wrong key 'sparsity'"),
        ({"op_names": ["3"], "sparse_ratio": "half"}, "'half' should be instance of 'float'"),
        ({"sparse_ratio": 0.5}, "Missing key"),
    ],
)
def test_a_config_list_that_nni_rejects(entry: dict[str, Any], nnis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [GOOD, entry]
    with monkeypatch.context() as undo:
        without(undo, Compressor, "_validate_config")
        with pytest.raises(SchemaError, match=nnis):
            L1NormPruner(network(), entries)
    with pytest.raises(ConfigError, match=rf"config_list\[1\]: .*{nnis}") as theirs:
        L1NormPruner(network(), entries)
    with pytest.raises(ConfigError, match=rf"config_list\.1.*NNI: config_list\[1\]: .*{nnis}") as ours:
        GumbelPruner(network(), entries, example_inputs=X)
    assert "\n" not in str(theirs.value) + str(ours.value)
    assert complaints([GOOD]) == []


class TestOptimizers:
    def test_one_that_was_not_traced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        optimizer = torch.optim.Adam(network().parameters(), lr=0.01)
        with monkeypatch.context() as undo:
            without(undo, TorchEvaluator, "__init__")
            with pytest.raises(AssertionError) as nnis:
                evaluator(optimizer)
            assert str(nnis.value) == ""
        line = r"write: optimizer = nni\.trace\(torch\.optim\.Adam\)\(model\.parameters\(\), lr=0\.01\)"
        for optimizers in (optimizer, [optimizer]):
            with pytest.raises(ConfigError, match=line):
                evaluator(optimizers)

    def test_a_scheduler_that_was_not_traced(self) -> None:
        optimizer = nni.trace(torch.optim.SGD)(network().parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        line = r"write: scheduler = nni\.trace\(torch\.optim\.lr_scheduler\.StepLR\)\(optimizer, \.\.\.\)"
        with pytest.raises(ConfigError, match=line):
            evaluator(optimizer, scheduler)
        with pytest.raises(ConfigError, match=line):
            LRSchedulerConstructHelper.from_trace(scheduler)

    def test_what_configure_optimizers_returns(self) -> None:
        model = network()
        with pytest.raises(ConfigError, match=r"nni\.trace"):
            OptimizerConstructHelper.from_trace(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def test_a_trainers_own_is_not_replaced_in_silence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Trainer:
            optimizer, lr_scheduler = torch.optim.SGD(network().parameters(), lr=0.1), None

        trainer = nni.trace(Trainer)()
        with monkeypatch.context() as undo:
            without(undo, evaluators.TransformersEvaluator, "__init__")
            evaluators.TransformersEvaluator(trainer)
        with pytest.raises(ConfigError, match=r"nni\.trace\(torch\.optim\.SGD\)"):
            evaluators.TransformersEvaluator(trainer)

    @pytest.mark.parametrize("groups", [False, True])
    def test_of_a_wrapped_model(self, groups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        def used() -> Any:
            model = network()
            first = L1NormPruner(model, [GOOD])
            params = [{"params": model.parameters()}] if groups else model.parameters()
            made = evaluator(nni.trace(torch.optim.SGD)(params, lr=0.1))
            first.unwrap_model()
            made._init_optimizer_helpers(model)
            return made._optimizer_helpers[0]

        with monkeypatch.context() as undo:
            without(undo, OptimizerConstructHelper, "params2names")
            (names,) = used().kwargs.get("params") or used().args[0]
            assert names["params"] == ["1.weight", "1.bias", "3.weight", "3.bias"], "the wrapped layer is not trained"
        with pytest.raises(ConfigError, match=r"2 of the optimizer's parameters .*unwrap_model\(\)"):
            used()


def test_layer_types_that_a_quantizer_or_a_pruner_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = [{"op_names": ["1"], "target_names": ["_output_"], "quant_dtype": "int8"}]
    activation = [{"op_names": ["2"], "sparse_ratio": 0.5}]
    model = network()
    made = evaluator(nni.trace(torch.optim.SGD)(model.parameters(), lr=0.1))
    with monkeypatch.context() as undo:
        without(undo, ModuleWrapper, "extend_target_spaces")
        with pytest.raises(AssertionError, match="LayerNorm is not registered"):
            QATQuantizer(model, norm, made)
    gumbel = GumbelPruner(model, [{**GOOD, "granularity": "element"}])
    message = r"'1' is a LayerNorm: quantization does not take this layer type, pruning does not either; both take .*"
    with pytest.raises(TargetError, match=message + "Linear"):
        QATQuantizer.from_compressor(gumbel, norm, evaluator=made)
    with pytest.raises(TargetError, match="'2' is a ReLU: pruning does not take this layer type, quantization does;"):
        L1NormPruner(network(), activation)
    with pytest.raises(TargetError, match="'2' is a ReLU, which has no weight to mask"):
        GumbelPruner(network(), activation, example_inputs=X)


PLAIN_ONES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "GumbelPruner": lambda model, masks: GumbelPruner(model, [GOOD], example_inputs=X),
    "shrinking": lambda model, masks: shrink(model, masks, X),
    "speedup": lambda model, masks: gumbel_nni.speedup(model, masks, X),
}


@pytest.mark.parametrize("use", PLAIN_ONES)
def test_a_wrapped_model_where_a_plain_one_is_needed(use: str) -> None:
    model = network()
    pruner = L1NormPruner(model, [GOOD])
    for masks in (pruner.get_masks(), pruner.compress()[1]):
        with pytest.raises(LifecycleError, match=rf"{use} needs a plain model, but '0' is wrapped .*unwrap_model\(\)"):
            PLAIN_ONES[use](model, masks)
