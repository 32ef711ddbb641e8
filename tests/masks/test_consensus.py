"""The gates of samples: their value and gradient, the losses that make them agree, and the consensus."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError, LifecycleError
from gumbel_plugin.masks.base import NoiseSource, Phase
from gumbel_plugin.masks.consensus import ConsensusMask, ConsensusOptions
from gumbel_plugin.sparsity.types import ELEMENT, WHOLE

LAYER = nn.Identity()


def make(units: int = 4, randomize: bool = True, **options: object) -> ConsensusMask:
    """Return a mask that learns, with a gating module (float64) on which samples disagree."""
    mask = ConsensusMask((units,), ConsensusOptions(**options), NoiseSource(), 0).double()
    mask.phase = Phase.LEARNING
    if randomize:
        generator = torch.Generator().manual_seed(1)
        for parameter in mask.parameters():
            nn.init.normal_(parameter, generator=generator)
    return mask


def features(samples: int = 6, units: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(samples, units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft_gates(mask: ConsensusMask, inputs: Tensor) -> Tensor:
    """Return σ of the two-layer MLP, written out."""
    rows = []
    for sample in inputs:
        hidden = [sum(sample[i] * mask.input[i, j] for i in range(len(sample))) for j in range(mask.input.shape[1])]
        hidden = [torch.clamp(value, min=0) for value in hidden]
        logits = [sum(h * w for h, w in zip(hidden, row, strict=True)) for row in mask.output]
        rows.append(torch.stack([1 / (1 + torch.exp(-(z + b))) for z, b in zip(logits, mask.bias, strict=True)]))
    return torch.stack(rows)


def ask(mask: ConsensusMask, inputs: Tensor, layer: nn.Module = LAYER) -> Tensor:
    return mask.gates_of_samples(lambda: inputs, layer)


# Value and gradient -------------------------------------------------------------------------------------------------


def test_every_gate_starts_open_for_every_sample() -> None:
    mask = make(randomize=False, initial_logit=0.5)
    assert bool((ask(mask, 100 * features(50)) == 1).all())
    assert bool(mask.decide(None).all())


def test_a_gate_is_the_mlp_at_a_threshold_of_one_half() -> None:
    mask, inputs = make(hidden=3), features()
    gates = ask(mask, inputs)
    assert torch.equal(gates, (soft_gates(mask, inputs) >= 0.5).double())
    assert 0 < float(gates.detach().mean()) < 1


def test_the_gradient_goes_straight_through_the_threshold() -> None:
    """It is that of Σ c·σ, which finite differences confirm."""
    mask, inputs = make(hidden=3), features()
    factors = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parameters = list(mask.parameters())
    straight = torch.autograd.grad((factors * ask(mask, inputs)).sum(), parameters)
    soft = torch.autograd.grad((factors * soft_gates(mask, inputs)).sum(), parameters)
    for ours, theirs in zip(straight, soft, strict=True):
        torch.testing.assert_close(ours, theirs)
    step = 1e-6
    for parameter, gradient in zip(parameters, straight, strict=True):
        for index in itertools.islice(itertools.product(*map(range, parameter.shape)), 5):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[index] += sign * step
                    values.append((factors * soft_gates(mask, inputs)).sum().item())
                    parameter[index] -= sign * step
            assert gradient[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-6)


def test_the_gating_module_starts_from_the_seed_alone() -> None:
    options = ConsensusOptions()
    first, same = (ConsensusMask((3,), options, NoiseSource(5), 2) for _ in range(2))
    other, seed = ConsensusMask((3,), options, NoiseSource(5), 1), ConsensusMask((3,), options, NoiseSource(6), 2)
    assert torch.equal(first.input, same.input)
    assert not torch.equal(first.input, other.input)
    assert not torch.equal(first.input, seed.input)


def test_half_precision_features_and_parameters() -> None:
    mask, inputs = make(), features()
    expected = ask(mask, inputs.bfloat16().double()).detach()
    half = make().bfloat16()
    gates = ask(half, inputs.bfloat16())
    assert gates.dtype == torch.float32
    assert float((gates.detach() == expected).float().mean()) > 0.9


# Once in a forward --------------------------------------------------------------------------------------------------


def counting(inputs: Tensor) -> tuple[Callable[[], Tensor], list[int]]:
    calls: list[int] = []

    def compute() -> Tensor:
        calls.append(1)
        return inputs

    return compute, calls


def test_gates_are_computed_once_in_a_forward_by_whoever_asks_first() -> None:
    mask, other = make(), nn.Identity()
    compute, calls = counting(features())
    first = mask.gates_of_samples(compute, LAYER)
    assert mask.gates_of_samples(compute, other) is first
    assert len(calls) == 1
    mask.noise.forward += 1
    second = mask.gates_of_samples(compute, other)
    assert second is not first
    assert len(calls) == 2


def test_who_asked_first_and_asks_again_has_other_samples() -> None:
    mask = make()
    assert len(ask(mask, features(6))) == 6
    assert len(ask(mask, features(3))) == 3


# Losses -------------------------------------------------------------------------------------------------------------


def constant_votes(mask: ConsensusMask, open_samples: list[list[bool]]) -> None:
    """Let the samples' gates be these, by features that say so."""
    gates = torch.tensor(open_samples)
    units = gates.shape[1]
    with torch.no_grad():
        mask.input.zero_()[:, :units] = torch.eye(units)
        mask.output.zero_()[:, :units] = 10 * torch.eye(units)
        mask.bias.fill_(-5.0)
    ask(mask, gates.double())


