"""What is refused leaves the model as it was, and masks that NNI cannot remove leave nevertheless."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from torch import Tensor, nn

import gumbel_nni
from gumbel_plugin import GumbelPruner, shrink
from gumbel_plugin.errors import ConfigError, GraphError, TargetError
from gumbel_plugin.shrinking.mask_file import save_masks

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
RULE = {"op_names": ["0"], "sparse_ratio": 0.5}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))


def following(name: str, source: str) -> dict[str, Any]:
    align = {"module_name": source, "target_name": "weight", "dims": [0]}
    return {"op_names": [name], "target_settings": {"weight": {"align": align}}}


class TestConstruction:
    def test_a_refused_one_leaves_a_plain_model(self) -> None:
        model = network()
        with pytest.raises(TargetError, match="aligned with '22'"):
            GumbelPruner(model, [RULE, following("4", "22")], example_inputs=IMAGES)
        GumbelPruner(model, [RULE], example_inputs=IMAGES).unwrap_model()

    def test_a_follower_that_is_not_there(self) -> None:
        with pytest.raises(TargetError, match="op_names: '9' matches no module"):
            GumbelPruner(network(), [RULE, following("9", "0")], example_inputs=IMAGES)

    def test_exclusions_of_nnis_older_format(self) -> None:
        rules = [{"op_types": ["Conv2d"], "sparsity": 0.5}, {"op_names": ["4"], "exclude": True}]
        pruner = GumbelPruner(network(), rules, example_inputs=IMAGES)
        assert sorted(pruner.session.plan.masks) == sorted(L1NormPruner(network(), rules).get_masks()) == ["0", "2"]

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ([None], r"config_list\.0 is a NoneType; each entry must be a mapping"),
            ([{**RULE, "target_names": ["bias"]}], "learned masks cover 'weight' and follow on 'bias'"),
        ],
    )
    def test_entries(self, rules: list[Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            GumbelPruner(network(), rules, example_inputs=IMAGES)

    def test_a_model_that_cannot_be_copied(self) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        model.derived = model[0].weight * 2  # as old-style weight norm leaves one behind
        with pytest.raises(GraphError, match="cannot be copied: 'derived' is a tensor computed"):
            GumbelPruner(model, [RULE], example_inputs=torch.randn(2, 3))


class TestMasks:
    @pytest.mark.parametrize(
        "masks",
        [
            {"0": torch.ones(8, 3, 3, 3)},
            [{}],
            None,
            {"0": None},
            {0: {"weight": torch.ones(2)}},
            {"0": {"weight": [1, 0]}},
        ],
    )
    def test_what_are_none(self, masks: Any, tmp_path: Any) -> None:
        pruner = GumbelPruner(network(), [RULE], example_inputs=IMAGES)
        for use in (
            lambda: shrink(network(), masks, IMAGES),
            lambda: gumbel_nni.speedup(network(), masks, IMAGES),
            lambda: save_masks(tmp_path / "masks", masks),
            lambda: pruner.update_masks(masks),
        ):
            with pytest.raises(TargetError, match=r"masks (of module|are a)"):
                use()
        assert not list(tmp_path.iterdir())

    def test_on_weights_that_are_computed(self) -> None:
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3)), nn.ReLU(), nn.Conv1d(8, 2, 1))
        mask = torch.ones(8, 4, 3)
        mask[:4] = 0
        with pytest.raises(TargetError, match=r"0\.weight, which is computed from other parameters"):
            shrink(model, {"0": {"weight": mask}}, torch.randn(4, 4, 10))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale, self.b = nn.Conv2d(3, 8, 3), nn.Parameter(torch.rand(8, 1, 1)), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) * self.scale)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x.mul_(0.5)
        return self.b(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (LayerScale(), "does not run"),  # NNI does not cut parameters outside of layers
        (InPlace(), "it leaves 256 parameters"),
        (LayerScale().bfloat16(), "cannot shrink"),
    ],
)
def test_what_nni_cannot_remove_leaves_nevertheless(model: nn.Module, reason: str, caplog: Any) -> None:
    columns = torch.ones(4, 8, 3, 3)
    columns[:, :4] = 0
    inputs = IMAGES.to(next(model.parameters()).dtype)
    with caplog.at_level(logging.WARNING):
        small = gumbel_nni.speedup(model, {"b": {"weight": columns}}, inputs, backend="nni")
    assert small.a.out_channels == 4
    assert reason in caplog.text
    assert "Torch-Pruning's functions do it" in caplog.text
    caplog.clear()  # expected here only, see conftest
