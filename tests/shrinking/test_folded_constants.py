from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin.shrinking.equivalence import verify_equivalence
from gumbel_plugin.shrinking.folded_constants import fold_constants
from gumbel_plugin.shrinking.pruned_file import load_pruned, save_pruned
from gumbel_plugin.shrinking.shrink import remove_dead_units, shrink
from gumbel_torch_pruning import find_groups

ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Tanh)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(inputs.double())


def close(rows: list[int], layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight[rows] = 0.0


def mlp(activation: type[nn.Module] = nn.SiLU, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), activation(), nn.Linear(6, 4, bias=bias), activation(), nn.Linear(4, 3)
    )  # fmt: skip


def convnet(padding: int = 0, mode: str = "zeros", act: type[nn.Module] = nn.Sigmoid) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), act(),
        nn.Conv2d(6, 4, 3, padding=padding, padding_mode=mode, bias=False), nn.BatchNorm2d(4), act(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    norms = [module for module in model if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model


class TestWhatIsFolded:
    @pytest.mark.slow
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_a_linear_units_constant_is_its_activated_bias(self, activation: type[nn.Module], engine: Any) -> None:
        model = mlp(activation)
        close([1, 4], model[0])
        small = shrink(model, {}, torch.randn(3, 5), engine=engine)
        assert shapes(small) == {"0.weight": (4, 5), "0.bias": (4,), "2.weight": (4, 4), "2.bias": (4,)} | {
            name: shape for name, shape in shapes(model).items() if name.startswith("4")
        }
        constants = activation()(model[0].bias[[1, 4]].detach().double())
        expected = model[2].bias.detach().double() + model[2].weight[:, [1, 4]].detach().double() @ constants
        torch.testing.assert_close(small[2].bias.double(), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(small[2].weight, model[2].weight[:, [0, 2, 3, 5]], rtol=0, atol=0)

    @pytest.mark.slow
    def test_a_reader_without_a_bias_gets_one(self, engine: Any) -> None:
        model = mlp(bias=False)
        close([2], model[0])
        small = shrink(model, {}, torch.randn(3, 5), engine=engine)
        constant = F.silu(model[0].bias[2].detach())
        torch.testing.assert_close(small[2].bias, model[2].weight[:, 2].detach() * constant)
        assert model[2].bias is None
        assert small[2].bias.requires_grad

    def test_a_new_bias_is_saved_and_loaded(self, tmp_path: Path) -> None:
        model, inputs = mlp(bias=False), torch.randn(3, 5)
        close([2], model[0])
        small = shrink(model, {}, inputs)
        save_pruned(tmp_path / "small.safetensors", small)
        again = load_pruned(tmp_path / "small.safetensors", lambda: mlp(bias=False))
        assert shapes(again) == shapes(small)
        torch.testing.assert_close(again(inputs), small(inputs), rtol=0, atol=0)

    def test_no_bias_is_made_for_a_zero(self) -> None:
        model = mlp(nn.ReLU, bias=False)
        close([2], model[0])
        with torch.no_grad():
            model[0].bias[2] = -1.0
        small = shrink(model, {}, torch.randn(3, 5))
        assert small[0].out_features == 5
        assert small[2].bias is None

    def test_through_batch_norm_in_eval_mode(self, engine: Any) -> None:
        model = convnet()
        close([0, 5], model[0])
        small = shrink(model, {}, torch.randn(2, 2, 9, 9), engine=engine)
        assert small[0].weight.shape == (4, 2, 3, 3)
        assert small[3].weight.shape == (4, 4, 3, 3)
        norm = model[1]
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        constants = torch.sigmoid((model[0].bias - norm.running_mean) * scale + norm.bias)[[0, 5]]
        expected = (model[3].weight[:, [0, 5]].sum((2, 3)) @ constants).detach()
        torch.testing.assert_close(small[3].bias.detach(), expected)

    def test_constants_make_constants(self, engine: Any) -> None:
        """Unit 0 of the second layer reads nothing but a constant: it is one itself, two layers on."""
        model = mlp(nn.Tanh)
        close([3], model[0])
        with torch.no_grad():
            model[2].weight[0, [0, 1, 2, 4, 5]] = 0.0
        small = shrink(model, {}, torch.randn(3, 5), engine=engine)
        assert [small[n].weight.shape for n in (0, 2, 4)] == [(5, 5), (3, 5), (3, 3)]

    def test_an_output_that_nothing_reaches_is_a_constant(self, engine: Any) -> None:
        model = mlp()
        close([0, 1, 2, 3], model[2])
        inputs = torch.randn(3, 5)
        small = shrink(model, {}, inputs, engine=engine)
        assert [small[n].weight.shape for n in (0, 2, 4)] == [(1, 5), (1, 1), (3, 1)]  # a group keeps a unit
        assert not small[4].weight.any()
        torch.testing.assert_close(small[4].bias, model(inputs)[0])

    def test_the_report_counts_them(self, caplog: pytest.LogCaptureFixture) -> None:
        model = mlp()
        close([1, 4], model[0])
        with caplog.at_level("INFO", logger="gumbel_plugin.shrinking.shrink"):
            shrink(model, {}, torch.randn(3, 5))
        assert "removed 2 units in 1 groups; the constants of 2 were folded" in caplog.text


class TestPadding:
    @pytest.mark.slow
    @pytest.mark.parametrize(("padding", "mode", "folds"), [
        (0, "zeros", True), (1, "zeros", False), (1, "replicate", True), (1, "reflect", True), (1, "circular", True),
    ])  # fmt: skip
    def test_zeros_around_a_constant_are_none(self, padding: int, mode: str, folds: bool) -> None:
        model = convnet(padding, mode)
        close([0], model[0])
        small = shrink(model, {}, torch.randn(2, 2, 9, 9))
        assert small[0].out_channels == (5 if folds else 6)
        assert small[0].weight.dtype == torch.float32

    def test_a_zero_under_zero_padding_is_one(self) -> None:
        model = convnet(padding=1, act=nn.ReLU)
        close([0], model[0])
        with torch.no_grad():
            model[1].bias[0] = -9.0
        small = shrink(model, {}, torch.randn(2, 2, 9, 9))
        assert small[0].out_channels == 5
        assert small[3].bias is None

    @pytest.mark.parametrize(("kernel", "stride", "groups", "folds"), [
        (1, 1, 1, True), (1, 1, 2, False), (2, 2, 1, False), (1, 2, 1, False),
    ])  # fmt: skip
    def test_transposed(self, kernel: int, stride: int, groups: int, folds: bool) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 1),
            nn.Sigmoid(),
            nn.ConvTranspose2d(6, 4, kernel, stride, groups=groups),
            nn.Conv2d(4, 3, 1),
        )
        close([1, 4], model[0])
        inputs = torch.randn(2, 2, 5, 5)
        before = outputs(model, inputs)
        folded = fold_constants(model, find_groups(model, inputs), inputs)
        assert sum(map(len, folded.values())) == 2 * folds
        torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-12, atol=1e-12)

    def test_a_depthwise_convolution_passes_a_constant_on(self) -> None:
        torch.manual_seed(0)
        for padding, left in ((0, 5), (1, 6)):
            model = nn.Sequential(
                nn.Conv2d(2, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 6, 3, padding=padding, groups=6), nn.Sigmoid(),
                nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1),
            )  # fmt: skip
            close([2], model[0])
            small = shrink(model, {}, torch.randn(2, 2, 6, 6))
            assert small[2].groups == left

    def test_a_flattened_image_may_vary_from_place_to_place(self) -> None:
        """A linear layer reads every place by itself, so what a depthwise border does to a constant is still one."""
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Sigmoid(),
            nn.Flatten(), nn.Linear(96, 3),
        )  # fmt: skip
        close([2], model[0])
        assert shrink(model, {}, torch.randn(2, 2, 4, 4))[2].groups == 5