@pytest.mark.parametrize("gates", list(itertools.product([True, False], repeat=2)))
def test_polarisation_is_zero_where_all_samples_agree(gates: tuple[bool, bool]) -> None:
    mask = make(2, lambda_polar=3.0)
    constant_votes(mask, [list(gates)] * 5)
    penalty = mask.penalty(None)
    assert penalty is not None
    assert penalty.item() == 0


def test_polarisation_is_above_zero_where_a_single_sample_disagrees() -> None:
    for dissenter in range(5):
        mask = make(2, lambda_polar=3.0)
        constant_votes(mask, [[True, sample == dissenter] for sample in range(5)])
        penalty = mask.penalty(None)
        assert penalty is not None
        assert penalty.item() == pytest.approx(3.0 * 0.2 * 0.8 / 2)


def test_polarisation_is_the_mean_over_all_gates_of_the_network() -> None:
    masks = [make(4, lambda_polar=1.5), make(2, lambda_polar=1.5)]
    masks[1].share(masks[0])
    inputs = [features(8, 4, seed=1), features(8, 2, seed=2)]
    means = [ask(mask, x).detach().mean(0) for mask, x in zip(masks, inputs, strict=True)]
    expected = 1.5 * torch.cat([mean * (1 - mean) for mean in means]).mean()
    assert expected > 0
    total = sum(penalty for mask in masks if (penalty := mask.penalty(None)) is not None)
    torch.testing.assert_close(total, expected)


def test_polarisation_pushes_a_gate_to_where_most_samples_are() -> None:
    mask = make(2, lambda_polar=1.0)
    constant_votes(mask, [[True, False], [True, False], [False, True], [True, False]])
    penalty = mask.penalty(None)
    assert penalty is not None
    (gradient,) = torch.autograd.grad(penalty, mask.bias)
    assert gradient[0] < 0 < gradient[1]  # the first, mostly open, opens further; the other one closes


def test_polarisation_follows_its_schedule() -> None:
    mask = make(2, lambda_polar={"start": 0.0, "end": 2.0, "shape": "linear"})
    constant_votes(mask, [[True, True], [False, True]])
    assert mask.penalty(None) is None
    mask.advance(0.5)
    penalty = mask.penalty(None)
    assert penalty is not None
    assert penalty.item() == pytest.approx(1.0 * 0.25 / 2)


