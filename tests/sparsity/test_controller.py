from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gumbel_plugin.masks.base import NoiseSource, Phase
from gumbel_plugin.masks.gumbel_softmax import GumbelSoftmaxMask, GumbelSoftmaxOptions
from gumbel_plugin.sparsity.budget import Budget, BudgetTerm
from gumbel_plugin.sparsity.controller import BudgetConfig, BudgetController
from gumbel_plugin.sparsity.steered_gates import SteeredChannels, SteeredGates, root_mean_square
from gumbel_plugin.training.bank import GateBank, GateSlice

KINDS = (SteeredGates, SteeredChannels)


def term(name: str, logits: list[float] | Tensor, cost: float = 1.0, **limits: Any) -> BudgetTerm:
    latents = torch.as_tensor(logits, dtype=torch.float32)
    mask = GumbelSoftmaxMask(latents.shape, GumbelSoftmaxOptions(), NoiseSource(), 0)
    mask.logit.data = latents.clone()
    mask.phase = Phase.LEARNING
    return BudgetTerm(name, mask, None, cost, **limits)


def steered(kind: type[SteeredGates], budgets: list[Budget]) -> SteeredGates:
    """Return the budgets' gates; those of channels lie in a bank."""
    if kind is SteeredChannels:
        terms = [each for budget in budgets for each in budget.terms]
        mask = term("bank", torch.cat([each.mask.logit.detach() for each in terms])).mask
        slices = {each.name: GateSlice(each.units) for each in terms}
        GateBank(mask, slices)
        for each in terms:
            each.mask = slices[each.name]
    return kind(budgets)


def usage(budget: Budget) -> float:
    return float(budget.usage([each.mask.decide(None).float() for each in budget.terms]))


# Targets ----------------------------------------------------------------------------------------------------------


def test_the_target_falls_from_whole_to_the_ratio_over_the_ramp() -> None:
    controller = BudgetController(
        [Budget("a", [term("a", [0.0] * 10)], 0.9), Budget("b", [term("b", [0.0])])], BudgetConfig()
    )
    assert len(controller.budgets) == 1  # what has no ratio is not steered
    assert controller.targets(0.0) == [1.0]
    halfway = 0.1 ** (1 - (1 - 0.5) ** 3)  # Zhu and Gupta's cubic, in log density
    assert controller.targets(0.4) == pytest.approx([halfway])
    assert controller.targets(0.8) == pytest.approx([0.1])
    assert controller.targets(1.0) == pytest.approx([0.1])
    at_once = BudgetController(controller.budgets, BudgetConfig(ramp=0))
    assert at_once.targets(0.0) == pytest.approx([0.1])


def test_settings_of_the_former_multiplier_are_read_and_said_to_do_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = BudgetConfig.model_validate({"ratio": 0.5, "strength": 2.0, "multiplier_rate": 0.1})
    assert config == BudgetConfig(ratio=0.5)
    assert "strength has no effect" in caplog.text


