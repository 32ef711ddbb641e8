"""Models that keep tensors of their forward, such as caches of attention biases: tracing leaves nothing behind."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin import GumbelGroupPruner, verify_equivalence
from gumbel_plugin.errors import GraphError
from gumbel_plugin.layers.kept_tensors import forgetting_tensors, kept_tensors
from gumbel_torch_pruning import find_groups
from tests.graph.exact_steps import exact_step

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Cached(nn.Module):
    """A residual block with a bias that is computed once in eval mode; subclasses say where it is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.table = nn.Linear(8, 32), nn.Linear(32, 8), nn.Parameter(torch.randn(1, 8))
        self.start()

    def start(self) -> None:
        """Begin without."""

    def lookup(self, bias: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table[:, torch.arange(8)]
        return x + self.fc2(self.fc1(x).relu()) + (bias if self.training else self.lookup(bias))


class InDictionary(Cached):
    def start(self) -> None:
        self.cache: dict[Any, Any] = {}

    def lookup(self, bias: Tensor) -> Tensor:
        return self.cache.setdefault("cpu", bias)


class InNestedDictionary(Cached):
    def start(self) -> None:
        self.cache: dict[Any, Any] = {"sizes": {}}

    def lookup(self, bias: Tensor) -> Tensor:
        return self.cache["sizes"].setdefault(8, [bias])[0]


class InAttribute(Cached):
    def start(self) -> None:
        self.cached, self.size = None, 0

    def lookup(self, bias: Tensor) -> Tensor:
        if self.size != 8:
            self.cached, self.size = bias, 8
        assert self.cached is not None
        return self.cached


class InNewAttribute(Cached):
    def lookup(self, bias: Tensor) -> Tensor:
        if not hasattr(self, "cached"):
            self.cached = bias
        return self.cached


class InList(Cached):
    def start(self) -> None:
        self.cache: list[Tensor] = []

    def lookup(self, bias: Tensor) -> Tensor:
        self.cache.append(bias)
        return self.cache[0]


class InBuffer(Cached):
    def start(self) -> None:
        self.register_buffer("cached", None, persistent=False)

    def lookup(self, bias: Tensor) -> Tensor:
        if self.cached is None:
            self.cached = bias
        return self.cached


class InObject(Cached):
    def start(self) -> None:
        self.cache = SimpleNamespace(bias=None)

    def lookup(self, bias: Tensor) -> Tensor:
        if self.cache.bias is None:
            self.cache.bias = bias
        return self.cache.bias


PLACES = (InDictionary, InNestedDictionary, InAttribute, InNewAttribute, InList, InBuffer, InObject)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")  # Torch-Pruning's
@pytest.mark.parametrize("place", PLACES)
class TestCaches:
    @pytest.mark.parametrize("training", [True, False])
    def test_the_model_is_pruned_exactly_and_keeps_nothing(self, place: type[Cached], training: bool) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(place(), nn.Linear(8, 3)).train(training)
        pruner = GumbelGroupPruner(model, X, pruning_ratio=0.5, ignored_layers=[model[1]])
        assert {group.name: group.safety for group in pruner.groups()}["0.fc1"] == "exact"
        self._is_clean(model)
        copy.deepcopy(model)
        exact_step(pruner, X)
        assert model[0].fc1.out_features < 32
        self._is_clean(model)

    def test_what_is_outdated_is_not_used_later(self, place: type[Cached]) -> None:
        model = nn.Sequential(place(), nn.Linear(8, 3))
        find_groups(model, X)
        pruner = GumbelGroupPruner(model, X, pruning_ratio=0.5, ignored_layers=[model[1]])
        with torch.no_grad():
            model[0].table.fill_(5.0)
        pruner.step()
        training = model.train()(X)
        torch.testing.assert_close(model.eval()(X), training)

    def test_both_precisions_are_compared(self, place: type[Cached]) -> None:
        model = nn.Sequential(place(), nn.Linear(8, 3)).eval()
        verify_equivalence(model, copy.deepcopy(model), X).raise_for_failure()
        self._is_clean(model)
        assert model(X).dtype == torch.float32

    def _is_clean(self, model: nn.Module) -> None:
        kept = [tensor for module in model.modules() for name, tensor in kept_tensors(module) if "cache" in name]
        assert not kept
        assert model[0]._buffers.get("cached") is None


def test_a_cache_that_was_filled_before_is_named() -> None:
    model = nn.Sequential(InDictionary(), nn.Linear(8, 3)).eval()
    model(X)
    with pytest.raises(GraphError, match=r"'0\.cache' is a tensor computed from others"):
        find_groups(model, X)


def test_modules_that_complete_themselves_stay_complete() -> None:
    class Late(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "inside"):
                self.inside, self.scale = nn.Linear(8, 8), torch.ones(8)
            return self.inside(x) * self.scale

    model = Late()
    with forgetting_tensors(model):
        model(X)
    assert hasattr(model, "inside")
    assert hasattr(model, "scale")


def test_what_holds_no_tensor_is_left_alone() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

    model = Counting()
    with forgetting_tensors(model):
        model(X)
    assert model.calls == 1
