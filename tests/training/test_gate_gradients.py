"""Gradients of gates get one size, whatever they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.training.gate_gradients import GateGradNormalizer


def run(gradients: list[Tensor], even: GateGradNormalizer, parameter: nn.Parameter) -> list[Tensor]:
    found = []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        even.apply()
        found.append(parameter.grad)
    return found


@pytest.fixture
def gate() -> nn.Parameter:
    return nn.Parameter(torch.zeros(4))


def noise(count: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)))


def test_every_gate_gets_the_same_root_mean_square(gate):
    scales = torch.tensor([1e-8, 1e-4, 1.0, 1e4])
    found = torch.stack(run([gradient * scales for gradient in noise(400)], GateGradNormalizer([gate]), gate))
    sizes = found[100:].square().mean(0).sqrt()
    torch.testing.assert_close(sizes, torch.full((4,), 0.1), rtol=0.15, atol=0.0)


def test_the_direction_stays(gate):
    gradients = noise(20)
    for before, after in zip(gradients, run(gradients, GateGradNormalizer([gate]), gate), strict=True):
        assert torch.equal(before.sign(), after.sign())


def test_a_constant_gradient_has_that_size_from_the_first_step_on(gate):
    for found in run([torch.tensor([1e-6, -1e-3, 5.0, 0.0])] * 30, GateGradNormalizer([gate]), gate):
        torch.testing.assert_close(found, torch.tensor([0.1, -0.1, 0.1, 0.0]), rtol=1e-4, atol=0.0)


def test_steps_without_a_gradient_are_not_counted(gate):
    even = GateGradNormalizer([gate])
    gate.grad = None
    even.apply()
    run([torch.zeros(4)] * 200, even, gate)
    (first,) = run([torch.full((4,), 1e-3)], even, gate)
    torch.testing.assert_close(first, torch.full((4,), 0.1), rtol=1e-4, atol=0.0)


def test_a_gradient_that_is_not_finite_is_passed_on_and_forgotten(gate):
    even = GateGradNormalizer([gate])
    run(noise(10), even, gate)
    before = even.state_dict()
    (spoilt,) = run([torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0])], even, gate)
    assert not bool(spoilt[:3].isfinite().any())
    (after,) = run([torch.ones(4)], even, gate)
    assert bool(after.isfinite().all())
    assert bool((before["squares"][0] > 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_theirs(dtype):
    gate = nn.Parameter(torch.zeros(4, dtype=dtype))
    for found in run([torch.full((4,), 1e-3, dtype=dtype)] * 3, GateGradNormalizer([gate]), gate):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), torch.full((4,), 0.1), rtol=1e-2, atol=0.0)


def test_a_state_goes_on_where_it_was(gate):
    one, other = GateGradNormalizer([gate]), GateGradNormalizer([nn.Parameter(gate.detach().clone())])
    run(noise(5), one, gate)
    state = one.state_dict()
    expected = run(noise(5, seed=1), one, gate)
    other.load_state_dict(state)
    found = run(noise(5, seed=1), other, other._parameters[0])
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