# The projection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(
    parts=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1.0, 2.0, 3.5])), min_size=1, max_size=4),
    percent=st.integers(1, 99),
    seed=st.integers(0, 5),
)
def test_the_lowest_threshold_that_fits_is_found_as_brute_force_finds_it(
    kind: type[SteeredGates], parts: list[tuple[int, float]], percent: int, seed: int
) -> None:
    torch.manual_seed(seed)
    budget = Budget("all", [term(str(n), torch.randn(units), cost) for n, (units, cost) in enumerate(parts)], 0.5)
    gates = steered(kind, [budget])
    latents, target = gates.latents(), percent / 100
    gates.write(gates.on_budget(latents, torch.tensor([target])))

    def open_at(threshold: float) -> list[Tensor]:
        """Keep what reaches the threshold, and the highest of each term."""
        scores = latents.split([units for units, _ in parts])
        return [(own >= min(threshold, float(own.max()))).float() for own in scores]

    candidates = [*sorted(latents.tolist()), float("inf")]
    expected = next((o for t in candidates if float(budget.usage(o := open_at(t))) <= target * (1 + 1e-6)), None)
    kept = [each.mask.decide(None).float() for each in budget.terms]
    for ours, theirs in zip(kept, expected or open_at(float("inf")), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_limits_hold_after_the_projection(kind: type[SteeredGates]) -> None:
    low = term("low", [-float(n) for n in range(10)], max_ratio=0.3)
    high = term("high", [100.0 + n for n in range(10)], min_ratio=0.2)
    gates = steered(kind, [Budget("all", [low, high], 0.5)])
    gates.write(gates.on_budget(gates.latents(), torch.tensor([0.5])))
    assert low.mask.decide(None).tolist() == [True] * 7 + [False] * 3
    assert high.mask.decide(None).tolist() == [False] * 7 + [True] * 3


def test_what_stays_of_channels_is_a_multiple() -> None:
    torch.manual_seed(0)
    terms = [term("a", torch.randn(32), multiple=8), term("b", torch.randn(24), multiple=8)]
    gates = steered(SteeredChannels, [Budget("all", terms, 0.5)])
    gates.write(gates.on_budget(gates.latents(), torch.tensor([0.5])))
    counts = [int(each.mask.decide(None).sum()) for each in terms]
    assert all(count % 8 == 0 and count > 0 for count in counts)
    assert sum(counts) == 24  # the highest multiple of 8 that is at most half of 56


def test_budgets_of_their_own_do_not_touch_each_other() -> None:
    torch.manual_seed(0)
    budgets = [Budget(name, [term(name, torch.randn(50) + n)], 0.5) for n, name in enumerate("ab")]
    together = SteeredGates(budgets)
    latents = together.on_budget(together.latents(), torch.tensor([0.5, 0.2]))
    for number, (budget, target) in enumerate(zip(budgets, (0.5, 0.2), strict=True)):
        alone = SteeredGates([budget])
        expected = alone.on_budget(alone.latents(), torch.tensor([target]))
        kept = latents.split(50)[number] >= 0
        assert torch.equal(kept, expected >= 0)
        assert int(kept.sum()) == 50 * target


def test_only_equal_latents_are_moved_and_their_order_stays() -> None:
    values = torch.tensor([3.0, 1.0, 3.0, 1.001, 1.0, 5.0])
    moved = SteeredGates([Budget("a", [term("a", values)], 0.5)]).without_ties()
    assert len(moved.unique()) == len(values)
    assert float((moved - values).abs().max()) <= 0.01
    assert torch.equal(moved[[3, 5]], values[[3, 5]])
    assert torch.equal(values[moved.argsort()], values.sort().values)


# The price --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_priced_step_leaves_the_expected_cost_where_it_is(kind: type[SteeredGates]) -> None:
    torch.manual_seed(0)
    budgets = [
        Budget("one", [term("a", torch.randn(20), 1.0), term("b", torch.randn(10), 5.0)], 0.5),
        Budget("two", [term("c", torch.randn(15), 2.0)], 0.5),
    ]
    gates = steered(kind, budgets)
    latents = gates.latents().requires_grad_()
    priced = gates.priced(torch.randn(45), latents.detach())
    assert float(root_mean_square(priced)) == pytest.approx(1.0)
    for budget, part in zip(budgets, (slice(0, 30), slice(30, 45)), strict=True):
        sizes = [each.units for each in budget.terms]
        expected = budget.usage(torch.sigmoid(latents[part]).split(sizes))
        (slope,) = torch.autograd.grad(expected, latents)
        assert abs(float((slope * priced).sum())) < 1e-6 * float((slope * priced).abs().sum())


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3])
def test_the_size_of_the_loss_cancels_out(scale: float) -> None:
    torch.manual_seed(0)
    gates = SteeredGates([Budget("all", [term("a", torch.randn(40)), term("b", torch.randn(20), 3.0)], 0.5)])
    gradients = torch.randn(60)
    expected = gates.priced(gradients, gates.latents())
    torch.testing.assert_close(gates.priced(scale * gradients, gates.latents()), expected)


def test_of_two_kinds_of_units_the_better_bargain_rises() -> None:
    heads, channels = term("heads", [0.0] * 4, cost=100.0), term("channels", [0.0] * 50, cost=1.0)
    gates = SteeredGates([Budget("all", [heads, channels], 0.5)])
    benefit = torch.tensor([10.0] * 4 + [0.5] * 50)  # a head is worth 20 channels, but costs 100
    movement = -gates.priced(-benefit, gates.latents())
    assert bool((movement[:4] < 0).all())
    assert bool((movement[4:] > 0).all())