class TestWhatStays:
    def test_a_dead_relu_is_no_constant(self) -> None:
        """Random inputs never wake it, but its weights could be woken: structure counts, not only numbers."""
        model = mlp(nn.ReLU)
        with torch.no_grad():
            model[0].bias[0] = -1e6
        assert shrink(model, {}, torch.randn(3, 5))[0].out_features == 6

    def test_a_residual_branch_still_comes_in(self) -> None:
        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

            def forward(self, x: Tensor) -> Tensor:
                x = torch.sigmoid(self.a(x))
                return self.c(x + torch.tanh(self.b(x)))

        torch.manual_seed(0)
        model = Residual()
        close([1, 2], model.a)
        close([2, 3], model.b)
        small = shrink(model, {}, torch.randn(3, 5))
        assert small.a.out_features == 5  # unit 2 has nothing coming in on either way

    def test_a_factor_from_elsewhere_makes_it_vary(self) -> None:
        """Nothing comes into the unit, but a map that the input does shape multiplies it."""

        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.features, self.map, self.head = nn.Conv2d(2, 6, 1), nn.Conv2d(2, 1, 1), nn.Conv2d(6, 3, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(torch.sigmoid(self.features(x)) * torch.sigmoid(self.map(x))).mean((2, 3))

        torch.manual_seed(0)
        model = Scaled()
        close([0], model.features)
        assert shrink(model, {}, torch.randn(2, 2, 4, 4)).features.out_channels == 6

    def test_shared_weights_are_not_touched(self) -> None:
        torch.manual_seed(0)
        shared = nn.Linear(6, 6)
        model = nn.Sequential(
            nn.Linear(5, 6), nn.Tanh(), shared, nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)
        )
        model[4].weight = shared.weight
        close([0], model[0])
        before = outputs(model, torch.ones(1, 5))
        fold_constants(model, find_groups(model, torch.randn(3, 5)), torch.randn(3, 5))
        torch.testing.assert_close(outputs(model, torch.ones(1, 5)), before, rtol=1e-12, atol=1e-12)

    def test_nothing_to_fold_leaves_the_model_alone(self) -> None:
        model = mlp()
        before = copy.deepcopy(model.state_dict())
        assert fold_constants(model, find_groups(model, torch.randn(3, 5)), torch.randn(3, 5)) == {}
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class TestRounding:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_small_network_has_the_models_dtype(self, dtype: torch.dtype) -> None:
        model = mlp().to(dtype)
        close([1, 4], model[0])
        small = shrink(model, {}, torch.randn(3, 5, dtype=dtype))
        assert {tensor.dtype for tensor in small.parameters()} == {dtype}
        assert "0.bias" in small.state_dict()
        assert not any("unrounded" in name for name in small.state_dict())

    def test_so_have_the_projections_that_were_packed(self) -> None:
        class Attending(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mlp, self.attention = mlp(), nn.MultiheadAttention(3, 3)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.mlp(x)
                return x + self.attention(x, x, x)[0]

        model = Attending().eval()
        close([1, 4], model.mlp[0])
        one_head = {"attention.out_proj": {"weight": torch.tensor([[0.0, 1.0, 1.0]] * 3)}}
        small = shrink(model, one_head, torch.randn(3, 5))
        assert small.attention.num_heads == 2
        assert {tensor.dtype for tensor in small.parameters()} == {torch.float32}

    def test_it_is_told_from_a_mistake(self) -> None:
        """In float64 the rounding of a folded bias is 1e-8; put right it is 1e-16; another value is what it is."""
        model = mlp()
        close([1, 4], model[0])
        inputs = torch.randn(3, 5)
        small = remove_dead_units(model, inputs)
        assert verify_equivalence(model, small, inputs).errors["float64"] < 1e-14
        plain = mlp_like(small)
        assert 1e-10 < verify_equivalence(model, plain, inputs).errors["float64"] < 1e-6
        with torch.no_grad():
            small[2].bias += 1e-6
        assert not verify_equivalence(model, small, inputs).passed


def mlp_like(small: nn.Module) -> nn.Module:
    """The same network by its state dict alone."""
    widths = [small[0].in_features, *(small[n].out_features for n in (0, 2, 4))]
    a, b, c = (nn.Linear(*pair) for pair in pairwise(widths))
    plain = nn.Sequential(a, nn.SiLU(), b, nn.SiLU(), c)
    plain.load_state_dict(small.state_dict())
    return plain


# Properties -------------------------------------------------------------------------------------------------------

quick = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@torch.no_grad()
def sparsify(model: nn.Module, density: float) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.mul_(torch.rand_like(module.weight) < density)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)


