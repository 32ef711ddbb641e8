from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.insight.profile import Latency, file_size, measure_latency, profile
from gumbel_plugin.sparsity.counting import count_macs, count_nonzero, count_parameters


class Calls(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


SMALL_NET_MACS = 4 * 6 * 6 * 3 * 9 + 4 * 36 * 5
IMAGES = torch.zeros(2, 3, 8, 8)

# batch, length, width, heads, hidden width of the attention cases
B, L, E, H, W = 3, 5, 8, 2, 16
TOKENS = torch.zeros(B, L, E)
QUERIES, KEYS = torch.zeros(B, H, L, E // H), torch.zeros(B, 1, L, E // H)
ATTENTION = 4 * L * E * E + 2 * L * L * E  # four projections; scores and weighted sum over all heads


@pytest.mark.parametrize(
    ("model", "inputs", "macs"),
    [
        # out channels * output positions * (in channels / groups) * kernel size
        (nn.Conv1d(4, 6, 3), torch.zeros(2, 4, 9), 6 * 7 * 4 * 3),
        (nn.Conv2d(4, 6, (3, 5), stride=2, padding=1, groups=2), torch.zeros(2, 4, 9, 9), 6 * (5 * 4) * 2 * 15),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), torch.zeros(1, 4, 5, 5), 4 * 9 * 1 * 9),
        (nn.Conv2d(4, 6, 3, dilation=2), torch.zeros(2, 4, 9, 9), 6 * 25 * 4 * 9),
        (nn.Conv3d(2, 3, 2), torch.zeros(2, 2, 4, 4, 4), 3 * 27 * 2 * 8),
        # transposed: in channels * input positions * (out channels / groups) * kernel size
        (nn.ConvTranspose1d(4, 6, 3), torch.zeros(2, 4, 9), 4 * 9 * 6 * 3),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), torch.zeros(2, 4, 9, 9), 4 * 81 * 3 * 9),
        (nn.Linear(8, 3), torch.zeros(4, 8), 24),
        (nn.Linear(E, 7, bias=False), TOKENS, L * E * 7),
        (Calls(lambda x: x @ x.mT), TOKENS, L * E * L),
        (Calls(lambda x: torch.einsum("bij,bkj->bik", x, x)), TOKENS, L * E * L),
        (Calls(lambda x: x @ torch.zeros(8)), torch.zeros(4, 8), 8),
        (Calls(lambda x: x[0] @ x[0]), torch.zeros(1, 8), 8),
        # three cells: gates * length * (input + hidden) * hidden
        (nn.LSTM(E, 4, batch_first=True), TOKENS, 4 * L * (E + 4) * 4),
        (nn.GRU(E, 4, batch_first=True), TOKENS, 3 * L * (E + 4) * 4),
        (nn.RNN(E, 4, batch_first=True), TOKENS, L * (E + 4) * 4),
        (nn.MultiheadAttention(E, H, batch_first=True), (TOKENS, TOKENS, TOKENS), ATTENTION),
        (nn.TransformerEncoderLayer(E, H, W, batch_first=True), TOKENS, ATTENTION + 2 * L * E * W),
        (nn.TransformerDecoderLayer(E, H, W, batch_first=True), (TOKENS, TOKENS), 2 * ATTENTION + 2 * L * E * W),
        (Calls(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True)), QUERIES, 2 * L * L * E),
        (Calls(lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True)), (QUERIES, KEYS), 2 * L * L * E),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Softmax(1)), IMAGES, 0),
        (small_net(), IMAGES, SMALL_NET_MACS),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("training", [False, True])
def test_macs_match_the_formula_for_one_sample(model: nn.Module, inputs: Any, macs: int, training: bool) -> None:
    assert count_macs(model.train(training), inputs) == macs
    assert model.training is training


def test_macs_of_keyword_inputs_and_of_masked_weights_are_dense() -> None:
    layer = nn.Linear(8, 3)
    nn.init.zeros_(layer.weight)
    assert count_macs(layer, {"input": torch.zeros(5, 8)}) == 24


