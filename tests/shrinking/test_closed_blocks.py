"""Residual blocks whose branch is closed leave the network, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gumbel_plugin import shrink, verify_equivalence
from gumbel_plugin.errors import DataError
from gumbel_plugin.graph.record import removed_blocks
from gumbel_plugin.runs.models import build_model
from gumbel_plugin.shrinking.closed_blocks import find_closed_blocks, remove_closed_blocks
from gumbel_plugin.shrinking.pruned_file import load_pruned, save_pruned
from gumbel_plugin.sparsity.counting import count_macs

pytestmark = pytest.mark.slow

CASES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "resnet20": ("resnet20", {}, {"stage1.1": "bn2", "stage3.2": "bn2"}),
    "resnet20, padded": ("resnet20", {"shortcut": "pad"}, {"stage1.0": "bn2"}),
    "BasicBlock": ("resnet18", {}, {"layer1.0": "bn2", "layer4.1": "bn2"}),
    "Bottleneck": ("resnet50", {}, {"layer1.1": "bn3", "layer3.4": "bn3", "layer3.5": "bn3"}),
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(case: str) -> nn.Module:
    name, options, _ = CASES[case]
    torch.manual_seed(0)
    model = build_model(name, 10, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def masks_of(model: nn.Module, case: str) -> dict[str, dict[str, torch.Tensor]]:
    layers = {f"{block}.{last}": model.get_submodule(f"{block}.{last}") for block, last in CASES[case][2].items()}
    return {n: {"weight": torch.zeros_like(m.weight), "bias": torch.zeros_like(m.bias)} for n, m in layers.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_closed_blocks_leave_as_a_whole(case: str) -> None:
    model = build(case)
    before = copy.deepcopy(model.state_dict())
    masks, gone = masks_of(model, case), CASES[case][2]
    small = shrink(model, masks, IMAGES)  # verifies
    assert removed_blocks(small) == tuple(gone)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name in gone:
        assert isinstance(small.get_submodule(name), nn.ReLU)
        assert not list(small.get_submodule(name).state_dict())
    expected = [name for name in model.state_dict() if not any(name.startswith(f"{block}.") for block in gone)]
    assert list(small.state_dict()) == expected
    branches = sum(count_macs(model, IMAGES) - count_macs(_without(model, block), IMAGES) for block in gone)
    assert count_macs(small, IMAGES) == count_macs(model, IMAGES) - branches


def _without(model: nn.Module, block: str) -> nn.Module:
    smaller = copy.deepcopy(model)
    parent, _, child = block.rpartition(".")
    setattr(smaller.get_submodule(parent), child, nn.Identity())
    return smaller


def test_both_engines_remove_blocks(by_nni: Any) -> None:
    model = build("resnet20")
    masks = masks_of(model, "resnet20")
    masks["stage1.0.bn1"] = {"weight": torch.ones(16), "bias": torch.ones(16)}
    masks["stage1.0.bn1"]["weight"][3:9] = masks["stage1.0.bn1"]["bias"][3:9] = 0
    ours, nnis = shrink(model, masks, IMAGES), shrink(model, masks, IMAGES, engine=by_nni)
    assert removed_blocks(ours) == removed_blocks(nnis) == ("stage1.1", "stage3.2")
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in nnis.named_parameters()}
    assert verify_equivalence(ours, nnis, IMAGES).passed


@pytest.mark.slow
def test_a_branch_with_anything_left_stays() -> None:
    model = build("resnet20")
    masks = masks_of(model, "resnet20")
    masks["stage1.1.bn2"]["bias"][0] = 1
    masks["stage3.2.bn2"]["weight"][0] = 1
    assert removed_blocks(shrink(model, masks, IMAGES)) == ()
    assert find_closed_blocks(model) == {}


def test_a_block_inside_a_block_goes_first() -> None:
    class Residual(nn.Module):
        def __init__(self, inner: nn.Module, last: nn.Module) -> None:
            super().__init__()
            self.inner, self.last = inner, last

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.last(self.inner(x))

    inner, outer = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), Residual(Residual(nn.Linear(4, 4), inner), outer), nn.Linear(4, 2)).eval()
    inputs = torch.randn(3, 4)
    for layer, left in ((inner, "1.inner"), (outer, "1")):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        expected = model(inputs)
        small = copy.deepcopy(model)
        assert remove_closed_blocks(small)[-1] == left
        assert isinstance(small.get_submodule(left), nn.Identity)
        torch.testing.assert_close(small(inputs), expected, rtol=0, atol=0)


def test_a_network_without_blocks_is_saved_and_loaded(tmp_path: Path) -> None:
    model = build("resnet20")
    small = shrink(model, masks_of(model, "resnet20"), IMAGES)
    save_pruned(tmp_path / "small", small)
    again = load_pruned(tmp_path / "small", lambda: build_model("resnet20", 10)).eval()
    assert torch.equal(again(IMAGES), small(IMAGES))
    with pytest.raises(DataError, match=r"has no residual block 'stage1\.1'"):
        load_pruned(tmp_path / "small", lambda: build_model("lenet5"))
