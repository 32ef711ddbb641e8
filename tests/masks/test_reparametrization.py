from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.masks.base import NoiseSource, Phase
from gumbel_plugin.masks.reparametrization import ReparametrizationMask, ReparametrizationOptions, soft_gate
from gumbel_plugin.sparsity.types import ELEMENT, KERNEL


def make(shape: tuple[int, ...], **options: float) -> ReparametrizationMask:
    mask = ReparametrizationMask(shape, ReparametrizationOptions(**options), NoiseSource(), 0, ELEMENT)
    mask.phase = Phase.LEARNING
    return mask


def published(weight: Tensor, t: Tensor) -> Tensor:
    """Return h as the paper writes it, for float64."""
    c2 = math.exp(-1)
    return 1 / (1 - c2) * (torch.exp(-1 / ((t * weight) ** 4 + 1)) - c2)


# The gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("distance", "height"), [(0.0, 0.0), (1.0, 0.378), (2.0, 0.910), (4.0, 0.994), (1e9, 1.0)])
def test_the_gate_has_its_check_values(distance: float, height: float, sign: int) -> None:
    assert float(soft_gate(torch.tensor(sign * distance / 100), 100.0)) == pytest.approx(height, abs=5e-4)


def test_the_gate_is_half_open_where_the_paper_says() -> None:
    assert float(soft_gate(torch.tensor(0.0113), 100.0)) == pytest.approx(0.5, abs=5e-3)


def test_values_are_the_published_formulas_and_never_leave_the_interval() -> None:
    weight = torch.cat([torch.zeros(1), torch.logspace(-9, 30, 4000)])
    for signed in (weight, -weight):
        gate = soft_gate(signed, 100.0)
        assert float(gate.min()) == 0.0
        assert float(gate.max()) == 1.0
        torch.testing.assert_close(gate.double(), published(signed.double(), torch.tensor(100.0)), atol=2e-7, rtol=0)


def test_gradients_in_float32_are_those_of_the_published_formula_in_float64() -> None:
    """Over forty decades: relative accuracy wherever the derivative matters, and nothing but finite numbers."""
    weight = torch.cat([torch.zeros(1), torch.logspace(-9, 30, 4000)])
    results = []
    for dtype, gate in ((torch.float32, soft_gate), (torch.float64, published)):
        w, t = weight.to(dtype, copy=True).requires_grad_(), torch.full_like(weight, 100, dtype=dtype).requires_grad_()
        results.append(torch.autograd.grad(gate(w, t).sum(), (w, t)))
    for ours, exact in zip(*results, strict=True):
        assert bool(torch.isfinite(ours).all())
        assert float(ours[0]) == 0.0
        near = weight < 9.9  # t·w < 990: before the end of the scale
        torch.testing.assert_close(ours[near].double(), exact[near], rtol=1e-4, atol=1e-12)
        assert float((ours[~near].double() - exact[~near].nan_to_num()).abs().max()) < 1e-10


