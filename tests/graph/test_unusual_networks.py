"""Networks that are written in unusual ways: what leaves changes nothing, or the group says why nothing leaves."""

from __future__ import annotations

import types
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.sparsity.counting import count_macs, count_parameters
from gumbel_torch_pruning import find_groups

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def reasons(model: nn.Module, inputs: Any) -> dict[str, str]:
    """Return why each group is not exact, empty where it is."""
    return {group.name: group.reason for group in find_groups(model, inputs)}


class Inception(nn.Module):
    """Three branches that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 12, 1), nn.Conv2d(3, 16, 1)
        self.head = nn.Conv2d(36, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(torch.cat([self.a(x), self.b(x), self.c(x)], 1)))


class TestConcatenations:
    def test_every_step_prunes_every_branch(self) -> None:
        model = Inception()
        pruner = GumbelGroupPruner(model, IMAGES, pruning_ratio=0.5, iterative_steps=2)
        pruner.step()
        assert all(group.safety == "exact" for group in pruner.groups() if group.name != "head")
        pruner.step()
        assert [layer.out_channels for layer in (model.a, model.b, model.c)] == [4, 6, 8]

    def test_a_budget_is_met_in_steps(self) -> None:
        model = Inception()
        macs = count_macs(model, IMAGES)
        pruner = GumbelGroupPruner(model, IMAGES, target="macs", pruning_ratio=0.5, iterative_steps=2)
        pruner.step()
        pruner.step()
        assert macs / 2 - (3 + 2) * 36 <= count_macs(model, IMAGES) <= macs / 2

    def test_a_state_between_two_steps_is_resumed(self) -> None:
        arguments: dict[str, Any] = {"pruning_ratio": 0.5, "iterative_steps": 2}
        first = GumbelGroupPruner(Inception(), IMAGES, **arguments)
        first.step()
        second = GumbelGroupPruner(Inception(), IMAGES, **arguments)
        second.load_state_dict(first.state_dict())
        second.step()
        assert [second.model.a.out_channels, second.model.c.out_channels] == [4, 8]


def test_no_layer_is_left_without_channels(parts, caplog) -> None:
    model = parts
    pruner = GumbelGroupPruner(model, IMAGES, pruning_ratio=0.5)
    with torch.no_grad():
        pruner.gate_parameters()[0].copy_(torch.tensor([-3.0] * 4 + [3.0] * 6))
    [group] = pruner.step(interactive=True)
    masked = model(IMAGES).detach()
    group.prune()
    assert (model.left.out_channels, model.right.out_channels) == (1, 5)
    torch.testing.assert_close(model(IMAGES), masked)
    assert "a closed unit stays" in caplog.text


class TestTiedLayers:
    def test_two_that_compute(self) -> None:
        class Siblings(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(5, 8), nn.Linear(5, 8)
                self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, 2)
                self.b.weight = self.a.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.head(torch.relu(self.hidden(torch.relu(self.a(x)) + torch.relu(self.b(2 * x)))))

        model = Siblings()
        found = reasons(model, torch.randn(4, 5))
        assert found["hidden"] == ""
        assert {"a shares a parameter with b", "b shares a parameter with a"} & set(found.values())
        GumbelGroupPruner(model, torch.randn(4, 5)).step()
        assert model.b.weight is model.a.weight

    def test_words_that_go_in_and_come_out(self) -> None:
        class Language(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.words, self.up, self.down = nn.Embedding(20, 8), nn.Linear(8, 12), nn.Linear(12, 8)
                self.head = nn.Linear(8, 20, bias=False)
                self.head.weight = self.words.weight

            def forward(self, x: Tensor) -> Tensor:
                x = self.words(x)
                return self.head(x + self.down(torch.relu(self.up(x))))

        model, tokens = Language(), torch.randint(0, 20, (2, 5))
        assert {name for name, reason in reasons(model, tokens).items() if not reason} == {"up"}
        GumbelGroupPruner(model, tokens, pruning_ratio=0.5).step()
        assert model.up.out_features == 6
        assert model.head.weight is model.words.weight


def test_a_weight_that_is_read_outside_of_its_layer() -> None:
    class Stray(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            return self.head(torch.relu(self.b(x))) + F.linear(x.detach(), self.b.weight[:2])

    found = reasons(Stray(), torch.randn(8, 5))
    assert "uses a parameter of b outside of it" in found["b"]
    assert found["a"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda features: types.SimpleNamespace(features=features),
        lambda features: UserDict(features=features),
        lambda features: [{"features": features.detach().numpy()}],
    ],
    ids=["object", "mapping", "numpy"],
)
def test_channels_leave_in_any_kind_of_output(wrap) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Any:
            x = torch.relu(self.a(x))
            return {"logits": self.head(torch.relu(self.b(x))), "aux": wrap(x)}

    found = reasons(Pair(), torch.randn(4, 5))
    assert found["a"]
    assert not found["b"]


def test_recurrent_layers_are_left_alone() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.lstm = nn.Linear(5, 8), nn.LSTM(8, 6, batch_first=True)
            self.middle, self.head = nn.Linear(6, 10), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.middle(self.lstm(self.stem(x))[0])))

    model = Recurrent()
    pruner = GumbelGroupPruner(model, torch.randn(2, 6, 5), pruning_ratio=0.5)  # LSTM is a root type by default
    assert {group.name for group in pruner.groups() if group.safety == "exact"} == {"middle"}
    pruner.step()
    assert model.middle.out_features == 5


def test_parameters_outside_of_layers_count() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 40, 1), nn.Conv2d(40, 2, 1)
            self.scales = nn.ParameterList(nn.Parameter(torch.rand(40, 1, 1)) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv(x))
            for scale in self.scales:
                x = x * scale
            return self.head(x)

    model = Scaled()
    whole, unit = count_parameters(model), 3 + 1 + 4 + 2
    scales = [(scale, 0) for scale in model.scales]
    pruner = GumbelGroupPruner(model, IMAGES, target="parameters", pruning_ratio=0.7, unwrapped_parameters=scales)
    pruner.step()
    assert 0.3 * whole - unit < count_parameters(model) <= 0.3 * whole


class TestWeightsThatAreZeroAlready:
    def test_a_zero_head_costs_no_layer_its_channels(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 1))
        nn.init.zeros_(model[4].weight)
        GumbelGroupPruner(model, IMAGES, pruning_ratio=0.5, max_pruning_ratio=0.6, round_to=8).step()
        assert (model[0].out_channels, model[2].out_channels) == (16, 8)

    def test_unread_columns_do_not_count(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 2, 1))
        model[2].weight.data[:, :3] = 0
        pruner = GumbelGroupPruner(model, IMAGES, pruning_ratio=0.5, round_to=8)
        pruner.step()
        assert model[0].out_channels == 16


class TestMovedModels:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_the_example_inputs_go_with_the_model(self, dtype: torch.dtype) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        pruner = GumbelGroupPruner(model, IMAGES, pruning_ratio=0.5, iterative_steps=2)
        model.to(dtype)
        pruner.step()
        pruner.step()
        assert model[0].out_channels == 4
        assert model(IMAGES.to(dtype)).dtype == dtype

    def test_another_default_dtype(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            pruner = GumbelGroupPruner(model, IMAGES.double(), pruning_ratio=0.5)
            assert int(pruner.masks()["0"]["bias"].sum()) == 8  # the gates are open at first
            pruner.step()
        finally:
            torch.set_default_dtype(before)
        assert model[0].out_channels == 4
