"""The mask method of CONTRIBUTING.md, as it stands there, learns masks and makes a network smaller."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gumbel_plugin import shrink, verify_equivalence
from gumbel_plugin.config import PruningConfig
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.graph.dependency_groups import find_groups
from gumbel_plugin.masks import METHODS, LearnedMask, NoiseSource, Phase
from gumbel_plugin.training.session import MaskingSession

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def coin() -> Iterator[type[LearnedMask]]:
    """The class of the example, registered by what the example itself says."""
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1), names)
    yield names["CoinMask"]
    del METHODS["coin"]


def test_it_has_one_method_and_no_constructor(coin: type[LearnedMask]) -> None:
    assert [name for name, value in vars(coin).items() if callable(value)] == ["sample"]
    assert METHODS["coin"] is coin
    assert coin.method_name == "coin"


def test_its_gates_are_sampled_with_a_gradient(coin: type[LearnedMask]) -> None:
    mask = coin((1000,), coin.Options(), NoiseSource(0), 0)
    mask.phase = Phase.LEARNING
    gates = mask.gates()
    assert set(gates.tolist()) == {0.0, 1.0}
    gates.sum().backward()
    assert bool((mask.logit.grad > 0).all())
    assert abs(float(gates.detach().mean()) - 0.5) < 0.1


@pytest.mark.parametrize("granularity", ["default", "element", "2:4"])
def test_it_learns_masks_that_meet_the_budget(coin: type[LearnedMask], granularity: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs, labels = torch.randn(64, 8), torch.randint(3, (64,))
    entry = {"op_names": ["0", "2"], "granularity": granularity, "sparse_ratio": 0.5}
    config = PruningConfig.load(
        {"pruning": {"method": "coin", "options": {"initial_logit": 2}, "config_list": [entry]}}
    )
    groups = find_groups(model, inputs[:2]) if granularity == "default" else ()
    session = MaskingSession(model, config.pruning, groups)
    session.start(40)
    optimizers = [*session.optimizers(), torch.optim.Adam(session.weight_parameters(), 0.01)]
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(inputs), labels)
        losses.append(loss.item())
        (loss + session.loss()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        session.step()
    assert losses[-1] < losses[0]
    masks = session.extract()
    session.detach()
    for name in ("0", "2"):
        assert float(masks[name]["weight"].mean()) == 0.5
    small = shrink(model, masks, inputs[:2])
    assert verify_equivalence(model, small, inputs[:2]).passed
    expected = [(8, 8), (4, 8), (3, 4)] if granularity == "default" else [(16, 8), (8, 16), (3, 8)]
    assert [tuple(layer.weight.shape) for layer in small if isinstance(layer, nn.Linear)] == expected


def test_two_methods_of_one_name_are_an_error() -> None:
    with pytest.raises(ConfigError, match="'supermask' exists already: Supermask"):
        type("Other", (LearnedMask,), {}, name="supermask")
