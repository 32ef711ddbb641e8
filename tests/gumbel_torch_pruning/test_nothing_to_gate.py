"""A network of which nothing can be gated: the error has every group with its reason, and its text some of them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.errors import ConfigError, GumbelPluginError, NothingToGateError, TargetError
from gumbel_torch_pruning import find_groups

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters")  # Torch-Pruning's


class Matrix(nn.Module):
    """A layer of a kind of its own."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(i, o) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Normed(nn.Module):
    """Residual layers of one width, all of which norms read."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.layer_norm(layer(x), (16,))
        return x


def test_layers_of_an_unknown_kind_are_mentioned() -> None:
    model = nn.Sequential(Matrix(16, 32), nn.ReLU(), Matrix(32, 16), nn.Linear(16, 3))
    assert [g.name for g in find_groups(model, X) if "Matrix is no kind of layer that is known" in g.reason] == [
        "0",
        "2",
    ]
    with pytest.raises(NothingToGateError, match="0: Matrix is no kind of layer that is known") as caught:
        GumbelGroupPruner(model, X, pruning_ratio=0.5, ignored_layers=[model[3]])
    assert [group.name for group in caught.value.groups] == ["0", "2"]


@pytest.mark.parametrize("depth", [1, 3, 40])
def test_the_text_is_bounded_and_the_groups_are_all_there(depth: int) -> None:
    model = Normed(depth)
    with pytest.raises(NothingToGateError, match="can be gated: layers") as caught:
        GumbelGroupPruner(model, X, pruning_ratio=0.5)
    assert len(caught.value.groups) == depth
    assert all(group.reason for group in caught.value.groups)
    assert len(str(caught.value)) < 600
    assert ("has all" in str(caught.value)) == (depth > 3)
    assert isinstance(caught.value, TargetError | GumbelPluginError)


def test_the_error_can_be_sent_to_another_process() -> None:
    error: Any = pickle.loads(pickle.dumps(NothingToGateError("nothing", ["a group"])))
    assert (str(error), error.groups) == ("nothing", ["a group"])


@pytest.mark.parametrize("script", [torch.jit.script, lambda model: torch.jit.trace(model, X)])
@pytest.mark.filterwarnings("ignore")  # torch's, on TorchScript
def test_torchscript_is_refused_with_its_own_reason(script: Any) -> None:
    scripted = script(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)))
    for way in (find_groups, GumbelGroupPruner):
        with pytest.raises(ConfigError, match="pass the model it was made of"):
            way(scripted, X)
    inside = nn.Sequential(scripted, nn.Linear(3, 2))
    with pytest.raises(GumbelPluginError, match="0"):
        find_groups(inside, X)