def test_the_usage_loss_is_the_squared_distance_to_the_budget() -> None:
    mask = make(2, lambda_act=4.0)
    costs = torch.tensor([3.0, 1.0], dtype=torch.float64)

    def usage(gates: list[Tensor]) -> Tensor:
        return (gates[0] * costs).sum() / costs.sum()

    assert mask.budget_loss([mask], [None], 0.5, usage) is None  # before any forward
    constant_votes(mask, [[True, True], [False, True], [True, True], [True, False]])
    loss = mask.budget_loss([mask], [None], 0.5, usage)
    assert loss is not None
    assert loss.item() == pytest.approx(4.0 * (0.75 - 0.5) ** 2)
    to_bias = torch.autograd.grad(loss, mask.bias)[0]
    assert bool((to_bias > 0).all())  # too much is open
    slope = 2 * 4.0 * 0.25 * costs / 4 * torch.sigmoid(torch.tensor(5.0)) * torch.sigmoid(torch.tensor(-5.0))
    torch.testing.assert_close(to_bias, slope.double(), rtol=1e-5, atol=0)


# The consensus ------------------------------------------------------------------------------------------------------


def test_the_consensus_is_what_most_samples_vote_for() -> None:
    mask = make(3)
    constant_votes(mask, [[True, False, True], [True, False, False], [False, False, True]])
    assert mask.decide(None).tolist() == [True, False, True]
    torch.testing.assert_close(mask.votes, torch.tensor([2 / 3, 0, 2 / 3], dtype=torch.float64))
    mask.eval()
    assert mask.gates().tolist() == [1, 0, 1]


def test_votes_are_averaged_over_batches_and_the_old_ones_fade() -> None:
    mask = make(1)
    for is_open in (True, False, False, False):
        mask.noise.forward += 1
        constant_votes(mask, [[is_open]])
    assert mask.votes.item() == pytest.approx(0.25)
    for _ in range(500):
        mask.noise.forward += 1
        constant_votes(mask, [[True]])
    assert 0.98 < mask.votes.item() < 1


def test_asking_outside_of_training_leaves_the_votes_alone() -> None:
    mask = make(2)
    constant_votes(mask, [[True, False]])
    before = mask.votes.clone()
    mask.eval()
    mask.evaluated_per_sample = True
    assert mask.follows_samples
    mask.noise.forward += 1
    constant_votes(mask, [[False, True]])
    assert torch.equal(mask.votes, before)
    votes = mask.last_sample_gates()
    assert votes is not None
    assert votes[0].tolist() == [[0, 1]]


def test_votes_that_are_equal_are_ranked_by_confidence() -> None:
    mask = make(3)
    mask.set_consensus(torch.tensor([1.0, 1.0, 0.9]), torch.tensor([0.7, 0.99, 0.9]))
    assert torch.argsort(mask.scores(None)).tolist() == [2, 0, 1]


def test_when_samples_have_gates_of_their_own() -> None:
    mask = make()
    assert mask.follows_samples
    mask.eval()
    assert not mask.follows_samples
    mask.train()
    mask.fix(torch.ones(4))
    assert not mask.follows_samples
    mask.phase = Phase.OPEN
    assert not mask.follows_samples


def test_a_mask_can_be_copied_while_it_learns() -> None:
    mask = make()
    ask(mask, features())
    duplicate = copy.deepcopy(mask)
    assert duplicate.last_sample_gates() is None
    assert torch.equal(ask(duplicate, features()), ask(mask, features()))


# Errors -------------------------------------------------------------------------------------------------------------


def test_gates_of_samples_are_no_gates_of_weights() -> None:
    with pytest.raises(LifecycleError, match="belong to samples"):
        make().gates()


@pytest.mark.parametrize(("unit", "granularity"), [("channel", ELEMENT), ("block", None), ("channel", WHOLE)])
def test_only_channels_and_blocks_are_gated(unit: str, granularity: object) -> None:
    with pytest.raises(ConfigError, match=rf"granularity.*options\.unit is '{unit}'"):
        ConsensusMask((2, 2), ConsensusOptions(unit=unit), NoiseSource(), 0, granularity)


@pytest.mark.parametrize(
    "options",
    [{"unit": "filter"}, {"lambda_act": -1}, {"lambda_polar": -0.1}, {"hidden": 0}, {"initial_logit": -1.0},
     {"lambda_polar": {"start": 1.0, "end": -1.0}}, {"lambda": 1.0}],
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ConsensusOptions.model_validate(options)