def live_units(model: nn.Sequential) -> list[int]:
    """Brute force for chains of linear layers: how many units lie on a path from an input to an output."""
    weights = [(module.weight != 0).double() for module in model if isinstance(module, nn.Linear)]
    forth, back = [torch.ones(weights[0].shape[1]).double()], [torch.ones(len(weights[-1])).double()]
    for weight in weights:
        forth.append(((weight @ forth[-1]) > 0).double())
    for weight in reversed(weights):
        back.append(((weight.T @ back[-1]) > 0).double())
    return [int((f * b).sum()) for f, b in zip(forth[1:-1], back[::-1][1:-1], strict=True)]


@pytest.mark.slow
@quick
@given(
    st.lists(st.integers(2, 9), min_size=3, max_size=5),
    st.sampled_from(ACTIVATIONS),
    st.floats(0.05, 0.5),
    st.integers(0, 10**6),
)
def test_a_sparse_mlp_keeps_exactly_what_lies_on_a_path(
    widths: list[int], activation: type[nn.Module], density: float, seed: int
) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow, bias=bool(torch.rand(()) < 0.7)), activation()]
    model = nn.Sequential(*layers[:-1])
    sparsify(model, density)
    inputs = torch.randn(4, widths[0])
    small = shrink(model, {}, inputs)
    kept = [module.out_features for module in small if isinstance(module, nn.Linear)][:-1]
    assert kept == [max(1, live) for live in live_units(model)]
    torch.testing.assert_close(small(inputs), model(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@quick
@given(st.integers(0, 10**6), st.floats(0.01, 0.2), st.sampled_from([0, 1]), st.sampled_from(ACTIVATIONS))
def test_a_sparse_convnet_shrinks_exactly(seed: int, density: float, padding: int, act: type[nn.Module]) -> None:
    model = convnet(padding, act=act)
    torch.manual_seed(seed)
    sparsify(model, density)
    inputs = torch.randn(2, 2, 8, 8)
    small = shrink(model, {}, inputs)  # raises if it is not equal
    model.eval(), small.eval()
    torch.testing.assert_close(small(inputs), model(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@settings(quick, max_examples=2)
@given(st.integers(0, 10**6), st.floats(0.05, 0.3))
def test_both_engines_agree(by_nni: Any, seed: int, density: float) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 9), nn.Sigmoid(), nn.Linear(9, 7, bias=False), nn.Tanh(), nn.Linear(7, 3))
    sparsify(model, density)
    first, second = (shrink(model, {}, torch.randn(4, 6), engine=each).state_dict() for each in (None, by_nni))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=0)
