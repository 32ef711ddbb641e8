"""Operations of which Torch-Pruning does not know the sizes: removal neither needs them nor fails half-way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from gumbel_plugin import GumbelGroupPruner
from tests.graph.exact_steps import exact_step

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters")  # Torch-Pruning's


class Experts(nn.Module):
    """Batched experts (Mixtral, Qwen-MoE): their weights are parameters of no layer; rotary positions follow."""

    def __init__(self, divide: Callable[[Tensor], tuple[Tensor, Tensor]], turned: bool, experts: int = 2) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(experts, 16, 8) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, 8, 8) * 0.3)
        self.fc1, self.fc2 = nn.Linear(8, 64), nn.Linear(64, 5)
        self.divide, self.turned = divide, turned

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.divide(x @ self.gate_up.transpose(1, 2))
        y = ((gate.sigmoid() * up) @ self.down.transpose(1, 2)).sum(0)
        y = torch.cat((-y[..., 4:], y[..., :4]), -1) + x if self.turned else x + y
        return self.fc2(self.fc1(y).relu())


DIVISIONS: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda y: y.chunk(2, dim=-1),
    "split": lambda y: y.split(8, dim=-1),
    "sizes": lambda y: y.split([8, 8], dim=-1),
    "unbind": lambda y: y.unflatten(-1, (2, 8)).unbind(-2),
    "slices": lambda y: (y[..., :8], y[..., 8:]),
    "chunk along another dimension": lambda y: y.mT.chunk(2, dim=1)[0].mT.expand(2, 6, 8).split(8, -1) * 2,
}


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("division", DIVISIONS)
def test_every_step_is_exact(division: str, turned: bool) -> None:
    torch.manual_seed(0)
    model = Experts(DIVISIONS[division], turned)
    pruner = GumbelGroupPruner(model, X, pruning_ratio=0.5, ignored_layers=[model.fc2], iterative_steps=2)
    assert {group.name: group.safety for group in pruner.groups()}["fc1"] == "exact"
    exact_step(pruner, X)
    assert {group.name: group.safety for group in pruner.groups()}["fc1"] == "exact"
    exact_step(pruner, X)
    assert model.fc1.out_features == 32
    model(X).sum().backward()


class Counted(nn.Module):
    """A chunk, a concatenation and an output without dimensions on the way of channels that leave."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(32, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.c(torch.cat([self.a(x), self.b(x)], -1)).relu()
        return self.d(hidden), hidden.mean()


class TestBookkeeping:
    """What Torch-Pruning counts on operations may fail; layers are cut all the same."""

    def test_an_output_without_dimensions(self) -> None:
        model = Counted()
        pruner = GumbelGroupPruner(model, X, pruning_ratio=0.5, ignored_layers=[model.d], inexact=True)
        pruner.step()
        assert (model.a.out_features, model.b.out_features) == (8, 8)
        model(X)

    @pytest.mark.parametrize("pruner", [tp.ops.ConcatPruner, tp.ops.ElementWisePruner])
    def test_a_count_that_fails(self, pruner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(self: Any, layer: nn.Module, idxs: Any) -> None:
            raise TypeError("unsupported operand type(s) for +: 'NoneType' and 'int'")

        monkeypatch.setattr(pruner, "prune_out_channels", broken)
        monkeypatch.setattr(pruner, "prune_in_channels", broken)
        model = nn.Sequential(Counted().a, nn.ReLU(), nn.Linear(16, 8), nn.Sigmoid(), nn.Linear(8, 2))
        gumbel = GumbelGroupPruner(model, X, pruning_ratio=0.5, ignored_layers=[model[4]], iterative_steps=2)
        exact_step(gumbel, X)
        assert all(group.reason for group in gumbel.groups() if group.safety != "exact")

    def test_sizes_that_are_missing_do_not_count(self) -> None:
        model = Experts(DIVISIONS["chunk"], True)
        pruner = GumbelGroupPruner(model, X, pruning_ratio=0.5, ignored_layers=[model.fc2])
        nodes = pruner.DG.module2node.values()
        sizes = [getattr(node.module, name, None) for node in nodes for name in ("split_sizes", "concat_sizes")]
        assert all(each is None or None not in each for each in sizes)
