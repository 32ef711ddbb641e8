from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from gumbel_plugin.masks.base import NoiseSource, Phase
from gumbel_plugin.masks.gumbel_softmax import GumbelSoftmaxMask, GumbelSoftmaxOptions
from gumbel_plugin.sparsity.schedules import Schedule
from gumbel_plugin.sparsity.types import ELEMENT, OUT_CHANNEL, SparsityType, granularity_of


def make(
    shape: tuple[int, ...], granularity: SparsityType | None = None, stream: int = 0, **options: object
) -> GumbelSoftmaxMask:
    mask = GumbelSoftmaxMask(shape, GumbelSoftmaxOptions(**options), NoiseSource(5), stream, granularity)
    mask.phase = Phase.LEARNING
    return mask


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_gate_is_open_as_often_as_its_logit_says(logit: float, temperature: float) -> None:
    mask = make((20_000,), temperature=temperature, initial_logit=logit)
    gates = mask.gates().detach()
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    expected = torch.sigmoid(torch.tensor(logit))
    deviation = (expected * (1 - expected) / 20_000).sqrt()
    assert abs(gates.mean() - expected) < 4 * deviation  # four standard deviations of a binomial mean
    torch.testing.assert_close(mask.probability(None), torch.full((20_000,), float(expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_masking_a_weight_is_multiplying_it_by_the_gates(dtype: torch.dtype, frozen: bool) -> None:
    """The fused path for single weights gives what the plain one gives, values and gradients."""
    torch.manual_seed(0)
    mask = make((6, 4), ELEMENT, temperature=0.7).to(dtype)
    torch.nn.init.normal_(mask.logit)
    weight = torch.randn(6, 4, dtype=dtype, requires_grad=not frozen)
    upstream = torch.randn(6, 4, dtype=dtype)
    results = []
    for masked in (mask.mask_weight(weight), weight * mask.gates(weight).to(dtype)):
        wanted = [mask.logit] if frozen else [mask.logit, weight]
        results.append((masked, *torch.autograd.grad(masked, wanted, upstream)))
    for fused, plain in zip(*results, strict=True):
        assert fused.dtype == dtype
        torch.testing.assert_close(fused, plain)


def test_the_gradient_of_a_gate_is_that_of_the_soft_one() -> None:
    mask = make((50,), temperature=0.5, initial_logit=0.3)
    (gradient,) = torch.autograd.grad(mask.gates().sum(), mask.logit)
    noise = mask.noise.uniform_like(mask.logit, 0)
    logit = mask.logit.detach().requires_grad_()
    soft = torch.sigmoid((logit + noise.logit()) / 0.5)
    torch.testing.assert_close(gradient, torch.autograd.grad(soft.sum(), logit)[0])


def test_coarser_units_share_one_gate() -> None:
    mask = make((3, 2), granularity_of([2, 2]), initial_logit=0.0)
    masked = mask.mask_weight(torch.ones(6, 4))
    blocks = masked.view(3, 2, 2, 2).transpose(1, 2).flatten(2)
    assert bool((blocks == blocks[..., :1]).all())
    assert 0 < masked.sum() < 24


def test_masks_of_one_shape_draw_different_samples() -> None:
    first, second = make((500,), stream=0, initial_logit=0.0), make((500,), stream=1, initial_logit=0.0)
    assert 150 < (first.gates() != second.gates()).sum() < 350


def test_the_temperature_follows_its_schedule() -> None:
    mask = make((3,), temperature=Schedule(2.0, 0.5, "linear"))
    assert mask.temperature == 2.0
    mask.advance(0.5)
    assert mask.temperature == 1.25
    mask.advance(1.0)
    assert mask.temperature == 0.5
    constant = make((3,), temperature=0.8)
    constant.advance(0.9)
    assert constant.temperature == 0.8


def test_gates_are_decided_by_the_sign_of_the_logit() -> None:
    mask = make((3,))
    mask.logit.data = torch.tensor([-0.1, 0.0, 0.1])
    assert mask.decide(None).tolist() == [False, True, True]
    assert mask.scores(None) is mask.logit


@pytest.mark.parametrize(("weights", "expected"), [("frozen", 0.0), ("trained", 3.0)])
def test_the_initial_logit_depends_on_the_weights(weights: str, expected: float) -> None:
    options = GumbelSoftmaxOptions().for_weights(weights)
    mask = GumbelSoftmaxMask((2,), options, NoiseSource(), 0, OUT_CHANNEL)
    assert mask.logit.tolist() == [expected] * 2
    assert GumbelSoftmaxOptions(initial_logit=1.0).for_weights(weights).initial_logit == 1.0


@pytest.mark.parametrize("temperature", [0.0, -1.0, Schedule(1.0, 0.0), Schedule(-1.0, 1.0)])
def test_the_temperature_stays_positive(temperature: float | Schedule) -> None:
    with pytest.raises(ValidationError, match="temperature must stay above 0"):
        GumbelSoftmaxOptions(temperature=temperature)


def test_unknown_options_are_an_error() -> None:
    with pytest.raises(ValidationError, match=r"(?i)extra inputs are not permitted"):
        GumbelSoftmaxOptions(tau=1.0)
