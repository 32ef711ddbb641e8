"""What NNI promises of every pruner, asked of `GumbelPruner` and of NNI's own alike.

Each test is a row of the table, each pruner a column. A cell that NNI's own pruner fails stays in the table, with the
reason (`KNOWN`): it is expected to fail, and the suite fails if it does not any more. `make nni-conformance` writes
the table to docs/nni_conformance.md.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nni.compression import TorchEvaluator
from nni.compression.pruning import (
    AGPPruner,
    L1NormPruner,
    LevelPruner,
    LinearPruner,
    MovementPruner,
    SlimPruner,
    TaylorPruner,
)
from nni.compression.speedup import ModelSpeedup
from torch import Tensor, nn

import gumbel_nni
from gumbel_nni import GumbelPruner
from tests.gumbel_nni.helpers import Masks, evaluator_of

STEPS = 8
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(16, 3, 6, 6, generator=GENERATOR)
LABELS = torch.arange(16) % 4
HIDDEN = ["conv1", "conv2", "conv3"]


class Net(nn.Module):
    """Three convolutions of sixteen channels with batch norms; the last two weights have the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = torch.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


def make_model() -> Net:
    torch.manual_seed(0)
    model = Net()
    for norm in (model.bn1, model.bn2, model.bn3):  # what training makes of them: no shift is zero
        nn.init.normal_(norm.bias, std=0.5)
    return model


def make_evaluator(model: nn.Module) -> TorchEvaluator:
    return evaluator_of(model, INPUTS, LABELS, dummy_input=INPUTS[:2])


Maker = Callable[[nn.Module, list[dict[str, Any]]], Any]
PRUNERS: dict[str, Maker] = {
    "Gumbel": lambda model, rules: GumbelPruner(model, rules, make_evaluator(model)),
    "Level": lambda model, rules: LevelPruner(model, rules, make_evaluator(model)),
    "L1Norm": lambda model, rules: L1NormPruner(model, rules, make_evaluator(model)),
    "Slim": lambda model, rules: SlimPruner(
        model, rules, make_evaluator(model), training_steps=STEPS - 2, regular_scale=0.01
    ),
    "Taylor": lambda model, rules: TaylorPruner(model, rules, make_evaluator(model), training_steps=STEPS - 2),
    "Movement": lambda model, rules: MovementPruner(
        model, rules, make_evaluator(model), warmup_step=2, cooldown_begin_step=STEPS - 1
    ),
}
NEEDS_STEPS = ("Gumbel", "Movement")


def pruned(name: str, rules: list[dict[str, Any]]) -> Any:
    """Return a pruner that has made its masks."""
    pruner = PRUNERS[name](make_model(), rules)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner.compress(*((STEPS, None) if name in NEEDS_STEPS else ()))
    return pruner


def rule(*layers: str, ratio: float = 0.75, **more: Any) -> dict[str, Any]:
    return {"op_names": list(layers or HIDDEN), "sparse_ratio": ratio, **more}


def mask_of(pruner: Any, layer: str, target: str = "weight") -> Tensor:
    tensor = getattr(pruner._module_wrappers[layer], target)
    return pruner.get_masks()[layer][target].expand_as(tensor)


