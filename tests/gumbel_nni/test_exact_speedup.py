"""NNI's speedup in the corners: what a copy could lose, what NNI mistakes for closed, what it cannot do."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from torch import Tensor, nn
from torch.nn import functional as F

import gumbel_nni
from gumbel_nni.compat.exact_speedup import remove_channels
from gumbel_plugin.errors import ConfigError, GraphError
from tests.gumbel_nni.helpers import Masks, masked_copy, randomized, relative_error, size


def half_of_columns(model: nn.Module, *names: str) -> Masks:
    masks: Masks = {}
    for name in names:
        mask = torch.ones_like(model.get_submodule(name).weight)
        mask[:, ::2] = 0
        masks[name] = {"weight": mask}
    return masks


class Small(nn.Module):
    """Convolution, norm, an activation with f(0) != 0, dropout, a linear head; all that a copy could lose."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 10, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.bn(self.conv1(x)))
        x = F.relu(self.conv2(x))
        return self.head(self.drop(x.mean((2, 3))))


def small_network() -> tuple[nn.Module, Tensor, Masks]:
    model = randomized(Small()).eval()
    return model, torch.randn(2, 2, 8, 8), half_of_columns(model, "conv2", "head")


def test_quick_start_with_a_pruner_of_nni() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 4))
    pruner = L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5, "exclude_op_names": ["4"]}])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    x = torch.randn(3, 12)
    small = gumbel_nni.speedup(model, masks, x, backend="nni")
    assert [tuple(layer.weight.shape) for layer in small if isinstance(layer, nn.Linear)] == [(8, 12), (5, 8), (4, 5)]
    assert relative_error(masked_copy(model, masks), small, x) < 1e-6


def test_the_callers_model_masks_and_generator_are_left_alone() -> None:
    model, x, masks = small_network()
    model.train()
    model.bn.eval()
    model.conv1.weight.requires_grad_(False)
    state, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    before, random_state = copy.deepcopy(masks), torch.random.get_rng_state()
    remove_channels(model, masks, x)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert flags == [module.training for module in model.modules()]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(masks, before, rtol=0, atol=0)


def test_flags_hooks_and_counters_survive() -> None:
    model, x, masks = small_network()
    model.train()
    model.bn.eval()
    model.bn.num_batches_tracked.fill_(7)
    model.conv1.weight.requires_grad_(False)  # it shrinks
    model.conv2.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)  # it does not
    model.conv2.register_forward_hook(lambda module, inputs, output: output * 2)
    small = remove_channels(model, masks, x)
    assert [module.training for module in small.modules()] == [module.training for module in model.modules()]
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(parameter.grad is None for parameter in small.parameters())
    assert small.state_dict().keys() == model.state_dict().keys()
    assert vars(small).keys() == vars(model).keys()
    assert small.bn.num_batches_tracked == 7
    assert (small.conv1.out_channels, small.bn.num_features, small.conv2.in_channels) == (4, 4, 4)
    assert relative_error(masked_copy(model, masks).eval(), small.eval(), x) < 1e-6


def test_the_result_is_an_ordinary_module() -> None:
    model, x, masks = small_network()
    small = remove_channels(model, masks, x)
    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())
    assert relative_error(small, twin, x) == 0
    small.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    assert small(torch.randn(5, 2, 12, 12)).shape == (5, 3)
    assert size(remove_channels(model, masks, x[:1])) == size(small) < size(model)


def test_nothing_is_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    model, x, masks = small_network()
    level = logging.getLogger("nni").level
    with caplog.at_level(logging.DEBUG):
        remove_channels(model, masks, x)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert logging.getLogger("nni").level == level


def test_fine_grained_zeros_do_not_revive() -> None:
    model, x, masks = small_network()
    scattered = torch.rand(10, 8, 3, 3, generator=torch.Generator().manual_seed(0)).round()
    masks["conv2"]["weight"] *= scattered
    small = remove_channels(model, masks, x)
    kept = scattered[1::2, 1::2]  # rows that the head still reads, columns that are open
    torch.testing.assert_close(small.conv2.weight == 0, kept == 0)
    assert relative_error(masked_copy(model, masks), small, x) < 1e-6