def test_a_layer_without_a_gradient_leaves_those_of_the_others_priced() -> None:
    torch.manual_seed(0)
    used, unused = term("used", torch.randn(20)), term("unused", torch.randn(10))
    controller = BudgetController([Budget("all", [used, unused], 0.5)], BudgetConfig())
    controller.begin(0.5)
    gradient = torch.randn(20)
    used.mask.logit.grad = gradient.clone()
    (gates,) = controller.gates
    expected = gates.priced(torch.cat([gradient, torch.zeros(10)]), gates.latents())
    controller.before_step()
    torch.testing.assert_close(used.mask.logit.grad, expected[:20])
    assert unused.mask.logit.grad is None  # its optimizer lets it be


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_written_to_the_bit(kind: type[SteeredGates]) -> None:
    torch.manual_seed(0)
    gates = steered(kind, [Budget("all", [term("a", 1e3 * torch.randn(50)), term("b", torch.randn(20))], 0.5)])
    latents = torch.randn(70)
    gates.write(latents)
    assert torch.equal(gates.latents(), latents)


# Learning ---------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.05, eps=1e-16),
    "fast adam": lambda parameters: torch.optim.Adam(parameters, 0.3, eps=1e-16),
}


def learn(optimizer: str, steps: int, scale: float, ratio: float = 0.75) -> tuple[Budget, list[float], Tensor]:
    """Learn which of 64 units of two costs to keep; each is worth something of its own. Return what was kept."""
    torch.manual_seed(1)
    worth = torch.rand(64)
    terms = [term("cheap", [0.0] * 32, cost=1.0), term("dear", [0.0] * 32, cost=4.0)]
    budget = Budget("all", terms, ratio)
    controller = BudgetController([budget], BudgetConfig())
    stepper = OPTIMIZERS[optimizer]([each.mask.logit for each in terms])
    controller.begin(0.0)
    off = []
    for step in range(steps):
        for each in terms:
            each.mask.noise.forward += 1
        gates = torch.cat([each.mask.gates() for each in terms])
        loss = -scale * (worth * gates).sum()
        stepper.zero_grad()
        loss.backward()
        controller.before_step()
        stepper.step()
        controller.step((step + 1) / steps, steps)
        off.append(usage(budget) - controller.targets((step + 1) / steps)[0])
    value = worth / torch.tensor([1.0] * 32 + [4.0] * 32)
    return budget, off, value


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [50, 200])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_gates_are_on_budget_at_every_step(optimizer: str, steps: int, scale: float) -> None:
    budget, off, value = learn(optimizer, steps, scale)
    assert max(off) <= 1e-6
    assert min(off) >= -4 / budget.total  # one unit
    cut = budget.cut()
    changed = sum(int((cut[each.name] != each.mask.decide(None)).sum()) for each in budget.terms)
    assert changed <= 1  # of 64: the cut may fill a gap that the threshold left
    kept = torch.cat([each.mask.decide(None) for each in budget.terms])
    assert float(value[kept].mean()) > 2 * float(value[~kept].mean())


def test_neither_the_size_of_the_loss_nor_the_rate_decides_what_stays() -> None:
    kept = []
    for optimizer, scale in (("adam", 1.0), ("adam", 1e-3), ("adam", 1e3), ("fast adam", 1.0)):
        budget, _, _ = learn(optimizer, 200, scale)
        kept.append(torch.cat([each.mask.decide(None) for each in budget.terms]))
    assert all(float((each == kept[0]).float().mean()) >= 0.98 for each in kept)


def test_samples_and_hard_gates_are_one_before_the_cut() -> None:
    budget, _, _ = learn("adam", 100, 1.0)
    for each in budget.terms:
        assert torch.equal(each.mask.gates().detach() > 0, each.mask.decide(None))
        probability = each.mask.probability(None).detach()
        assert float((probability - each.mask.decide(None).float()).abs().max()) < 0.5


def test_gates_that_no_optimizer_holds_stay_on_budget_all_the_same() -> None:
    budget = Budget("a", [term("a", torch.randn(20))], 0.5)
    controller = BudgetController([budget], BudgetConfig())
    controller.begin(0.0)
    for step in range(10):
        controller.before_step()
        controller.step((step + 1) / 10, 10)
    assert usage(budget) == 0.5

    assert not controller.has_moved