def test_torch_pruning_counts_biases_batch_norm_and_relu_on_top() -> None:
    torch_pruning = pytest.importorskip("torch_pruning")
    theirs, _ = torch_pruning.utils.count_ops_and_params(small_net(), IMAGES[:1])
    feature_map = 4 * 6 * 6
    assert theirs == SMALL_NET_MACS + (feature_map + 5) + 2 * feature_map + feature_map


def test_parameters_and_nonzero_parameters() -> None:
    model = nn.Linear(4, 3)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    with torch.no_grad():
        model.weight[0, :3] = 0
    assert count_parameters(model) == 15
    assert count_nonzero(model) == 9


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    return model


def test_a_shared_parameter_counts_once() -> None:
    assert count_parameters(tied()) == 40
    assert count_nonzero(tied()) == 40


def test_the_file_size_is_that_of_the_file(tmp_path: Path) -> None:
    model = small_net()
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    assert file_size(model) == path.stat().st_size
    assert file_size(small_net().half()) < path.stat().st_size


def test_shared_strided_and_odd_state_can_be_sized() -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: Any) -> None: ...

    assert file_size(tied()) > 2 * 40 * 4  # both names, and a header
    assert file_size(nn.Sequential(Odd(3, 4))) > 16 * 4
    strided = nn.Linear(3, 4, bias=False)
    strided.weight = nn.Parameter(torch.zeros(3, 4).t())
    assert file_size(strided) == file_size(nn.Linear(3, 4, bias=False))


def test_latency_runs_each_batch_size_in_eval_mode_with_the_threads_asked_for() -> None:
    seen: set[tuple[int, int, bool, bool]] = set()

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.add((len(x), torch.get_num_threads(), self.training, torch.is_grad_enabled()))
            return x

    threads = torch.get_num_threads()
    result = measure_latency(Spy().train(), IMAGES, batch_sizes=(4, 1), min_run_time=0.01, threads=threads + 1)
    assert list(result) == [4, 1]
    assert seen == {(4, threads + 1, False, False), (1, threads + 1, False, False)}
    assert torch.get_num_threads() == threads
    assert all(latency.runs > 1 for latency in result.values())


def test_latency_is_in_milliseconds() -> None:
    latency = measure_latency(Calls(lambda x: time.sleep(0.003)), IMAGES, min_run_time=0.01)[1]
    assert latency.median_ms >= 3.0  # a sleep is never shorter than asked for
    assert latency.iqr_ms >= 0.0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"batch_sizes": (0,)}, "batch size is 0"),
        ({"min_run_time": 0.0}, "min_run_time"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_bad_arguments_are_named(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure_latency(nn.Identity(), IMAGES, **argument)


def test_a_profile_holds_the_four_measures_as_plain_types() -> None:
    model = small_net()
    result = profile(model, IMAGES, batch_sizes=(2,), min_run_time=0.01)
    assert result.parameters == count_parameters(model) == 3 * 4 * 9 + 4 + 8 + 144 * 5 + 5
    assert result.nonzero == result.parameters - 4  # the batch norm's bias starts at 0
    assert result.macs == SMALL_NET_MACS
    assert result.file_bytes == file_size(model)
    assert isinstance(result.latency[2], Latency)
    assert result.latency_ms == {2: result.latency[2].median_ms}
    plain = result.as_dict()
    assert plain["latency"][2]["runs"] == result.latency[2].runs
    assert json.loads(json.dumps(plain))["macs"] == SMALL_NET_MACS
    assert profile(model, IMAGES, batch_sizes=()).latency == {}


def test_the_model_and_global_state_stay_as_they_are() -> None:
    model = small_net().train()
    model[1].eval()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    state = copy.deepcopy(model.state_dict())
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    flags = [module.training for module in model.modules()]

    def world() -> tuple[Any, ...]:
        backends = torch.backends
        switches = backends.mkldnn.enabled, backends.cudnn.enabled, backends.mha.get_fastpath_enabled()
        sdpa = backends.cuda.flash_sdp_enabled(), backends.cuda.math_sdp_enabled()
        return (*switches, *sdpa, torch.is_grad_enabled(), torch.get_num_threads(), torch.get_rng_state().tolist())

    before = world()
    assert all(before[:5])
    profile(model, IMAGES, min_run_time=0.01)
    assert world() == before
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