def test_a_row_stays_while_its_bias_is_sent() -> None:
    model = randomized(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    x = torch.randn(2, 3)
    rows = torch.ones(4, 3)
    rows[1] = 0
    model[0].bias.data.fill_(1.0)
    masks: Masks = {"0": {"weight": rows}}
    small = remove_channels(model, masks, x)
    assert small[0].out_features == 4
    assert relative_error(masked_copy(model, masks), small, x) < 1e-6
    masks["0"]["bias"] = rows[:, 0]
    small = gumbel_nni.speedup(model, masks, x, backend="nni")
    assert small[0].out_features == 3
    assert relative_error(masked_copy(model, masks), small, x) < 1e-6


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 6, 1, bias=False), nn.Conv2d(2, 6, 1, bias=False)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.left(x) + self.right(x)))


def test_rows_that_disagree_at_a_sum_are_resolved() -> None:
    model, x = randomized(Sum()), torch.randn(2, 2, 5, 5)
    masks = {name: {"weight": torch.ones(6, 2, 1, 1)} for name in ("left", "right")}
    masks["left"]["weight"][[0, 1, 2]] = 0
    masks["right"]["weight"][[2, 3]] = 0
    small = gumbel_nni.speedup(model, masks, x, backend="nni")
    assert small.left.out_channels == small.right.out_channels == small.last.in_channels == 5
    assert relative_error(masked_copy(model, masks), small, x) < 1e-6


class ResidualLinear(nn.Module):
    """NNI resolves conflicts by rows where no convolution is masked, and would open the columns of `down` again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.down(F.gelu(self.up(x))))


class Gated(nn.Module):
    """A gated linear unit: both halves of a chunk must shrink alike."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.last = nn.Linear(6, 12), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, dim=1)
        return self.last(value * torch.sigmoid(gate))


class Twice(nn.Module):
    """One module under two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.alias = self.shared

    def forward(self, x: Tensor, offset: float = 1.0) -> Tensor:
        x = F.relu(self.alias(F.relu(self.first(x))))
        return self.last(F.relu(self.shared(x))) + offset


class Attending(nn.Module):
    """A leaf with two outputs that share their graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.attention, self.last = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1) * torch.arange(1, 4, device=x.device).view(1, 3, 1)
        y, weights = self.attention(x, x, x)
        return self.last(y + self.down(F.relu(self.up(y)))).mean(1) + weights.amax(dim=(1, 2)).unsqueeze(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "masked", "shapes"),
    [
        (ResidualLinear, ["down"], {"up": (4, 6), "down": (6, 4), "last": (3, 6)}),
        (Attending, ["down"], {"up": (4, 6), "down": (6, 4), "last": (2, 6)}),
        (Gated, ["last"], {"both": (6, 6), "last": (2, 3)}),
        (Twice, ["last", "alias"], {"first": (3, 6), "shared": (3, 3), "alias": (3, 3), "last": (2, 3)}),
    ],
)
def test_structures(build: Callable[[], nn.Module], masked: list[str], shapes: dict[str, tuple[int, int]]) -> None:
    model, x = randomized(build()), torch.randn(2, 6)
    masks = half_of_columns(model, *masked)
    small = remove_channels(model, masks, x)
    assert {name: tuple(small.get_submodule(name).weight.shape) for name in shapes} == shapes
    assert relative_error(masked_copy(model, masks), small, x) < 1e-6


def test_keyword_inputs_in_an_order_of_their_own() -> None:
    model, x = randomized(Twice()), torch.randn(2, 6)
    small = remove_channels(model, half_of_columns(model, "last", "alias"), {"offset": torch.randn(2, 2), "x": x})
    assert (small.alias is small.shared, small.last.in_features) == (True, 3)


class TwoReaders(Twice):
    def forward(self, x: Tensor) -> Tensor:
        first, second = F.relu(self.shared(self.first(x))), F.relu(self.alias(2 * self.first(x)))
        return self.last(first) + F.linear(second, self.last.weight.flip(1))