def test_gradients_are_those_of_finite_differences() -> None:
    weight = torch.linspace(-0.05, 0.05, 41, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(100.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, t: soft_gate(w, t) * w, (weight, t))


# The mask ---------------------------------------------------------------------------------------------------------


def test_the_only_parameter_is_the_networks_one_t() -> None:
    first, second = make((3, 4)), make((50, 20))
    second.share(first)
    assert [tuple(p.shape) for p in first.parameters()] == [()]
    assert second.t is first.t
    assert first.t.item() == 100.0


def test_the_masked_weight_is_soft_and_has_the_whole_gradient() -> None:
    torch.manual_seed(0)
    mask, weight = make((5, 4)), (torch.randn(5, 4) * 0.02).requires_grad_()
    w, t = weight.detach().double().requires_grad_(), torch.tensor(100.0, dtype=torch.float64, requires_grad=True)
    masked, exact = mask.mask_weight(weight), w * published(w, t)
    torch.testing.assert_close(masked.double(), exact, atol=1e-8, rtol=1e-5)
    expected = torch.autograd.grad(exact.square().sum(), (w, t))
    for ours, other in zip(torch.autograd.grad(masked.square().sum(), (weight, mask.t)), expected, strict=True):
        torch.testing.assert_close(ours.double(), other, atol=1e-8, rtol=1e-4)


def test_an_evaluation_closes_what_is_below_one_half() -> None:
    mask = make((1, 3)).eval()
    weight = torch.tensor([[0.011, 0.012, 1.0]])
    torch.testing.assert_close(mask.mask_weight(weight), weight * soft_gate(weight, 100.0) * torch.tensor([0, 1, 1]))


def test_scores_rank_as_the_reparametrised_weights_do_across_layers() -> None:
    torch.manual_seed(0)
    mask, weight = make((30, 30)), torch.randn(30, 30, dtype=torch.float64) * 0.02
    by_score = torch.argsort(mask.scores(weight).flatten())
    assert torch.equal(by_score, torch.argsort((weight * published(weight, mask.t)).abs().flatten()))


def test_deciding_writes_the_reparametrised_weights_once() -> None:
    torch.manual_seed(0)
    mask, weight = make((4, 3)), torch.nn.Parameter(torch.randn(4, 3) * 0.02)
    soft = mask.mask_weight(weight).detach()
    hard = torch.rand(4, 3) < 0.5
    mask.fix(hard, weight)
    assert torch.equal(weight, soft)
    assert torch.equal(mask.mask_weight(weight), soft * hard)
    mask.fix(hard, weight)  # gates that are hard already did nothing to the weight that could be lost
    assert torch.equal(weight, soft)


# The budget -------------------------------------------------------------------------------------------------------


def test_the_budget_loss_is_the_published_one_with_the_first_sum_as_its_scale() -> None:
    torch.manual_seed(0)
    masks = [make((6, 5), strength=3.0), make((4, 6), strength=3.0)]
    masks[1].share(masks[0])
    weights = [(torch.randn(mask.shape) * 0.03).requires_grad_() for mask in masks]

    def kept() -> float:
        return float(sum(published(weight.detach().double(), masks[0].t.detach()).sum() for weight in weights))

    initial = kept()
    for _ in range(2):
        loss = masks[0].budget_loss(masks, weights, 0.9, torch.stack)
        assert loss is not None
        assert loss.item() == pytest.approx(3.0 * ((kept() - 0.1 * 54) / initial) ** 2, rel=1e-5)
        with torch.no_grad():
            for weight in weights:
                weight.mul_(0.5)
    assert kept() < 0.8 * initial
    assert float(masks[0].initial_kept) == pytest.approx(initial, rel=1e-5)


@pytest.mark.parametrize(("ratio", "grows"), [(0.99, False), (0.01, True)])
def test_the_budget_drives_the_weights_and_t(ratio: float, grows: bool) -> None:
    mask, weight = make((10, 10)), torch.nn.Parameter(torch.full((10, 10), 0.011))
    loss = mask.budget_loss([mask], [weight], ratio, torch.stack)
    assert loss is not None
    to_weight, to_t = torch.autograd.grad(loss, (weight, mask.t))
    assert bool(((to_weight < 0) == grows).all())
    assert (float(to_t) < 0) == grows


def test_a_network_whose_gates_are_all_closed_has_a_finite_budget_loss() -> None:
    mask = make((3, 3))
    loss = mask.budget_loss([mask], [torch.zeros(3, 3)], 0.5, torch.stack)
    assert loss is not None
    assert bool(torch.isfinite(loss))


@pytest.mark.parametrize("granularity", [KERNEL, None])
def test_only_single_weights_can_be_reparametrised(granularity: object) -> None:
    with pytest.raises(ConfigError, match=r"granularity.*use 'element'"):
        ReparametrizationMask((2, 2), ReparametrizationOptions(), NoiseSource(), 0, granularity)
