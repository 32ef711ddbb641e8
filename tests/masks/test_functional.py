"""The sampled mask: noise, forward and gradients against definitions evaluated independently in float64."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.masks.functional import _midpoints, _mix, straight_through_gumbel, uniform_noise

BITS = (16, 32)
DTYPES = (torch.float32, torch.float64)


def noise(shape: Any, counter: int = 0, **options: Any) -> Tensor:
    return uniform_noise(shape, **{"seed": 1, "counter": counter, "stream": 0, "device": "cpu"} | options)


def tensors(shape: Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, logits, noise and an incoming gradient."""
    generator = torch.Generator().manual_seed(seed)
    weight, logit, grad = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))
    return weight.requires_grad_(), (2 * logit).requires_grad_(), noise(shape, counter=seed, dtype=dtype), grad


def gumbel_gates(logit: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the gates themselves: a weight of ones times its gates."""
    return straight_through_gumbel(torch.ones_like(logit, requires_grad=False), logit, uniform, temperature)


def soft_gates(logit: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """The definition, spelt out: the first class of a softmax over two classes at this temperature."""
    logistic = torch.log(uniform) - torch.log1p(-uniform)
    classes = torch.stack([logit + logistic, torch.zeros_like(logit)]) / temperature
    return torch.exp(classes[0]) / torch.exp(classes).sum(dim=0)


# ---------------------------------------------------------------------------------------------------- noise


def test_noise_is_determined_by_its_arguments() -> None:
    assert torch.equal(noise((7, 5)), noise((7, 5)))
    for changed in ({"seed": 2}, {"counter": 1}, {"stream": 1}):
        assert not torch.equal(noise((7, 5)), noise((7, 5), **changed)), changed
    assert not torch.equal(noise((9,), seed=3, counter=4), noise((9,), seed=4, counter=3))


def test_noise_leaves_the_global_state_alone_and_does_not_read_it() -> None:
    torch.manual_seed(0)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = noise((1000,))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_numpy).all()
    torch.manual_seed(1)
    assert torch.equal(noise((1000,)), first)


def test_noise_does_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(noise((200_001,)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("bits", "dtype"), [*product(BITS, DTYPES)])
def test_the_extreme_integers_stay_inside_the_open_interval(bits: int, dtype: torch.dtype) -> None:
    integer = {16: torch.int16, 32: torch.int32}[bits]
    limits = torch.iinfo(integer)
    low, middle, high = _midpoints(torch.tensor([limits.min, 0, limits.max], dtype=integer), dtype).double().tolist()
    cells = 2**23 if (bits, dtype) == (32, torch.float32) else 2**bits
    assert low == 0.5 / cells
    assert middle == 0.5 + 0.5 / cells
    assert high == 1 - 0.5 / cells


def test_sixteen_bit_noise_reaches_its_extremes_and_nothing_beyond() -> None:
    values = noise((2**21,))  # 32 visits to each of the 65536 cells expected
    assert values.min().item() == 2**-17
    assert values.max().item() == 1 - 2**-17
    cells = values.double() * 65536 - 0.5
    assert torch.equal(cells, cells.round())


@pytest.mark.parametrize(("bits", "dtype"), [*product(BITS, DTYPES)])
def test_noise_is_uniform_and_its_lanes_are_independent(bits: int, dtype: torch.dtype) -> None:
    count, bins = 2**18, 256
    values = noise((count,), dtype=dtype, bits=bits)
    assert values.dtype == dtype
    seen = torch.histc(values.float(), bins, 0, 1).double()
    chi_square = ((seen - count / bins) ** 2 / (count / bins)).sum().item()
    assert abs(chi_square - (bins - 1)) < 6 * math.sqrt(2 * (bins - 1))
    lanes = torch.corrcoef(values.double().view(-1, 4).T)
    assert (lanes - torch.eye(4)).abs().max().item() < 5 / math.sqrt(count / 4)


def test_noise_of_other_forwards_masks_and_runs_is_uncorrelated() -> None:
    count = 2**16
    keys = [{"seed": s, "counter": c, "stream": m} for s, c, m in product((0, 1), (0, 1, 2), (0, 1))]
    draws = torch.stack([noise((count,), dtype=torch.float64, **key) for key in keys])
    correlation = torch.corrcoef(draws) - torch.eye(len(keys))
    assert correlation.abs().max().item() < 5 / math.sqrt(count)


def test_mixing_separates_neighbouring_keys() -> None:
    keys = list(product(range(-2, 10), range(60), range(30)))
    for half in (0, 32):
        mixed = {_mix(*key) >> half & 0xFFFFFFFF for key in keys}
        assert len(mixed) >= len(keys) - 2  # in 32 bits, 0.05 collisions are expected by chance
    flips = [bin(_mix(0, 5, 1) ^ _mix(0, 5, 1 ^ (1 << bit))).count("1") for bit in range(64)]
    assert 26 < sum(flips) / len(flips) < 38


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2,), (3,), (4,), (5,), (3, 0, 2), (3, 3, 7)])
@pytest.mark.parametrize("bits", BITS)
def test_every_size_works(shape: tuple[int, ...], bits: int) -> None:
    values = noise(shape, bits=bits)
    assert values.shape == shape
    assert ((values > 0) & (values < 1)).all()


def test_noise_rejects_what_would_round_to_the_ends() -> None:
    with pytest.raises(ConfigError, match=r"dtype=torch\.bfloat16"):
        noise((3,), dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="bits=8"):
        noise((3,), bits=8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_on_a_gpu(dtype: torch.dtype) -> None:
    before = torch.cuda.get_rng_state()
    values = noise((2**20,), device="cuda", dtype=dtype)
    assert torch.equal(values, noise((2**20,), device="cuda", dtype=dtype))
    assert not torch.equal(values, noise((2**20,), device="cuda", dtype=dtype, counter=1))
    assert ((values > 0) & (values < 1)).all()
    assert torch.equal(torch.cuda.get_rng_state(), before)


# ------------------------------------------------------------------------------------- forward and gradients


@pytest.mark.slow
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    seed=st.integers(0, 2**16),
    temperature=st.floats(0.2, 5.0),
    needs=st.sampled_from([(True, True), (True, False), (False, True)]),
)
@settings(max_examples=60, deadline=None)
def test_forward_and_gradients_are_those_of_the_definition(
    shape: list[int], seed: int, temperature: float, needs: tuple[bool, bool]
) -> None:
    weight, logit, uniform, grad = tensors(shape, seed)
    soft = soft_gates(logit, uniform, temperature)
    (expected,) = torch.autograd.grad(soft, logit, grad * weight.detach())
    hard = (logit + torch.logit(uniform) > 0).double()

    weight.requires_grad_(needs[0])
    logit.requires_grad_(needs[1])
    masked = straight_through_gumbel(weight, logit, uniform, temperature)
    masked.backward(grad)
    torch.testing.assert_close(masked, weight * hard, rtol=0, atol=0)
    if needs[0]:
        torch.testing.assert_close(weight.grad, grad * hard, rtol=0, atol=0)
    if needs[1]:
        torch.testing.assert_close(logit.grad, expected, rtol=1e-9, atol=1e-12)
    assert (weight.grad is not None, logit.grad is not None) == needs


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_gates_are_exactly_zero_or_one_and_carry_the_soft_gradient(temperature: float) -> None:
    _, logit, uniform, grad = tensors((101,))
    soft = soft_gates(logit, uniform, temperature)
    (expected,) = torch.autograd.grad(soft, logit, grad)
    gates = gumbel_gates(logit, uniform, temperature)
    gates.backward(grad)
    assert torch.equal(gates, (soft > 0.5).double())
    assert 20 < gates.sum() < 80
    torch.testing.assert_close(logit.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
def test_weights_of_any_floating_dtype_meet_float32_logits(dtype: torch.dtype, frozen: bool) -> None:
    weight, logit, uniform, grad = (t.detach() for t in tensors((64, 9), dtype=torch.float32))
    weight, grad = weight.to(dtype).requires_grad_(not frozen), grad.to(dtype)
    logit.requires_grad_()
    soft = soft_gates(logit.detach().double(), uniform.double(), 1.0)
    masked = straight_through_gumbel(weight, logit, uniform)
    masked.backward(grad)
    hard = (soft > 0.5).to(dtype)
    assert masked.dtype == dtype
    assert torch.equal(masked, weight * hard)
    assert logit.grad is not None
    assert logit.grad.dtype == torch.float32
    expected = grad.double() * weight.detach().double() * soft * (1 - soft)
    torch.testing.assert_close(logit.grad.double(), expected, rtol=1e-5, atol=1e-6)
    if not frozen:
        assert weight.grad is not None
        assert weight.grad.dtype == dtype
        assert torch.equal(weight.grad, grad * hard)


def test_saturated_logits_give_finite_results() -> None:
    logit = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    masked = straight_through_gumbel(weight, logit, noise((4,)))
    masked.sum().backward()
    assert masked.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert logit.grad is not None
    assert logit.grad.tolist() == [0.0] * 4


def test_a_weight_with_another_memory_layout() -> None:
    weight, logit, uniform, grad = tensors((4, 3, 5, 5))
    hard = (logit + torch.logit(uniform) > 0).double()
    weight = weight.detach().to(memory_format=torch.channels_last).requires_grad_()
    straight_through_gumbel(weight, logit, uniform).backward(grad)
    assert weight.grad is not None
    assert torch.equal(weight.grad, grad * hard)


# ---------------------------------------------------------------------------------------------- distribution


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("bits", BITS)
def test_gates_are_kept_with_probability_sigmoid_of_the_logit(temperature: float, bits: int) -> None:
    count = 100_000
    latents = torch.tensor([-6.0, -2.0, -0.5, 0.0, 1.0, 3.0])
    logit = latents[:, None].expand(-1, count).contiguous()
    kept = gumbel_gates(logit, noise(logit.shape, bits=bits), temperature).double().mean(dim=1)
    probability = torch.sigmoid(latents.double())
    tolerance = 4.5 * (probability * (1 - probability) / count).sqrt() + 2**-17
    assert ((kept - probability).abs() < tolerance).all()


def test_the_16_bit_keep_probability_is_within_half_a_cell_of_the_sigmoid() -> None:
    """All 65536 values of the noise, each once: the frequency of keep is then the probability itself."""
    uniform = _midpoints(torch.arange(-(2**15), 2**15, dtype=torch.int16), torch.float64)
    for latent in torch.linspace(-12, 12, 49, dtype=torch.float64):
        kept = gumbel_gates(latent.expand(2**16), uniform.clone()).mean()
        assert (kept - torch.sigmoid(latent)).abs().item() <= 2**-17 + 1e-12


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("latent", [-1.5, 0.0, 2.0])
def test_one_logistic_variable_equals_two_gumbel_variables(temperature: float, latent: float) -> None:
    """Mean and spread of the gradient agree with `F.gumbel_softmax` on stacked classes."""
    count = 100_000
    torch.manual_seed(7)
    ours = torch.full((count,), latent, requires_grad=True)
    gumbel_gates(ours, noise((count,)), temperature).sum().backward()
    theirs = torch.full((count,), latent, requires_grad=True)
    classes = torch.stack([theirs, torch.zeros_like(theirs)])
    F.gumbel_softmax(classes, tau=temperature, hard=True, dim=0)[0].sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    for moment in (1, 2):
        a, b = ours.grad.double() ** moment, theirs.grad.double() ** moment
        error = torch.sqrt((a.var() + b.var()) / count)
        assert (a.mean() - b.mean()).abs() < 4.5 * error


# -------------------------------------------------------------------------------------------- what it costs


class Operations(TorchDispatchMode):
    """Counts the operators that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def backward_operations(weight: Tensor, logit: Tensor, uniform: Tensor, grad: Tensor) -> set[str]:
    masked = straight_through_gumbel(weight, logit, uniform)
    with Operations() as operations:
        torch.autograd.grad(masked, [t for t in (weight, logit) if t.requires_grad], grad)
    return set(operations.seen) & {"mul", "threshold_backward", "sigmoid_backward", "sigmoid", "logit", "div", "div_"}


def test_gradients_that_nobody_needs_are_not_computed() -> None:
    weight, logit, uniform, grad = tensors((10,))
    assert backward_operations(weight, logit, uniform, grad) == {"threshold_backward", "mul", "sigmoid_backward"}
    weight, logit, uniform, grad = tensors((10,))
    assert backward_operations(weight.detach(), logit, uniform, grad) == {"mul"}
    weight, logit, uniform, grad = tensors((10,))
    assert backward_operations(weight, logit.detach(), uniform, grad) == {"threshold_backward"}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_only_the_memory_of_the_noise_is_kept_beside_inputs_and_result(frozen: bool, temperature: float) -> None:
    weight, logit, uniform, _ = tensors((1000,), dtype=torch.float32)
    weight.requires_grad_(not frozen)
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        straight_through_gumbel(weight, logit, uniform, temperature)
    assert saved - {weight.data_ptr(), logit.data_ptr()} == {uniform.data_ptr()}


def test_overwriting_the_noise_before_the_backward_is_noticed() -> None:
    weight, logit, uniform, grad = tensors((10,))
    masked = straight_through_gumbel(weight, logit, uniform)
    uniform.fill_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        masked.backward(grad)


def test_the_graph_can_be_kept_for_a_second_backward() -> None:
    weight, logit, uniform, grad = tensors((50,))
    masked = straight_through_gumbel(weight, logit, uniform, 2.0)
    first = torch.autograd.grad(masked, (weight, logit), grad, retain_graph=True)
    second = torch.autograd.grad(masked, (weight, logit), grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_gradient_of_the_gradient_is_refused() -> None:
    weight, logit, uniform, grad = tensors((5,))
    masked = straight_through_gumbel(weight, logit, uniform)
    (once,) = torch.autograd.grad(masked, logit, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


def test_nothing_is_recorded_without_gradients() -> None:
    weight, logit, uniform, _ = tensors((5,))
    with torch.no_grad():
        assert not straight_through_gumbel(weight, logit, uniform).requires_grad


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_the_temperature_must_be_positive(temperature: float) -> None:
    weight, logit, uniform, _ = tensors((3,))
    with pytest.raises(ConfigError, match="temperature="):
        straight_through_gumbel(weight, logit, uniform, temperature)


def test_shapes_and_dtypes_must_agree() -> None:
    weight, logit, uniform, _ = tensors((3,))
    with pytest.raises(ConfigError, match=r"\(3,\), \(1,\), \(3,\)"):
        straight_through_gumbel(weight, logit[:1], uniform)
    with pytest.raises(ConfigError, match=r"torch\.float32"):
        straight_through_gumbel(weight, logit, uniform.float())
    with pytest.raises(ConfigError, match="requires_grad=True"):
        gumbel_gates(logit, uniform.requires_grad_())
