from __future__ import annotations

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.masks.base import NoiseSource, Phase
from gumbel_plugin.masks.gibbs import GibbsMask, GibbsOptions
from gumbel_plugin.sparsity.schedules import Schedule
from gumbel_plugin.sparsity.types import ELEMENT, KERNEL, OUT_CHANNEL, SparsityType, granularity_of

FILTERS = granularity_of([1, -1, -1, -1])
_UNITS = {"unstructured": ELEMENT, "kernel": KERNEL, "filter": FILTERS}


def make(shape: tuple[int, ...], hamiltonian: str, sparsity: float = 0.5, **options: object) -> GibbsMask:
    """Return a mask that is being learned over a weight of this shape."""
    granularity = _UNITS[hamiltonian]
    chosen = GibbsOptions(hamiltonian=hamiltonian, **options)
    mask = GibbsMask(granularity.latent_shape(shape), chosen, NoiseSource(5), 0, granularity)
    mask.phase, mask.sparsity = Phase.LEARNING, sparsity
    return mask


# Brute force ------------------------------------------------------------------------------------------------------


def spins(size: int) -> Tensor:
    """Return all masks of this size as rows of ±1, in the order of `frequencies`."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)), dtype=torch.float64)


def frequencies(gates: Tensor) -> Tensor:
    """Return how often each mask of (replicas, size) gates occurred, as a fraction."""
    size = gates.shape[1]
    numbers = (gates.double() @ 2.0 ** torch.arange(size - 1, -1, -1, dtype=torch.float64)).long()
    return torch.bincount(numbers, minlength=2**size).double() / len(gates)


def gibbs(energy: Tensor, beta: float) -> Tensor:
    return torch.softmax(-beta * energy, 0)


def variation(first: Tensor, second: Tensor) -> float:
    """Return the total variation distance of two distributions."""
    return float((first - second).abs().sum() / 2)


def noise_level(exact: Tensor, samples: int) -> float:
    """Return the total variation distance to be expected from counting alone, and half as much again."""
    return 1.5 * float((2 * exact * (1 - exact) / (math.pi * samples)).sqrt().sum() / 2)


def kernel_energy(fields: Tensor, coupling: float) -> Tensor:
    """Return H = xᵀAx + bᵀx of every mask, with A = −c off the diagonal and 0 on it, b = −fields."""
    x = spins(len(fields))
    interaction = -coupling * (1 - torch.eye(len(fields), dtype=torch.float64))
    return torch.einsum("si,ij,sj->s", x, interaction, x) - x @ fields.double()


# Unstructured -----------------------------------------------------------------------------------------------------


def test_independent_weights_are_kept_with_their_probability() -> None:
    """P(keep) = σ(β·(W² − Q)): spins of 0 and 1, not ±1, which would double β."""
    torch.manual_seed(0)
    row = torch.randn(6)
    weight = row.repeat(20_000, 1)
    mask = make((20_000, 6), "unstructured", beta=1.5)
    ordered = row.square().sort().values.double()
    quantile = (ordered[2] + ordered[3]) / 2
    expected = torch.sigmoid(1.5 * (row.double().square() - quantile))
    torch.testing.assert_close(mask.probability(weight)[0].double(), expected, atol=1e-6, rtol=0)
    kept = mask.gates(weight).double().mean(0)
    deviation = (expected * (1 - expected) / 20_000).sqrt()
    assert bool(((kept - expected).abs() < 4 * deviation).all())
    doubled = torch.sigmoid(3 * (row.double().square() - quantile))
    assert not bool(((kept - doubled).abs() < 4 * deviation).all())


def test_when_it_is_cold_the_largest_weights_are_kept() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 50) * 0.05  # published: β must reach 1e4, because squared weights are tiny
    mask = make((40, 50), "unstructured", sparsity=0.9)
    assert int(mask.decide(weight).sum()) == 200
    agreement = []
    for progress in (0.0, 0.64, 1.0):
        mask.advance(progress)
        agreement.append(float((mask.gates(weight) == mask.decide(weight)).float().mean()))
    assert agreement[0] < 0.6
    assert agreement[1] > 0.97
    assert mask.beta == 1e4
    assert float(weight.abs()[mask.decide(weight)].min()) > float(weight.abs()[~mask.decide(weight)].max())


# Kernels ----------------------------------------------------------------------------------------------------------


def kernels_like(kernel: Tensor, replicas: int) -> Tensor:
    """Return a layer of equal kernels, and one of zeros and ones among them that set the quantile apart from theirs."""
    layer = kernel.expand(replicas, 1, *kernel.shape).clone()
    layer[-1], layer[-2] = 0.0, 0.5
    return layer


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2), (3,), (3, 3)])
@pytest.mark.parametrize(("beta", "coupling"), [(1.0, 0.1), (3.0, 0.02), (0.5, 0.5)])
def test_kernels_are_sampled_as_an_enumeration_of_all_masks_says(
    shape: tuple[int, ...], beta: float, coupling: float
) -> None:
    """Strict ±1 spins: the odds of a weight alone go with 2β."""
    torch.manual_seed(1)
    kernel, replicas = torch.randn(shape) * 0.7, 60_000
    layer = kernels_like(kernel, replicas)
    mask = make(layer.shape, "kernel", sparsity=2 / replicas, beta=beta, coupling=coupling)
    means = layer.double().square().flatten(1).mean(1).sort().values
    quantile = (means[1] + means[2]) / 2
    fields = kernel.flatten().double().square() - quantile
    exact = gibbs(kernel_energy(fields, coupling), beta)
    sampled = frequencies(mask.gates(layer)[:-2].flatten(1))
    limit = noise_level(exact, replicas)
    assert variation(sampled, exact) < limit
    independent = gibbs(kernel_energy(fields, 0.0), beta)
    assert variation(sampled, independent) > 1.5 * limit  # the test would notice missing couplings
    assert variation(sampled, gibbs(kernel_energy(fields, coupling), beta / 2)) > 1.5 * limit  # and 2β taken for β


@pytest.mark.slow
def test_large_kernels_are_sampled_exactly_too() -> None:
    """25 weights have too many masks to enumerate; means and pairs against a long single-gated layer Gibbs chain."""
    torch.manual_seed(2)
    kernel, replicas, beta, coupling = torch.randn(5, 5) * 0.5, 20_000, 0.5, 0.02
    layer = kernels_like(kernel, replicas)
    gates = make(layer.shape, "kernel", sparsity=2 / replicas, beta=beta, coupling=coupling).gates(layer)
    means = layer.double().square().flatten(1).mean(1).sort().values
    fields = kernel.flatten().square() - float((means[1] + means[2]) / 2)
    chain = torch.ones(replicas, 25)
    for _, gated in itertools.product(range(30), range(25)):
        others = chain.sum(1) - chain[:, gated]
        odds = 2 * beta * (fields[gated] + 2 * coupling * others)
        chain[:, gated] = torch.where(torch.rand(replicas) < torch.sigmoid(odds), 1.0, -1.0)
    x = 2 * gates[:-2].flatten(1) - 1
    tolerance = 4 * math.sqrt(2 / replicas)  # four standard deviations of a difference of two means of ±1
    torch.testing.assert_close(x.mean(0), chain.mean(0), atol=tolerance, rtol=0)
    torch.testing.assert_close(x.T @ x / len(x), chain.T @ chain / replicas, atol=tolerance * 1.2, rtol=0)


def test_cold_kernels_are_finite_and_settled() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 3, 3) * 3
    mask = make(weight.shape, "kernel", sparsity=0.4, beta=1e4)
    first = mask.gates(weight)
    assert set(first.unique().tolist()) <= {0.0, 1.0}
    mask.noise.forward += 1
    assert torch.equal(first, mask.gates(weight))


def test_every_weight_of_a_linear_layer_is_a_kernel_of_its_own() -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    kernel, single = make((300, 200), "kernel", beta=1.0), make((300, 200), "unstructured", beta=2.0)
    expected = single.probability(weight)
    assert abs(float((kernel.gates(weight) - expected).mean())) < 4 / (2 * 60_000**0.5)
    assert float(((kernel.gates(weight) - expected) * (expected - expected.mean())).mean()) < 1e-3


# Filters ----------------------------------------------------------------------------------------------------------


def bipartite_energy(fields: Tensor, halves: tuple[int, int], coupling: float) -> Tensor:
    """Return the energy whose conditional odds are those of the chromatic sampler: bᵀx/2 − c/2·Σ_{i∈A,j∈B} x_i·x_j."""
    x = spins(sum(halves))
    first, second = x[:, : halves[0]].sum(1), x[:, halves[0] :].sum(1)
    return (-x @ fields.double() - coupling * first * second) / 2


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 1, 1), (3, 1, 2), (2, 2, 2)])
@pytest.mark.parametrize(("beta", "coupling"), [(0.3, 1.0), (2.0, 0.1)])
def test_filters_are_sampled_as_an_enumeration_of_all_masks_says(
    shape: tuple[int, int, int], beta: float, coupling: float
) -> None:
    torch.manual_seed(3)
    one, replicas = torch.randn(shape) * 0.6, 40_000
    layer = one.expand(replicas, *shape).clone()
    layer[-1], layer[-2] = 0.0, 0.5
    mask = make(layer.shape, "filter", sparsity=2 / replicas, beta=beta, coupling=coupling)
    means = layer.double().square().flatten(1).mean(1).sort().values
    fields = one.flatten().double().square() - (means[1] + means[2]) / 2
    inner = math.prod(shape[1:])
    halves = shape[0] // 2 * inner, (shape[0] - shape[0] // 2) * inner
    exact = gibbs(bipartite_energy(fields, halves, coupling), beta)
    sampled = frequencies(mask.gates(layer)[:-2].flatten(1))
    limit = noise_level(exact, replicas)
    assert variation(sampled, exact) < limit
    assert variation(sampled, gibbs(bipartite_energy(fields, halves, 0.0), beta)) > 1.5 * limit
    assert variation(sampled, gibbs(bipartite_energy(fields, halves, coupling), 2 * beta)) > 1.5 * limit


def test_strongly_coupled_filters_stay_as_they_started() -> None:
    """Published: the half that is not drawn first starts whole, at ±1 by whether the filter's mean W² exceeds Q."""
    torch.manual_seed(0)
    weight = torch.randn(20, 8, 3, 3) * torch.linspace(0.1, 1, 20).view(-1, 1, 1, 1)
    mask = make(weight.shape, "filter", sparsity=0.5, beta=1.0)
    gates = mask.gates(weight).flatten(1)
    assert torch.equal(gates.mean(1) > 0.5, mask.decide(weight).flatten())
    assert float((gates.mean(1) - 0.5).abs().min()) > 0.45
    few_sweeps = make(weight.shape, "filter", sparsity=0.5, beta=1e-4, sweeps=1).gates(weight)
    assert 0.4 < float(few_sweeps.mean()) < 0.6


