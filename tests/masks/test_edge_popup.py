from __future__ import annotations

import pytest
import torch
from torch import nn

from gumbel_plugin.masks.base import NoiseSource, Phase
from gumbel_plugin.masks.edge_popup import EdgePopupMask, EdgePopupOptions
from gumbel_plugin.sparsity.types import ELEMENT, SparsityType


def make(
    shape: tuple[int, ...], sparsity: float | None = 0.5, granularity: SparsityType = ELEMENT, seed: int = 5
) -> EdgePopupMask:
    mask = EdgePopupMask(shape, EdgePopupOptions(), NoiseSource(seed), 0, granularity)
    mask.phase = Phase.LEARNING
    mask.sparsity = sparsity
    return mask


@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (200, 300)])
def test_scores_start_as_torchs_own_initialisation_of_such_a_weight(shape: tuple[int, ...]) -> None:
    score = make(shape).score.detach()
    reference = nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5, generator=torch.Generator().manual_seed(0))
    bound = 1 / score[0].numel() ** 0.5
    assert float(score.abs().max()) <= bound
    assert float(score.abs().max()) == pytest.approx(float(reference.abs().max()), rel=1e-3)
    assert abs(float(score.mean())) < 4 * bound / (3 * score.numel()) ** 0.5  # four standard deviations of the mean
    assert float(score.std()) == pytest.approx(float(reference.std()), rel=0.03)
    assert score.unique().numel() > 0.99 * score.numel()


def test_scores_depend_on_the_seed_and_the_mask_alone() -> None:
    first = make((20, 20)).score
    torch.manual_seed(9)
    state = torch.get_rng_state()
    assert torch.equal(first, make((20, 20)).score)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, make((20, 20), seed=6).score)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.999])
def test_the_highest_absolute_scores_are_open(sparsity: float) -> None:
    mask = make((10, 20), sparsity)
    gates = mask.gates(torch.ones(10, 20)).detach().flatten()
    gone = min(int(200 * sparsity), 199)
    order = sorted(range(200), key=lambda i: abs(mask.score.flatten()[i].item()))
    assert [i for i in range(200) if gates[i] == 0] == sorted(order[:gone])
    assert torch.equal(gates.bool(), mask.decide(None).flatten())


def test_the_number_of_open_gates_follows_the_sparsity() -> None:
    mask = make((10, 10), 0.2)
    for sparsity in (0.2, 0.5, 0.9):
        mask.sparsity = sparsity
        assert mask.gates(torch.ones(10, 10)).sum().item() == round(100 * (1 - sparsity))


def test_the_gradient_goes_straight_through_to_the_absolute_score() -> None:
    """Closed gates get one too: that is how they come back."""
    torch.manual_seed(0)
    mask, weight, upstream = make((6, 4)), torch.randn(6, 4), torch.randn(6, 4)
    (gradient,) = torch.autograd.grad(mask.mask_weight(weight), mask.score, upstream)
    torch.testing.assert_close(gradient, upstream * weight * mask.score.detach().sign())


def test_scaled_makes_the_fan_smaller_by_what_is_kept() -> None:
    mask = EdgePopupMask((4, 4), EdgePopupOptions(scaled=True), NoiseSource(), 0, ELEMENT)
    mask.sparsity = 0.75
    assert mask.fan_factor == 0.25
    assert make((4, 4), 0.75).fan_factor == 1.0
