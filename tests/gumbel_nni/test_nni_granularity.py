"""Weights are cut into units as NNI cuts them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nni.compression.utils import Scaling

from gumbel_plugin.sparsity.types import ELEMENT, IN_CHANNEL, KERNEL, OUT_CHANNEL, SparsityType, granularity_of
from tests.sparsity.test_types import blocks

# Our granularities in NNI's own words: (kernel_size, padding mode, padding value).
NAMED = {
    "element": (ELEMENT, Scaling([1], "front", 1)),
    "kernel": (KERNEL, Scaling([1, 1], "back", -1)),
    "out_channel": (OUT_CHANNEL, Scaling([1], "back", -1)),
    "in_channel": (IN_CHANNEL, Scaling([-1, 1], "back", -1)),
}


def assert_same_as_nni(granularity: SparsityType, nni: Scaling, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, dtype=torch.float64)
    theirs = nni.shrink(values, lambda x: x.sum(-1), keepdim=True)
    ours = granularity.reduce(values)
    assert ours.shape == theirs.shape == granularity.latent_shape(shape)
    torch.testing.assert_close(ours, theirs)
    gates = torch.randn(ours.shape)
    spread = granularity.expand(gates, shape)
    torch.testing.assert_close(spread.expand(shape), nni.expand(gates, list(shape), keepdim=True), rtol=0, atol=0)


@pytest.mark.slow
@given(blocks(), st.integers(0, 5))
def test_blocks_are_cut_as_nni_cuts_them(case: tuple[list[int], tuple[int, ...]], seed: int) -> None:
    steps, shape = case
    torch.manual_seed(seed)
    assert_same_as_nni(granularity_of(steps), Scaling(steps, "front", 1), shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
@given(shape=st.lists(st.integers(1, 4), min_size=2, max_size=5))
def test_named_granularities_are_cut_as_nni_cuts_them(name: str, shape: list[int]) -> None:
    granularity, nni = NAMED[name]
    assert granularity_of(name) == granularity
    assert_same_as_nni(granularity, nni, tuple(shape))