def test_a_filter_with_one_input_channel_has_no_couplings() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 1, 2, 2).expand(20_000, 1, 2, 2).clone()
    weight[:10_000] *= 0.5
    mask = make(weight.shape, "filter", beta=0.7)
    squares = weight.square()
    means = squares.mean((1, 2, 3))
    expected = torch.sigmoid(0.7 * (squares - (means[0] + means[-1]) / 2))
    for part in (slice(10_000), slice(10_000, None)):
        kept = mask.gates(weight)[part].mean(0)
        torch.testing.assert_close(kept, expected[part].mean(0), atol=4 * 0.5 / 100, rtol=0)


# The mask ---------------------------------------------------------------------------------------------------------

_WEIGHTS = {"unstructured": (12, 10), "kernel": (6, 5, 3, 3), "filter": (10, 4, 3, 3)}


@pytest.fixture(params=_WEIGHTS)
def hamiltonian(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_units_with_the_highest_summed_squares_are_kept(hamiltonian: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(_WEIGHTS[hamiltonian])
    mask = make(weight.shape, hamiltonian, sparsity=0.7)
    axes = {"unstructured": (), "kernel": (2, 3), "filter": (1, 2, 3)}[hamiltonian]
    sums = weight.square().sum(axes, keepdim=True) if axes else weight.square()
    kept = mask.decide(weight)
    assert kept.shape == sums.shape == mask.shape
    assert int(kept.sum()) == math.ceil(0.3 * sums.numel())
    assert float(sums[kept].min()) > float(sums[~kept].max())
    assert torch.equal(mask.scores(weight).flatten().argsort(), sums.flatten().argsort())


def test_the_gradient_reaches_the_weights_through_the_product_only(hamiltonian: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(_WEIGHTS[hamiltonian], requires_grad=True)
    mask, upstream = make(weight.shape, hamiltonian), torch.randn(_WEIGHTS[hamiltonian])
    (gradient,) = torch.autograd.grad(mask.mask_weight(weight), weight, upstream)
    gates = mask.gates(weight)
    assert gates.shape == weight.shape
    assert 0 < float(gates.mean()) < 1
    assert torch.equal(gradient, upstream * gates)
    assert list(mask.parameters()) == []


def test_the_sample_depends_on_seed_forward_and_mask(hamiltonian: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(_WEIGHTS[hamiltonian])
    beta = {"filter": 0.02}.get(hamiltonian, 1.0)

    def draw(seed: int = 0, forward: int = 0, stream: int = 0) -> Tensor:
        mask = make(weight.shape, hamiltonian, beta=beta)
        mask.noise, mask.stream = NoiseSource(seed, forward), stream
        return mask.gates(weight)

    first = draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw())
    for other in (draw(seed=1), draw(forward=1), draw(stream=1)):
        assert not torch.equal(first, other)


def test_the_quantile_follows_the_weights_and_the_sparsity(hamiltonian: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(_WEIGHTS[hamiltonian])
    mask = make(weight.shape, hamiltonian, beta=1.0)
    kept = {}
    for sparsity in (0.0, 0.2, 0.8):
        mask.sparsity = sparsity
        kept[sparsity] = float(mask.gates(weight).mean())
    assert kept[0.0] == 1.0
    assert kept[0.2] > kept[0.8]
    mask.sparsity = 0.5
    before = mask._cut_point(weight.square())
    torch.testing.assert_close(mask._cut_point((3 * weight).square()), 9 * before)


def test_the_probability_says_how_much_is_open_on_average(hamiltonian: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(_WEIGHTS[hamiltonian])
    mask = make(weight.shape, hamiltonian)
    probability = mask.probability(weight)
    assert probability.shape == mask.shape
    if hamiltonian != "unstructured":
        torch.testing.assert_close(probability.mean(), mask.gates(weight).mean())


# Annealing and errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hamiltonian", "start", "end"), [("unstructured", 1.0, 1e4), ("kernel", 1.0, 1e4), ("filter", 10**-2.5, 1.0)]
)
def test_beta_grows_exponentially_and_is_held(hamiltonian: str, start: float, end: float) -> None:
    mask = make(_WEIGHTS[hamiltonian], hamiltonian)
    assert mask.beta == pytest.approx(start)
    mask.advance(0.32)
    assert mask.beta == pytest.approx(math.sqrt(start * end))
    for progress in (0.64, 0.9, 1.0):
        mask.advance(progress)
        assert mask.beta == pytest.approx(end)


def test_the_coupling_is_the_published_one_by_default() -> None:
    assert [make(_WEIGHTS[kind], kind).coupling for kind in ("kernel", "filter")] == [0.01, 1.0]
    assert make(_WEIGHTS["kernel"], "kernel", coupling=0.3).coupling == 0.3


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"beta": Schedule(10.0, 1.0)}, "beta may not fall.*10.0 to 1.0"),
        ({"beta": Schedule(0.0, 1.0)}, "inverse temperature is above 0, 0.0 is not"),
        ({"beta": -1.0}, "inverse temperature is above 0"),
        ({"annealing": 0.0}, "annealing"),
        ({"coupling": -1.0}, "coupling"),
        ({"sweeps": 0}, "sweeps"),
        ({"hamiltonian": "channel"}, "hamiltonian"),
    ],
)
def test_options_that_anneal_nothing_are_errors(wrong: dict[str, object], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        GibbsOptions(**wrong)


@pytest.mark.parametrize(
    ("hamiltonian", "granularity", "shape", "rule"),
    [
        ("unstructured", KERNEL, (4, 3, 3, 3), r"'unstructured' goes with granularity 'element'"),
        ("kernel", ELEMENT, (4, 3, 3, 3), r"'kernel' goes with granularity 'kernel'"),
        ("filter", ELEMENT, (4, 3, 3, 3), r"'filter' goes with granularity \[1, -1, -1, -1\]"),
        ("filter", granularity_of([2, -1, -1, -1]), (4, 3, 3, 3), r"'filter' goes with granularity \[1, -1, -1, -1\]"),
        ("filter", OUT_CHANNEL, (4, 3), r"'filter' needs convolutions.*\(4, 1\).*exclude linear layers"),
        ("unstructured", None, (4,), r"granularity 'out_channel'.*GibbsMask are functions of one layer's weight"),
    ],
)
def test_a_hamiltonian_needs_its_own_units(
    hamiltonian: str, granularity: SparsityType | None, shape: tuple[int, ...], rule: str
) -> None:
    gates = shape if granularity is None else granularity.latent_shape(shape)
    with pytest.raises(ConfigError, match=rule):
        GibbsMask(gates, GibbsOptions(hamiltonian=hamiltonian), NoiseSource(), 0, granularity)


def test_the_filters_of_one_layer_can_be_named_in_two_ways() -> None:
    for granularity in (OUT_CHANNEL, FILTERS):
        mask = GibbsMask((4, 1, 1, 1), GibbsOptions(hamiltonian="filter"), NoiseSource(), 0, granularity)
        assert mask.gates(torch.ones(4, 3, 3, 3)).shape == (4, 1, 1, 1)
