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
