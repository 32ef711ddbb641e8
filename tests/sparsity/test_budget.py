from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gumbel_plugin.masks.base import NoiseSource, Phase
from gumbel_plugin.masks.gumbel_softmax import GumbelSoftmaxMask, GumbelSoftmaxOptions
from gumbel_plugin.sparsity.budget import Budget, BudgetTerm, cost_to_prune, count_to_prune
from gumbel_plugin.sparsity.controller import BudgetConfig, BudgetController


def term(name: str, logits: list[float], cost: float = 1.0, most: float = 1.0, least: float = 0.0) -> BudgetTerm:
    mask = GumbelSoftmaxMask((len(logits),), GumbelSoftmaxOptions(), NoiseSource(), 0)
    mask.logit.data = torch.tensor(logits)
    mask.phase = Phase.LEARNING
    return BudgetTerm(name, mask, None, cost, most, least)


def spread(count: int, seed: int = 0) -> list[float]:
    """Return distinct scores in random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).sub(count / 2).tolist()


def closed(gates: torch.Tensor) -> int:
    return int((~gates).sum())


# Portions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "ratio", "expected"),
    [(100, 0.29, 29), (1000, 0.57, 570), (10, 0.95, 9), (7, 0.5, 3), (3, 0.0, 0), (10, 0.1, 1)],
)
def test_a_portion_does_not_lose_one_to_the_ratios_rounding(count: int, ratio: float, expected: int) -> None:
    assert count_to_prune(count, ratio) == expected
    assert cost_to_prune(float(count), ratio) == expected


@given(st.integers(1, 10**6), st.integers(0, 1000))
def test_a_portion_is_what_exact_arithmetic_says(count: int, thousandths: int) -> None:
    assert count_to_prune(count, thousandths / 1000) == count * thousandths // 1000


# The cut ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.29, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("cost", [1.0, 9.0, 2.5])
def test_a_layer_loses_exactly_its_lowest_scores(ratio: float, cost: float) -> None:
    scores = spread(100)
    gates = Budget("a", [term("a", scores, cost)], ratio).cut()["a"]
    gone = count_to_prune(100, ratio)
    assert closed(gates) == gone
    assert sorted(s for s, kept in zip(scores, gates.tolist(), strict=True) if not kept) == sorted(scores)[:gone]


def test_a_shared_budget_ranks_the_units_of_all_layers_together() -> None:
    first, second = term("a", [5.0, 1.0, 3.0, 7.0]), term("b", [2.0, 8.0, 0.0, 9.0, 6.0, 10.0])
    cut = Budget("all", [first, second], 0.4).cut()
    assert cut["a"].tolist() == [True, False, False, True]  # 0, 1, 2, 3 go
    assert cut["b"].tolist() == [False, True, False, True, True, True]


def test_the_masks_keep_their_shape() -> None:
    mask = GumbelSoftmaxMask((4, 3, 1), GumbelSoftmaxOptions(), NoiseSource(), 0)
    mask.logit.data = torch.arange(12.0).view(4, 3, 1)
    gates = Budget("a", [BudgetTerm("a", mask, None)], 0.5).cut()["a"]
    assert gates.shape == (4, 3, 1)
    assert gates.flatten().tolist() == [False] * 6 + [True] * 6


def test_least_and_most_hold_for_each_layer_and_the_ratio_for_all() -> None:
    low, high = term("low", [float(-n) for n in range(1, 11)], most=0.3), term("high", spread(10), least=0.2)
    high.mask.logit.data += 100
    cut = Budget("all", [low, high], 0.5).cut()
    assert closed(cut["low"]) == 3
    assert closed(cut["high"]) == 7
    loose = Budget("all", [low, high], 0.05).cut()
    assert (closed(loose["low"]), closed(loose["high"])) == (0, 2)  # the least of `high` is more than the whole ratio


def test_a_layer_keeps_one_unit_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    small, large = term("small", [-3.0, -2.0, -1.0]), term("large", spread(30))
    large.mask.logit.data += 100
    with caplog.at_level(logging.WARNING):
        cut = Budget("all", [small, large], 0.5).cut()
    assert cut["small"].tolist() == [False, False, True]
    assert closed(cut["large"]) == count_to_prune(33, 0.5) - 2
    assert [r.message for r in caplog.records] == ["small would lose its last unit; it keeps one"]


def test_a_layer_that_is_meant_to_keep_one_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert closed(Budget("a", [term("a", spread(10))], 0.9).cut()["a"]) == 9
    assert not caplog.records


def test_without_a_ratio_the_gates_decide(caplog: pytest.LogCaptureFixture) -> None:
    logits = [-1.0, 0.0, 1.0, 2.0]
    assert Budget("a", [term("a", logits)]).cut()["a"].tolist() == [False, True, True, True]
    threshold = 1 / (1 + math.exp(-1.5))
    assert Budget("a", [term("a", logits)], threshold=threshold).cut()["a"].tolist() == [False, False, False, True]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert Budget("a", [term("a", [-3.0, -1.0])]).cut()["a"].tolist() == [False, True]
    assert "keeps one" in caplog.text


costs = st.sampled_from([1.0, 2.0, 9.0, 27.0, 3.5])


@given(
    st.lists(st.tuples(st.integers(1, 8), costs), min_size=1, max_size=4),
    st.integers(0, 99),
    st.integers(0, 3),
)
def test_mixed_costs_meet_the_ratio_as_brute_force_does(
    parts: list[tuple[int, float]], percent: int, seed: int
) -> None:
    ratio = percent / 100
    total_units = sum(count for count, _ in parts)
    scores = torch.tensor(spread(total_units, seed))
    own = scores.split([count for count, _ in parts])
    terms = [term(str(n), own[n].tolist(), cost) for n, (_, cost) in enumerate(parts)]
    cut = Budget("all", terms, ratio).cut()

    one_cost = len({cost for _, cost in parts}) == 1
    total = sum(count * cost for count, cost in parts)
    goal = count_to_prune(total_units, ratio) * parts[0][1] if one_cost else cost_to_prune(total, ratio)
    left, gone = {m.name: m.units for m in terms}, 0.0
    expected = {m.name: torch.ones(m.units, dtype=torch.bool) for m in terms}
    units = sorted((s, m, n) for m in terms for n, s in enumerate(m.mask.logit.tolist()))
    for _, m, n in units:
        if gone < goal - 1e-6 and left[m.name] > 1:
            left[m.name] -= 1
            gone += m.cost
            expected[m.name][n] = False
    for name, gates in expected.items():
        assert torch.equal(cut[name], gates)


# The loss ---------------------------------------------------------------------------------------------------------


def test_the_density_counts_open_gates_and_moves_the_mean_probability() -> None:
    first, second = term("a", [-1.0, 0.5, 2.0], cost=4.0), term("b", [0.3, -0.2], cost=1.0)
    budget = Budget("all", [first, second], 0.5)
    density = budget.density()
    torch.testing.assert_close(density.detach(), torch.tensor((2 * 4 + 1) / (3 * 4 + 2)))
    logits = [first.mask.logit, second.mask.logit]
    mean = (torch.sigmoid(logits[0]).sum() * 4 + torch.sigmoid(logits[1]).sum()) / 14
    for ours, theirs in zip(torch.autograd.grad(density, logits), torch.autograd.grad(mean, logits), strict=True):
        torch.testing.assert_close(ours, theirs)


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


@pytest.mark.slow
def test_multipliers_come_equally_far_however_long_the_mask_learning_is() -> None:
    reached = []
    for length in (400, 1600, None):
        controller = BudgetController([Budget("a", [term("a", [1.0, 1.0, 1.0, -1.0])], 0.5)], BudgetConfig())
        for _ in range(length or 1600):
            controller.loss(1.0)
            controller.step(length)
        reached += controller.multipliers.tolist()
    violation = math.log(0.75 / 0.5)
    assert reached == pytest.approx([16 * violation] * 3, rel=1e-3)


def test_the_loss_is_the_augmented_lagrangian_of_the_log_densities() -> None:
    budget = Budget("a", [term("a", [1.0, 1.0, 1.0, -1.0])], 0.5)
    controller = BudgetController([budget], BudgetConfig(strength=2.0, multiplier_rate=0.1))
    violation = math.log(0.75 / 0.5)
    assert float(controller.loss(1.0).detach()) == pytest.approx(2 * violation**2)
    controller.step()
    assert float(controller.loss(1.0).detach()) == pytest.approx(0.1 * violation * violation + 2 * violation**2)
    controller.step()
    controller.step()  # without a new loss there is nothing to follow
    assert controller.multipliers.tolist() == pytest.approx([0.2 * violation])


def test_far_from_the_target_the_pull_is_constant() -> None:
    gated = term("a", [3.0] * 100)
    controller = BudgetController([Budget("a", [gated], 0.99)], BudgetConfig(strength=2.0, multiplier_rate=0.1))
    violation = math.log(1 / 0.01)
    loss = controller.loss(1.0)
    assert float(loss.detach()) == pytest.approx(2 * (violation - 0.25))  # 2·½·v − ½², joined to v² at ½
    (gradient,) = torch.autograd.grad(loss, gated.mask.logit)
    probability = 1 / (1 + math.exp(-3))
    assert gradient.tolist() == pytest.approx([2 * probability * (1 - probability) / 100] * 100)
    controller.step()
    assert controller.multipliers.tolist() == pytest.approx([0.1 * 0.5])


def test_without_a_budget_there_is_no_loss() -> None:
    controller = BudgetController([Budget("a", [term("a", [1.0])])], BudgetConfig())
    assert controller.loss(1.0) is None
    controller.step()


@pytest.mark.parametrize(("logit", "sign"), [(3.0, 1.0), (-3.0, -1.0)])
def test_too_open_is_pushed_down_and_too_closed_up_even_when_everything_is_closed(logit: float, sign: float) -> None:
    gated = term("a", [logit] * 10)
    loss = BudgetController([Budget("a", [gated], 0.5)], BudgetConfig()).loss(1.0)
    (gradient,) = torch.autograd.grad(loss, gated.mask.logit)
    assert bool((gradient * sign > 0).all())


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.5, 0.95])
def test_the_controller_drives_a_toy_problem_to_its_target(ratio: float) -> None:
    """Every gate pulls towards open with its own strength; the budget must win, and close the weak ones."""
    torch.manual_seed(0)
    gated = term("a", [3.0] * 200)
    strength = torch.linspace(0, 0.1, 200) / 200
    budget = Budget("a", [gated], ratio)
    controller = BudgetController([budget], BudgetConfig())
    optimizer = torch.optim.Adam([gated.mask.logit], lr=0.05)
    for step in range(600):
        gated.mask.noise.forward += 1
        task = -(strength * gated.mask.gates()).sum()
        loss = task + controller.loss(step / 599)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.step()
    kept = gated.mask.decide(None)
    assert abs(float(kept.float().mean()) - (1 - ratio)) <= 0.02
    assert strength[kept].mean() > 1.5 * strength[~kept].mean()
