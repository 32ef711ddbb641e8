"""N:M sparsity through NNI's pruner: its schema sees single weights, and the masks keep n of every m."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gumbel_plugin import GumbelPruner
from tests.gumbel_nni.helpers import evaluator_of


@pytest.mark.parametrize("ratio", [{}, {"sparse_ratio": 0.5}])
def test_two_of_every_four_weights_stay(ratio: dict[str, float]) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(16, 8)

    pruner = GumbelPruner(model, [{"op_names": ["0"], "granularity": "2:4", **ratio}], evaluator_of(model, inputs))
    _, masks = pruner.compress(5, None)
    assert bool((masks["0"]["weight"].reshape(6, 2, 4).sum(-1) == 2).all())