def sparsity(*masks: Tensor) -> float:
    return 1 - sum(float(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def outputs(model: nn.Module) -> Tensor:
    was = model.training
    with torch.no_grad():
        result: Tensor = model.eval()(INPUTS)
    model.train(was)
    return result


def promise(text: str) -> Callable[..., Any]:
    """Make a function of a pruner's name a row of the table."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        row = function.__name__.removeprefix("test_")
        cells = []
        for name in PRUNERS:
            reason = KNOWN.get((row, name))
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
            cells.append(pytest.param(name, marks=marks))

        def run(name: str, record_property: Callable[[str, object], None]) -> None:
            record_property("promise", text)
            record_property("pruner", name)
            function(name)

        run.__name__ = function.__name__
        run.promise = text  # type: ignore[attr-defined]
        return pytest.mark.parametrize("name", cells)(run)

    return decorate


_ZERO = "takes a masked row for zero behind its batch norm, where the shift comes back"
_REVIVED = "copies the unmasked weights: what was masked finely comes back"
_FLAGS = "leaves the modules it has replaced in train mode"
_TIES = "cuts a shared budget by a threshold, and what is equal to it stays; Slim's factors move in equal steps"
_BOUNDS = "drops the bounds of layers that share a budget"
KNOWN: dict[tuple[str, str], str] = {
    **{("nnis_own_speedup_is_exact", name): _ZERO for name in ("L1Norm", "Slim", "Taylor", "Movement")},
    ("nnis_own_speedup_is_exact", "Level"): _REVIVED,
    ("global_budget", "Slim"): _TIES,
    ("legacy_config_list", "Slim"): _TIES,
    **{("bounds_hold_within_a_global_budget", name): _BOUNDS for name in PRUNERS if name != "Gumbel"},
}


@promise("the sparsity asked for, exactly: 0.75 of each layer")
def test_total_sparsity(name: str) -> None:
    pruner = pruned(name, [rule()])
    assert [sparsity(mask_of(pruner, layer)) for layer in HIDDEN] == [0.75, 0.75, 0.75]


@promise("old config lists (`total_sparsity`): 0.75 of all layers together")
def test_legacy_config_list(name: str) -> None:
    pruner = pruned(name, [{"op_names": ["conv2", "conv3"], "total_sparsity": 0.75}])
    assert sparsity(*(mask_of(pruner, layer) for layer in ("conv2", "conv3"))) == 0.75


@promise("a bias follows its weight's rows")
def test_bias_follows_the_rows(name: str) -> None:
    pruner = pruned(name, [rule()])
    for layer in HIDDEN:
        rows = mask_of(pruner, layer).flatten(1).any(1).float()
        assert torch.equal(mask_of(pruner, layer, "bias"), rows)


@pytest.mark.slow
@promise("layers of one `dependency_group_id` share their masks")
def test_groups_share_masks(name: str) -> None:
    pruner = pruned(name, [rule("conv2", "conv3", dependency_group_id="tied"), rule("conv1")])
    assert torch.equal(mask_of(pruner, "conv2"), mask_of(pruner, "conv3"))
    assert sparsity(mask_of(pruner, "conv2")) == sparsity(mask_of(pruner, "conv1")) == 0.75


@promise("`align`: a batch norm's masks are its convolution's")
def test_align(name: str) -> None:
    align = {"align": {"module_name": "conv1", "target_name": "weight", "dims": [0]}}
    follower = {"op_names": ["bn1"], "target_settings": {"weight": align, "bias": align}}
    pruner = pruned(name, [rule("conv1"), follower])
    rows = mask_of(pruner, "conv1").flatten(1).any(1).float()
    assert torch.equal(mask_of(pruner, "bn1"), rows)
    assert torch.equal(mask_of(pruner, "bn1", "bias"), rows)


@promise("layers of one `global_group_id` share a budget")
def test_global_budget(name: str) -> None:
    pruner = pruned(name, [rule("conv2", "conv3", global_group_id=1), rule("conv1", ratio=0.5)])
    assert sparsity(*(mask_of(pruner, layer) for layer in ("conv2", "conv3"))) == 0.75
    assert sparsity(mask_of(pruner, "conv1")) == 0.5


@promise("`max_sparse_ratio` and `min_sparse_ratio` bound a layer's own ratio")
def test_bounds(name: str) -> None:
    pruner = pruned(name, [rule("conv1", max_sparse_ratio=0.5), rule("conv2", ratio=0.25, min_sparse_ratio=0.5)])
    assert [sparsity(mask_of(pruner, layer)) for layer in ("conv1", "conv2")] == [0.5, 0.5]


@promise("and bound it within a shared budget")
def test_bounds_hold_within_a_global_budget(name: str) -> None:
    shared = {"ratio": 0.5, "global_group_id": 1}
    pruner = pruned(
        name, [rule("conv2", **shared, min_sparse_ratio=0.75), rule("conv3", **shared, max_sparse_ratio=0.25)]
    )
    assert [sparsity(mask_of(pruner, layer)) for layer in ("conv2", "conv3")] == [0.75, 0.25]


@promise("`granularity`: whole 4×4 blocks of a linear layer at a time")
def test_blocks(name: str) -> None:
    pruner = pruned(name, [{"op_names": ["head"], "sparse_ratio": 0.75, "granularity": [4, 4]}])
    blocks = mask_of(pruner, "head").unflatten(1, (4, 4))
    assert torch.equal(blocks.amin((0, 2)), blocks.amax((0, 2)))
    assert sparsity(mask_of(pruner, "head")) == 0.75


@promise("`get_masks` goes into `update_masks` of another pruner, and comes back")
def test_round_trip(name: str) -> None:
    pruner = pruned(name, [rule()])
    masks = pruner.get_masks()
    fresh = PRUNERS[name](make_model(), [rule()])
    fresh.update_masks(copy.deepcopy(masks))
    again = fresh.get_masks()
    for layer, target in itertools.product(HIDDEN, ("weight", "bias")):
        assert torch.equal(again[layer][target], masks[layer][target].expand_as(again[layer][target]))


def scheduled(name: str, scheduler: type) -> tuple[Any, list[float]]:
    """Prune on a schedule of three times two steps; return the pruner, and the ratio at every step."""
    ratios: list[float] = []
    model = make_model()
    if name == "Movement":  # has a schedule of its own
        pruner = PRUNERS[name](model, [rule()])
    else:
        bound = PRUNERS[name](model, [rule()])
        bound.training_steps = 2
        pruner = scheduler(bound, interval_steps=2, total_times=3)
    space = pruner._target_spaces["conv1"]["weight"]
    step = pruner.evaluator._ori_training_step
    pruner.evaluator._training_step = lambda *args: (ratios.append(space.sparse_ratio), step(*args))[1]
    pruner.compress(STEPS, None)
    return pruner, ratios


@promise("`LinearPruner` leads it from 0 to the target")
def test_linear_schedule(name: str) -> None:
    pruner, ratios = scheduled(name, LinearPruner)
    assert ratios[0] == 0
    assert ratios == sorted(ratios)
    assert space_ratio(pruner) == 0.75
    assert sparsity(mask_of(pruner, "conv1")) == 0.75


@pytest.mark.slow
@promise("`AGPPruner` leads it from 0 to the target")
def test_agp_schedule(name: str) -> None:
    pruner, ratios = scheduled(name, AGPPruner)
    assert ratios[0] == 0
    assert ratios == sorted(ratios)
    assert space_ratio(pruner) == 0.75
    assert sparsity(mask_of(pruner, "conv1")) == 0.75


def space_ratio(pruner: Any) -> float:
    ratio: float = pruner._target_spaces["conv1"]["weight"].sparse_ratio
    return ratio


@pytest.mark.slow
@promise("what is masked stays zero while training goes on")
def test_masks_act_in_training(name: str) -> None:
    pruner = pruned(name, [rule()])
    model = pruner.bound_model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(INPUTS), LABELS).backward()
        optimizer.step()
    outputs(model)
    for layer in HIDDEN:
        seen = model.get_submodule(layer).weight
        assert not bool(seen[mask_of(pruner, layer) == 0].any())


@promise("`unwrap_model` gives the plain model back, and with the masks it is the wrapped one")
def test_unwrapping(name: str) -> None:
    pruner = pruned(name, [rule()])
    expected, masks, model = outputs(pruner.bound_model), pruner.get_masks(), pruner.bound_model
    pruner.unwrap_model()
    assert list(model.state_dict()) == list(Net().state_dict())
    with torch.no_grad():
        for layer, targets in masks.items():
            for target, mask in targets.items():
                getattr(model.get_submodule(layer), target).mul_(mask)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)


def unwrapped(name: str) -> tuple[nn.Module, Masks, Tensor]:
    pruner = pruned(name, [rule()])
    expected, masks = outputs(pruner.bound_model), pruner.get_masks()
    pruner.unwrap_model()
    return pruner.bound_model, masks, expected


@pytest.mark.slow
@promise("NNI's `ModelSpeedup` removes the masked channels")
def test_speedup_shapes(name: str) -> None:
    model, masks, _ = unwrapped(name)
    open_rows = {layer: int(masks[layer]["weight"].flatten(1).any(1).sum()) for layer in HIDDEN}
    ModelSpeedup(model, INPUTS[:2], copy.deepcopy(masks)).speedup_model()
    for layer in HIDDEN:
        assert model.get_submodule(layer).out_channels == open_rows[layer]
    assert (model.conv2.in_channels, model.head.in_features) == (open_rows["conv1"], open_rows["conv3"])


@pytest.mark.slow
@promise("and the outputs stay what they were")
def test_nnis_own_speedup_is_exact(name: str) -> None:
    model, masks, expected = unwrapped(name)
    ModelSpeedup(model, INPUTS[:2], copy.deepcopy(masks)).speedup_model()
    torch.testing.assert_close(outputs(model.eval()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@promise("`gumbel_nni.speedup`: smaller, and the outputs stay")
def test_our_speedup(name: str) -> None:
    model, masks, expected = unwrapped(name)
    small = gumbel_nni.speedup(model, masks, INPUTS[:2])
    torch.testing.assert_close(outputs(small), expected, rtol=1e-4, atol=1e-5)
    if name != "Level":
        assert all(small.get_submodule(layer).out_channels <= 5 for layer in HIDDEN)
