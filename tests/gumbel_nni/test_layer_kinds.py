"""Layer kinds beside NNI's own: the ``Conv1D`` of transformers, and classes derived from known ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from torch import nn

from gumbel_plugin import GumbelPruner
from gumbel_plugin.layers.geometry import layer_channels
from tests.graph.test_input_major import chain
from tests.gumbel_nni.helpers import evaluator_of


@pytest.mark.parametrize("config", [{"op_types": ["Conv1D"]}, {"op_names": ["0", "2"]}])
def test_through_nnis_door(config: dict[str, Any]) -> None:
    model, x = chain(), torch.randn(8, 5)
    exclude = {"exclude_op_names": ["4"]} if "op_types" in config else {}
    pruner = GumbelPruner(model, [{**config, **exclude, "sparse_ratio": 0.5}], evaluator_of(model, x), example_inputs=x)
    _, masks = pruner.compress(max_steps=8)
    assert masks["0"]["weight"].shape == (5, 8)
    small: Any = pruner.speedup(x)
    assert [layer_channels(small[place]) for place in (0, 2, 4)] == [(5, 4), (4, 3), (3, 2)]


def test_nnis_own_pruner_counts_its_outputs() -> None:
    model = chain()
    _, masks = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}]).compress()
    assert masks["0"]["weight"].shape == (5, 8)
    assert torch.equal(masks["0"]["weight"].amax(0), masks["0"]["bias"])
    assert int(masks["0"]["bias"].sum()) == 4


def test_layers_derived_from_known_ones_are_taken_by_nni() -> None:
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(5, 8), nn.ReLU(), Mine(8, 2))
    x = torch.randn(8, 5)
    config = [{"op_types": ["Mine"], "exclude_op_names": ["2"], "sparse_ratio": 0.5}]
    pruner = GumbelPruner(model, config, evaluator_of(model, x), example_inputs=x)
    pruner.compress(max_steps=8)
    small: Any = pruner.speedup(x)
    assert small[0].out_features == 4


def test_single_weights_are_masked_too() -> None:
    model, x = chain(), torch.randn(8, 5)
    entry = {"op_types": ["Conv1D"], "granularity": "element", "sparse_ratio": 0.5}
    pruner = GumbelPruner(model, [entry], evaluator_of(model, x))
    _, masks = pruner.compress(max_steps=8)
    assert int(masks["0"]["weight"].sum()) == 20
