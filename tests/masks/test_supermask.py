from __future__ import annotations

import pytest
import torch

from gumbel_plugin.masks.base import LogitOptions, NoiseSource, Phase
from gumbel_plugin.masks.supermask import Supermask
from gumbel_plugin.sparsity.types import ELEMENT, OUT_CHANNEL, SparsityType


def make(shape: tuple[int, ...], granularity: SparsityType | None = None, **options: float) -> Supermask:
    mask = Supermask(shape, LogitOptions(**options), NoiseSource(5), 0, granularity)
    mask.phase = Phase.LEARNING
    return mask


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.0])
def test_a_gate_is_open_as_often_as_its_probability_says(logit: float) -> None:
    mask = make((20_000,), initial_logit=logit)
    gates = mask.gates().detach()
    assert set(gates.unique().tolist()) == {0.0, 1.0}  # exactly: no rounding of hard + soft - soft
    expected = torch.sigmoid(torch.tensor(logit))
    deviation = (expected * (1 - expected) / 20_000).sqrt()
    assert abs(gates.mean() - expected) < 4 * deviation  # four standard deviations of a binomial mean


@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradient_goes_through_the_probability(frozen: bool) -> None:
    """With hard gates b: d/dm = g·w·σ(m)(1 − σ(m)), d/dw = g·b."""
    torch.manual_seed(0)
    mask = make((6, 4), ELEMENT)
    torch.nn.init.normal_(mask.logit)
    weight, upstream = torch.randn(6, 4, requires_grad=not frozen), torch.randn(6, 4)
    masked = mask.mask_weight(weight)
    (to_logit,) = torch.autograd.grad(masked, mask.logit, upstream, retain_graph=True)
    p = torch.sigmoid(mask.logit.detach().double())
    torch.testing.assert_close(to_logit, (upstream * weight.detach() * p * (1 - p)).float())
    if not frozen:
        (to_weight,) = torch.autograd.grad(masked, weight, upstream)
        torch.testing.assert_close(to_weight, upstream * mask.gates(weight).detach())


def test_half_precision_keeps_fine_probabilities() -> None:
    mask = make((20_000,), initial_logit=-6.0).to(torch.bfloat16)
    assert 10 < mask.gates().sum() < 120  # 49 expected; noise of 8 bits could not say so


@pytest.mark.parametrize(("weights", "expected"), [("frozen", 0.0), ("trained", 3.0)])
def test_the_logit_starts_at_zero_for_frozen_weights(weights: str, expected: float) -> None:
    mask = Supermask((2, 1), LogitOptions().for_weights(weights), NoiseSource(), 0, OUT_CHANNEL)
    assert mask.logit.flatten().tolist() == [expected] * 2


def test_gates_are_decided_by_the_sign_of_the_logit() -> None:
    mask = make((3,))
    mask.logit.data = torch.tensor([-0.1, 0.0, 0.1])
    assert mask.decide(None).tolist() == [False, True, True]
