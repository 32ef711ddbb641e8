from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from gumbel_plugin.sparsity.ranking import count_to_prune, cut_point, keep_highest, removed_count

_scores = st.lists(st.integers(-3, 3), min_size=1, max_size=30)  # few values: ties are common
_ratios = st.integers(0, 99).map(lambda percent: percent / 100)


@given(_scores, _ratios)
def test_the_highest_stay_and_of_equal_ones_the_last(values: list[int], ratio: float) -> None:
    """The oracle is a stable sort, as in a budget's final cut."""
    scores = torch.tensor(values, dtype=torch.float32)
    expected = torch.ones(len(values), dtype=torch.bool)
    expected[torch.argsort(scores, stable=True)[: min(count_to_prune(len(values), ratio), len(values) - 1)]] = False
    assert torch.equal(keep_highest(scores, ratio), expected)


@given(st.permutations(range(20)), _ratios)
def test_above_the_cut_point_lies_what_stays(values: list[int], ratio: float) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).view(4, 5)
    above = tensor > cut_point(tensor, ratio)
    assert torch.equal(above, keep_highest(tensor, ratio))
    assert int((~above).sum()) == removed_count(20, ratio)


def test_the_cut_point_is_half_way() -> None:
    values = torch.tensor([8.0, 1.0, 4.0, 2.0])
    assert cut_point(values, 0.5) == 3.0
    assert cut_point(values, 0.75) == cut_point(values, 0.99) == 6.0
    assert cut_point(values, 0.2) == -torch.inf


def test_gates_keep_their_shape_and_one_always_stays() -> None:
    gates = keep_highest(torch.rand(2, 3, 4), 0.999)
    assert gates.shape == (2, 3, 4)
    assert int(gates.sum()) == 1