@pytest.mark.slow
@pytest.mark.parametrize("build", [Twice, TwoReaders])
def test_calls_of_one_module_that_would_shrink_differently_are_refused(build: Callable[[], nn.Module]) -> None:
    model = randomized(build())
    with pytest.raises(GraphError, match=r"calls of '(shared|last)' would lose different channels"):
        remove_channels(model, half_of_columns(model, "last"), torch.randn(2, 6))


TWO = torch.tensor(2.0)


class Constants(nn.Module):
    """Everything that NNI takes for closed though it is not: tiny and zero weights, a zero scale, an expanded token."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.scale, self.token = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(1, 1, 5))
        self.table, self.last = nn.Parameter(torch.zeros(6)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.second(F.relu(self.first(x))) + F.relu(self.table) * TWO
        x = F.layer_norm(torch.diff(x, dim=-1), (5,))  # the differences' sum has no gradient
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.last(x)[:, 0] + self.last(x).sum(1)


@pytest.mark.parametrize("spoil", ["tiny", "zero", "nothing"])
def test_only_masks_close_channels(spoil: str) -> None:
    model, x = randomized(Constants()), torch.randn(2, 3, 6)
    if spoil == "tiny":
        model.first.weight.data.mul_(1e-9)
        model.scale.data.fill_(1e-9)
    elif spoil == "zero":
        for parameter in (model.scale, model.token, model.last.weight):
            nn.init.zeros_(parameter)
    masks = half_of_columns(model, "second")
    small = remove_channels(model, masks, x)
    shapes = {name: tuple(parameter.shape) for name, parameter in small.named_parameters()}
    assert shapes["first.weight"] == (4, 6)
    assert shapes["second.weight"] == (6, 4)
    assert shapes["last.weight"] == (3, 5)
    assert vars(small).keys() == vars(model).keys()  # the tracer stores TWO
    assert relative_error(masked_copy(model, masks), small, x) < 1e-6


def test_a_layer_keeps_one_channel() -> None:
    model, x, masks = small_network()
    masks["conv2"]["weight"].zero_()
    small = remove_channels(model, masks, x)
    assert small.conv1.out_channels == small.conv2.in_channels == 1
    assert relative_error(masked_copy(model, masks), small, x) < 1e-6


def test_masks_that_close_nothing_give_a_copy() -> None:
    model, x, _ = small_network()
    masks = {"bn": {"weight": torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1])}, "conv2": {"weight": torch.ones(10, 8, 3, 3)}}
    small = remove_channels(model, {**masks, "head": {"weight": None, "bias": None}}, x)
    assert small is not model
    assert size(small) == size(model)
    assert small.bn.weight[0] == 0
    assert relative_error(masked_copy(model, masks), small, x) == 0


class Leaving(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(x.numpy() * 2))


class Variadic(Small):
    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(inputs[0])


class FixedWidth(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn(self.conv1(x)).view(-1, 8, 8, 8)).mean((2, 3))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped, self.last = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.grouped(self.first(x)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "masked", "message"),
    [
        (Leaving, ["conv2"], "cannot shrink Leaving .*requires grad"),
        (Variadic, ["conv2"], "cannot trace Variadic .*expected 0 arguments but got 1"),
        (FixedWidth, ["conv2"], "ModelSpeedup left a FixedWidth that does not run"),
        (Grouped, ["last"], "cannot shrink Grouped .*each group is different"),
    ],
)
def test_what_nni_cannot_do_is_a_graph_error(build: Callable[[], nn.Module], masked: list[str], message: str) -> None:
    model = randomized(build())
    with pytest.raises(GraphError, match=message):
        remove_channels(model, half_of_columns(model, *masked), torch.randn(2, 2, 8, 8))


def test_inputs_that_do_not_fit() -> None:
    model, x, masks = small_network()
    with pytest.raises(GraphError, match="Small does not run on the example inputs"):
        remove_channels(model, masks, x[:, :1])
    with pytest.raises(ConfigError, match="example_inputs is a int"):
        remove_channels(model, masks, 3)
