from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from gumbel_plugin.masks.base import NoiseSource, Phase
from gumbel_plugin.masks.hard_concrete import HardConcreteMask, HardConcreteOptions
from gumbel_plugin.sparsity.types import ELEMENT, SparsityType

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def make(shape: tuple[int, ...], granularity: SparsityType | None = None, **options: float) -> HardConcreteMask:
    mask = HardConcreteMask(shape, HardConcreteOptions(**options), NoiseSource(5), 0, granularity)
    mask.phase = Phase.LEARNING
    return mask


def p_above(threshold: float, log_alpha: float) -> float:
    """Return P(stretched > threshold): the binary concrete's distribution function is that of a logistic variable."""
    s = torch.tensor((threshold - GAMMA) / (ZETA - GAMMA), dtype=torch.float64)
    return float(torch.sigmoid(log_alpha - BETA * torch.logit(s)))


@pytest.mark.parametrize("log_alpha", [-3.0, 0.0, 1.5])
def test_gates_have_the_published_distribution(log_alpha: float) -> None:
    """Masses at 0 and 1, and the distribution function between them, against its formula."""
    mask = make((50_000,), initial_logit=log_alpha)
    gates = mask.gates().detach()
    assert float(gates.min()) == 0.0
    assert float(gates.max()) == 1.0
    for threshold in (0.0, 0.25, 0.5, 0.75):
        expected = p_above(threshold, log_alpha)
        deviation = (expected * (1 - expected) / 50_000) ** 0.5
        assert abs(float((gates > threshold).double().mean()) - expected) < 4 * deviation
    at_one = p_above(1.0, log_alpha)
    assert abs(float((gates == 1).double().mean()) - at_one) < 4 * (at_one * (1 - at_one) / 50_000) ** 0.5


@pytest.mark.parametrize("log_alpha", [-3.0, 0.0, 1.5])
def test_the_probability_is_that_of_not_being_zero(log_alpha: float) -> None:
    probability = make((1,), initial_logit=log_alpha).probability(None)
    assert probability.item() == pytest.approx(p_above(0.0, log_alpha), rel=1e-6)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    mask = make((200,)).double()
    torch.nn.init.normal_(mask.log_alpha)

    (gradient,) = torch.autograd.grad(mask.gates().sum(), mask.log_alpha)
    start, step = mask.log_alpha.detach().clone(), 1e-6

    def gates_at(log_alpha: Tensor) -> Tensor:
        mask.log_alpha.data = log_alpha
        mask.forget_sample()  # drawn again in the same forward, the noise is the same
        return mask.gates().detach()

    numerical = (gates_at(start + step) - gates_at(start - step)) / (2 * step)
    torch.testing.assert_close(gradient, numerical, atol=1e-8, rtol=1e-6)
    assert 0 < int((gradient == 0).sum()) < 200  # the clamped ones get none, the others do


def test_the_l0_penalty_counts_what_is_expected_to_be_open() -> None:
    mask = make((3,), l0_weight=0.01)
    mask.log_alpha.data = torch.tensor([-1.0, 0.0, 2.0])
    penalty = mask.penalty(None)
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.01 * sum(p_above(0.0, a) for a in (-1.0, 0.0, 2.0)), rel=1e-6)
    (gradient,) = torch.autograd.grad(penalty, mask.log_alpha)
    assert bool((gradient > 0).all())
    assert make((3,)).penalty(None) is None


def test_the_extracted_gate_is_hard_and_open_from_a_probability_of_one_half() -> None:
    mask = make((4, 1), ELEMENT)
    edge = BETA * torch.log(torch.tensor(-GAMMA / ZETA))
    mask.log_alpha.data = (edge + torch.tensor([-1.0, -1e-3, 1e-3, 1.0])).view(4, 1)
    weight = torch.ones(4, 1)
    assert torch.equal(mask.decide(weight), mask.probability(weight) >= 0.5)
    assert mask.eval().gates(weight).flatten().tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"gamma": 0.0}, {"zeta": 1.0}, {"l0_weight": -1.0}, {"tau": 1.0}])
def test_options_that_make_no_hard_concrete_are_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        HardConcreteOptions(**wrong)
