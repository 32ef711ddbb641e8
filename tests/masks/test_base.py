from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.masks import METHODS, method_named
from gumbel_plugin.masks.base import LearnedMask, LogitOptions, NoiseSource, Phase
from gumbel_plugin.masks.per_sample import PerSample
from gumbel_plugin.sparsity.types import ELEMENT, OUT_CHANNEL, SparsityType


class Loud(LearnedMask):
    """A mask whose gates are the noise itself, and that counts how often it was asked."""

    def __init__(self, shape: tuple[int, ...], granularity: SparsityType | None = None, stream: int = 0) -> None:
        super().__init__(shape, LogitOptions(), NoiseSource(3), stream, granularity)
        self.latent = torch.nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape))
        self.samples = 0

    def sample(self, weight: Tensor | None) -> Tensor:
        self.samples += 1
        return self.noise.uniform_like(self.latent, self.stream) + self.latent - self.latent.detach()

    def scores(self, weight: Tensor | None) -> Tensor:
        return self.latent

    def probability(self, weight: Tensor | None) -> Tensor:
        return torch.sigmoid(self.latent)


def learning(mask: LearnedMask) -> LearnedMask:
    mask.phase = Phase.LEARNING
    return mask


# Noise ------------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_forward_and_stream_alone() -> None:
    like = torch.empty(1000)

    def draw(seed: int = 0, forward: int = 0, stream: int = 0) -> Tensor:
        return NoiseSource(seed, forward).uniform_like(like, stream)

    first = draw()
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(first, draw())
    others = [draw(seed=1), draw(forward=1), draw(stream=1), draw(seed=1, forward=1)]
    for other in others:
        assert (first == other).float().mean() < 0.01
    assert not torch.equal(others[0], others[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_the_logits_dtype(dtype: torch.dtype) -> None:
    assert NoiseSource().uniform_like(torch.empty(2, 3, dtype=dtype), 0).dtype == dtype


# Phases -----------------------------------------------------------------------------------------------------------


def test_open_gates_are_ones_and_leave_the_weight_itself() -> None:
    mask, weight = Loud((4,), OUT_CHANNEL), torch.randn(4, 3)
    assert torch.equal(mask.gates(), torch.ones(4))
    assert mask.mask_weight(weight) is weight


def test_a_groups_sample_is_drawn_once_in_a_forward() -> None:
    mask = learning(Loud((4,)))
    first = mask.gates()
    assert mask.gates() is first
    mask.noise.forward += 1
    assert not torch.equal(mask.gates(), first)
    assert mask.samples == 2


def test_a_layers_sample_is_drawn_again_and_is_the_same() -> None:
    mask = learning(Loud((4,), OUT_CHANNEL))
    first, second = mask.gates(), mask.gates()
    assert first is not second  # activation checkpointing counts what a layer saves for its backward
    assert torch.equal(first, second)


def test_eval_and_fixed_gates_are_hard_and_cost_no_sample() -> None:
    mask = learning(Loud((4,))).eval()
    assert mask.gates().tolist() == [0.0, 0.0, 1.0, 1.0]
    mask.train().fix(torch.tensor([1.0, 0.0, 0.0, 0.3]))
    assert mask.phase is Phase.FIXED
    assert mask.gates().tolist() == [1.0, 0.0, 0.0, 1.0]
    assert mask.samples == 0


def test_a_score_of_zero_is_open() -> None:
    assert Loud((3,)).decide(None).tolist() == [False, True, True]


def test_gates_are_spread_over_the_weight_in_its_dtype() -> None:
    mask = learning(Loud((4, 1), OUT_CHANNEL))
    weight = torch.randn(4, 3, dtype=torch.float64)
    masked = mask.mask_weight(weight)
    assert masked.dtype == torch.float64
    torch.testing.assert_close(masked, weight * mask.gates().double())


def test_fixing_drops_the_last_sample_and_its_graph() -> None:
    mask = learning(Loud((4,)))
    mask.gates()
    mask.fix(torch.ones(4))
    assert mask._drawn is None


def test_a_sampled_mask_can_be_copied() -> None:
    mask = learning(Loud((4,)))
    sample = mask.gates()
    duplicate = copy.deepcopy(mask)
    assert duplicate.noise is not mask.noise
    assert torch.equal(duplicate.gates(), sample)
    duplicate.noise.forward += 1
    assert mask.gates() is sample


def test_the_hard_gates_travel_with_the_state() -> None:
    mask = Loud((4,))
    mask.fix(torch.tensor([1, 0, 1, 0]))
    other = Loud((4,))
    other.load_state_dict(mask.state_dict())
    assert torch.equal(other.hard, mask.hard)
    assert other.hard.dtype == torch.bool


# Methods ----------------------------------------------------------------------------------------------------------


def test_a_method_is_found_by_its_name() -> None:
    for name, method in METHODS.items():
        assert method_named(name) is method
    with pytest.raises(ConfigError, match="'gumbel-softmax' is unknown; did you mean 'gumbel_softmax'"):
        method_named("gumbel-softmax")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("granularity", [None, ELEMENT, OUT_CHANNEL])
def test_every_method_keeps_the_contract(name: str, granularity: SparsityType | None) -> None:
    """Gates of the mask's shape, in [0, 1]; decided gates are bool; what is learned has a gradient."""
    torch.manual_seed(0)
    weight = torch.randn(6, 4, requires_grad=True)
    shape = (6,) if granularity is None else granularity.latent_shape(weight.shape)
    method = method_named(name)
    if issubclass(method, PerSample):
        pytest.skip("its gates belong to samples, see test_consensus.py")
    for mode in ("frozen", "trained"):
        options = method.Options().for_weights(mode)
        try:
            mask = learning(method(shape, options, NoiseSource(), 0, granularity))
        except ConfigError:
            continue  # not every method has every granularity
        given = None if granularity is None else weight
        mask.sparsity = 0.5  # as a budget would set it
        mask.advance(0.5)
        gates, probability = mask.gates(given), mask.probability(given)
        assert gates.shape in (shape, weight.shape)
        assert probability.shape == mask.scores(given).shape == mask.decide(given).shape == shape
        assert mask.decide(given).dtype == torch.bool
        for values in (gates, probability):
            assert bool(((values >= 0) & (values <= 1)).all())
        if learnt := list(mask.parameters()):
            gradients = torch.autograd.grad(probability.sum(), learnt, allow_unused=True)
            assert any(gradient is not None for gradient in gradients)
