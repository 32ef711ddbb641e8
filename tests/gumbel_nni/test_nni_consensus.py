"""Gates of samples through `GumbelPruner`: inside NNI's wrappers, and in its masks."""

from __future__ import annotations

import pytest
import torch

from gumbel_nni import GumbelPruner
from gumbel_plugin import verify_equivalence
from gumbel_plugin.graph.record import removed_blocks
from gumbel_plugin.runs.models import CifarResNet
from tests.gumbel_nni.helpers import evaluator_of

pytestmark = pytest.mark.slow

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("unit", ["block", "channel"])
def test_gates_learn_inside_the_wrappers_and_what_they_close_leaves(unit: str) -> None:
    torch.manual_seed(0)
    model = CifarResNet(2)
    keys = set(model.state_dict())
    rule = {"op_types": ["ResidualBlock"]} if unit == "block" else {"op_names_re": [r".*conv1"]}
    config = {
        "pruning": {
            "method": "consensus",
            "options": {"unit": unit},
            "config_list": [{**rule, "sparse_ratio": 0.5}],
        }
    }
    evaluator = evaluator_of(model, IMAGES, torch.arange(6), torch.optim.SGD)
    pruner = GumbelPruner(model, config, evaluator, example_inputs=IMAGES)
    _, masks = pruner.compress(max_steps=3)
    assert all(int(mask.batches) == 3 for mask in pruner.session.plan.masks.values())
    closed = [name for name, mask in pruner.session.plan.masks.items() if not mask.hard.any()]
    if unit == "block":
        assert len(closed) == 2
        assert set(masks) == {f"{name}.bn2" for name in pruner.session.plan.masks}
        for name in pruner.session.plan.masks:
            assert bool(masks[f"{name}.bn2"]["weight"].any()) == (name not in closed)
    small = pruner.speedup(IMAGES)  # verifies
    assert removed_blocks(small) == tuple(closed)
    pruner.unwrap_model()
    assert set(model.state_dict()) == keys
    assert verify_equivalence(model.eval(), small.eval(), IMAGES).passed
