from __future__ import annotations

import pytest
import torch
from torch import nn

from gumbel_plugin.training.rescale import dynamic_scale, initialize_weight


def initialised(how: str, shape: tuple[int, ...] = (64, 32, 3, 3), seed: int = 0) -> torch.Tensor:
    weight = nn.Parameter(torch.full(shape, 7.0))
    initialize_weight(weight, how, torch.Generator().manual_seed(seed))
    return weight.detach()


def test_keep_keeps() -> None:
    assert bool((initialised("keep") == 7).all())


@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (500, 200)])
def test_kaiming_weights_have_the_variance_of_their_fan_in(shape: tuple[int, ...]) -> None:
    weight = initialised("kaiming_normal", shape)
    fan_in = weight[0].numel()
    expected = (2 / fan_in) ** 0.5
    assert abs(weight.std() / expected - 1) < 4 / (2 * weight.numel()) ** 0.5  # four standard deviations of a std
    assert abs(weight.mean()) < 4 * expected / weight.numel() ** 0.5


@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (50, 20)])
def test_signed_constants_are_the_signs_times_one_magnitude_the_std(shape: tuple[int, ...]) -> None:
    constant, normal = initialised("signed_constant", shape), initialised("kaiming_normal", shape)
    assert constant.abs().unique().numel() == 1
    torch.testing.assert_close(constant.abs().max(), normal.std())
    assert torch.equal(constant.sign(), normal.sign())


@pytest.mark.parametrize("how", ["kaiming_normal", "signed_constant"])
def test_the_seed_decides_and_nothing_else(how: str) -> None:
    first = initialised(how)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(initialised(how), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(initialised(how, seed=1), first)


def test_the_same_numbers_in_every_precision() -> None:
    double = nn.Parameter(torch.empty(8, 4, dtype=torch.float64))
    initialize_weight(double, "kaiming_normal", torch.Generator().manual_seed(0))
    assert torch.equal(double.detach().float(), initialised("kaiming_normal", (8, 4)))


def test_a_normalisations_weight_is_left() -> None:
    assert bool((initialised("kaiming_normal", (5,)) == 7).all())


@pytest.mark.parametrize("gates", [(1.0, 0.0, 1.0, 0.0), (1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.0)])
def test_the_dynamic_scale_is_numel_over_kept(gates: tuple[float, ...]) -> None:
    weight = torch.randn(4, 3, 2, 2)
    mask = torch.tensor(gates).view(4, 1, 1, 1)
    expanded = mask.expand_as(weight).clone().requires_grad_()
    scale = dynamic_scale(mask, weight)
    torch.testing.assert_close(scale, weight.numel() / expanded.detach().sum())
    torch.testing.assert_close(dynamic_scale(expanded, weight), scale)
    mask.requires_grad_()
    ours = torch.autograd.grad(dynamic_scale(mask, weight), mask)[0]
    theirs = torch.autograd.grad(weight.numel() / expanded.sum(), expanded)[0]
    torch.testing.assert_close(ours, theirs.sum((1, 2, 3), keepdim=True))


def test_a_mask_that_closed_everything_is_finite_in_both_directions() -> None:
    mask = torch.zeros(4, 1, requires_grad=True)
    scale = dynamic_scale(mask, torch.randn(4, 3))
    assert float(scale.detach()) == 1.0
    assert bool(torch.isfinite(torch.autograd.grad(scale, mask)[0]).all())
