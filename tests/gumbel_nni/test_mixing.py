"""`GumbelPruner` beside everything else of NNI's, in both orders: one table of cases, every promise checked on each."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nni
import pytest
import torch
from nni.compression import TorchEvaluator
from nni.compression.base.compressor import Compressor
from nni.compression.distillation import Adaptive1dLayerwiseDistiller, DynamicLayerwiseDistiller
from nni.compression.pruning import (
    AGPPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    LinearPruner,
    MovementPruner,
    SlimPruner,
    TaylorPruner,
)
from nni.compression.quantization import LsqQuantizer, PtqQuantizer, QATQuantizer
from torch import Tensor, nn

from gumbel_nni import unwrapped_copy
from gumbel_nni.compat.stacking import masks_of
from gumbel_plugin import GumbelPruner
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.shrinking.shrink import masked_copy

STEPS = 12
GUMBEL = [{"op_names": ["conv1"], "sparse_ratio": 0.5}]
INPUTS = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS.flatten(1)[:, :4].argmax(1)


class Net(nn.Module):
    """conv1's channels are read by conv2; conv2 and fc1 have channels of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x))).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(x)))


def make_evaluator(model: nn.Module) -> TorchEvaluator:
    def step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def train(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: Callable[..., Tensor],
        schedulers: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> None:
        model.train()
        for _ in range(max_steps or max_epochs or 0):
            optimizer.zero_grad()
            step((INPUTS, TARGETS), model).backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> float:
        return float((model.eval()(INPUTS).argmax(1) == TARGETS).float().mean())

    optimizer = nni.trace(torch.optim.Adam)(model.parameters(), lr=1e-2)
    return TorchEvaluator(train, optimizer, step, dummy_input=INPUTS[:2], evaluating_func=evaluate)


def predict(batch: tuple[Tensor, Tensor], teacher: nn.Module) -> Tensor:
    return teacher(batch[0])


@dataclass(frozen=True)
class Partner:
    """Another compressor of NNI's.

    Attributes:
        cls: Its class.
        arguments: What its constructor takes beside model, config list and evaluator; called for each pruner.
        config: Its own settings, but for the layers.
    """

    cls: type[Compressor]
    arguments: Callable[[], dict[str, Any]] = dict
    config: tuple[tuple[str, Any], ...] = (("sparse_ratio", 0.5),)

    def rules(self, *layers: str) -> list[dict[str, Any]]:
        return [{"op_names": list(layers), **dict(self.config)}]


_QUANTIZED = (("target_names", ["_input_", "weight", "_output_"]), ("quant_dtype", "int8"))
_QUANTIZED += (("quant_scheme", "symmetric"),)
_DISTILLED = (("lambda", 0.1), ("apply_method", "mse"))


def _teacher() -> dict[str, Any]:
    return {"teacher_model": Net(), "teacher_predict": predict}


PRUNERS = {
    "level": Partner(LevelPruner),
    "l1norm": Partner(L1NormPruner),
    "l2norm": Partner(L2NormPruner),
    "fpgm": Partner(FPGMPruner),
    "slim": Partner(SlimPruner, lambda: {"training_steps": 5}),
    "taylor": Partner(TaylorPruner, lambda: {"training_steps": 5}),
    "movement": Partner(MovementPruner, lambda: {"warmup_step": 2, "cooldown_begin_step": 10}),
}
OTHERS = {
    "qat": Partner(QATQuantizer, config=_QUANTIZED),
    "lsq": Partner(LsqQuantizer, config=_QUANTIZED),
    "ptq": Partner(PtqQuantizer, config=_QUANTIZED),
    "dynamic": Partner(DynamicLayerwiseDistiller, _teacher, _DISTILLED),
    "adaptive": Partner(Adaptive1dLayerwiseDistiller, _teacher, _DISTILLED),
}


@dataclass
class Mixed:
    """A model that two compressors have trained together.

    Attributes:
        gumbel: Ours.
        partner: The other one.
        last: The one that was made from the other, and that did the training.
    """

    gumbel: GumbelPruner
    partner: Any
    last: Any

    @property
    def model(self) -> nn.Module:
        return self.last.bound_model.eval()


def mix(partner: Partner, layers: tuple[str, ...], gumbel_first: bool) -> Mixed:
    torch.manual_seed(0)
    model = Net()
    nn.init.normal_(model.bn1.bias)  # what a masked row's batch norm sends on is no zero
    evaluator, rules, arguments = make_evaluator(model), partner.rules(*layers), partner.arguments()
    if gumbel_first:
        gumbel = GumbelPruner(model, GUMBEL, evaluator, example_inputs=INPUTS[:2])
        last = other = partner.cls.from_compressor(gumbel, rules, **arguments)
    else:
        takes_evaluator = partner.cls not in (LevelPruner, L1NormPruner, L2NormPruner, FPGMPruner)
        other = partner.cls(model, rules, **({"evaluator": evaluator} if takes_evaluator else {}), **arguments)
    if isinstance(other, Adaptive1dLayerwiseDistiller):
        other.track_forward(INPUTS[:2])
    if not gumbel_first:
        last = gumbel = GumbelPruner.from_compressor(
            other, GUMBEL, example_inputs=INPUTS[:2], evaluator=None if takes_evaluator else evaluator
        )
    last.compress(STEPS, None)
    return Mixed(gumbel, other, last)


def closed(compressor: Any, layer: str) -> float:
    """Return which part of a layer's weight one pruner's own mask closes."""
    space = compressor._target_spaces[layer]["weight"]
    return 1 - float(space.mask.expand(space.shape).mean())


@torch.no_grad()
def check_masks_are_honoured(mixed: Mixed) -> None:
    """What the masks close may hold anything."""
    model = mixed.model
    expected = model(INPUTS)
    assert bool(torch.isfinite(expected).all())
    masks = masks_of(mixed.last._module_wrappers)
    assert set(masks) >= {"conv1"}
    for name, targets in masks.items():
        for target, mask in targets.items():
            if mask is not None:
                getattr(mixed.last._module_wrappers[name], target).add_((mask == 0) * 7.0)
    torch.testing.assert_close(model(INPUTS), expected, rtol=1e-5, atol=1e-5)
    for name, targets in masks.items():
        for target, mask in targets.items():
            if mask is not None:
                getattr(mixed.last._module_wrappers[name], target).sub_((mask == 0) * 7.0)


@torch.no_grad()
def check_result(mixed: Mixed, exact_outputs: bool = True) -> None:
    """Unwrapping gives a plain model; with the masks it is the wrapped one; the small one equals it."""
    expected = mixed.model(INPUTS)
    masks = masks_of(mixed.last._module_wrappers)
    masked = masked_copy(unwrapped_copy(mixed.model), masks).eval()
    if exact_outputs:  # a quantizer rounds as long as it wraps
        torch.testing.assert_close(masked(INPUTS), expected, rtol=1e-4, atol=1e-5)
    small = mixed.gumbel.speedup(INPUTS[:2])
    assert small.conv1.out_channels <= 4
    torch.testing.assert_close(small.eval()(INPUTS), masked(INPUTS), rtol=1e-4, atol=1e-5)
    model = mixed.model
    mixed.last.unwrap_model()
    assert list(model.state_dict()) == list(Net().state_dict())
    assert [type(module) for module in model.modules()] == [type(module) for module in Net().modules()]
    assert not any("forward" in vars(module) for module in model.modules())
    torch.testing.assert_close(masked_copy(model, masks)(INPUTS), masked(INPUTS), rtol=0, atol=1e-6)


ORDERS = pytest.mark.parametrize("gumbel_first", [True, False], ids=["gumbel_first", "gumbel_last"])


@pytest.mark.slow
@ORDERS
@pytest.mark.parametrize("name", PRUNERS)
def test_pruners_on_other_layers(name: str, gumbel_first: bool) -> None:
    mixed = mix(PRUNERS[name], ("fc1",), gumbel_first)
    masks = masks_of(mixed.last._module_wrappers)
    assert set(masks) == {"conv1", "fc1"}
    assert closed(mixed.gumbel, "conv1") == closed(mixed.partner, "fc1") == 0.5
    assert float(masks["fc1"]["weight"].expand(10, 6).mean()) == 0.5
    check_masks_are_honoured(mixed)
    check_result(mixed)


@pytest.mark.slow
@ORDERS
@pytest.mark.parametrize("name", PRUNERS)
def test_pruners_on_the_same_layers(name: str, gumbel_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    """conv1 is gated by both, conv2 is read by conv1's gates and masked by the other."""
    mixed = mix(PRUNERS[name], ("conv1", "conv2"), gumbel_first)
    logged = [record.getMessage() for record in caplog.records if "multiply" in record.getMessage()]
    assert logged == ["conv1: an earlier pruner masks its weight and bias too; the masks multiply"]
    assert closed(mixed.gumbel, "conv1") == closed(mixed.partner, "conv1") == closed(mixed.partner, "conv2") == 0.5
    own = [pruner._target_spaces["conv1"]["weight"].mask for pruner in (mixed.gumbel, mixed.partner)]
    masks = masks_of(mixed.last._module_wrappers)
    assert torch.equal(masks["conv1"]["weight"].expand(8, 3, 3, 3), (own[0] * own[1]).expand(8, 3, 3, 3))
    check_masks_are_honoured(mixed)
    check_result(mixed)


@pytest.mark.slow
@ORDERS
@pytest.mark.parametrize("name", OTHERS)
def test_quantizers_and_distillers(name: str, gumbel_first: bool) -> None:
    mixed = mix(OTHERS[name], ("conv1", "fc1"), gumbel_first)
    assert closed(mixed.gumbel, "conv1") == 0.5
    quantizer = name in ("qat", "lsq", "ptq")
    if quantizer:
        calibration = mixed.partner.get_calibration_config()
        assert set(calibration["conv1"]) == {"_input_0", "weight", "_output_0"}
        assert all(bool(torch.isfinite(t["scale"]).all()) for layer in calibration.values() for t in layer.values())
    check_masks_are_honoured(mixed)
    check_result(mixed, exact_outputs=not quantizer)


@pytest.mark.slow
def test_a_distiller_beside_a_distillation() -> None:
    """Both are learned from; our teacher is the plain network before it was wrapped."""

    def trained(distillation: Any, distiller: bool) -> Tensor:
        torch.manual_seed(0)
        model, partner = Net(), OTHERS["dynamic"]
        dense, inputs = copy.deepcopy(model), INPUTS[:2]
        last = gumbel = GumbelPruner(
            model, GUMBEL, make_evaluator(model), example_inputs=inputs, distillation=distillation
        )
        if distiller:
            last = partner.cls.from_compressor(gumbel, partner.rules("conv1", "fc1"), **partner.arguments())
        last.compress(STEPS, None)
        last.unwrap_model()
        teacher = gumbel.session.distillation.teacher
        if teacher is not None:
            assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in dense.state_dict().items())
        assert not model._forward_hooks
        return model.fc2.weight.detach()

    found = [trained(ours, theirs) for ours in (None, {"logits": 0.5}) for theirs in (False, True)]
    for first in range(4):
        for second in range(first):
            assert not torch.allclose(found[first], found[second])


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", [LinearPruner, AGPPruner])
def test_schedulers_lead_from_nothing_to_the_target(scheduler: type) -> None:
    torch.manual_seed(0)
    model = Net()
    gumbel = GumbelPruner(model, GUMBEL, make_evaluator(model), example_inputs=INPUTS[:2])
    pruner = scheduler(gumbel, interval_steps=3, total_times=3)
    ratios = []
    guard = gumbel.session.guard
    gumbel.session.guard = lambda loss: ratios.append(gumbel.session.plan.budgets[0].ratio) or guard(loss)
    _, masks = pruner.compress(STEPS, None)
    expected = [i / 3 for i in range(4)] if scheduler is LinearPruner else [1 - (1 - i / 3) ** 3 for i in range(4)]
    torch.testing.assert_close(ratios, [0.5 * value for value in expected for _ in range(3)])
    assert float(masks["conv1"]["weight"].mean()) == 0.5
    mixed = Mixed(gumbel, pruner, pruner)
    check_masks_are_honoured(mixed)
    check_result(mixed)


def test_a_fixed_phase_before_the_end_of_a_schedule_is_refused() -> None:
    model = Net()
    config = {"pruning": {"config_list": GUMBEL, "phases": {"fixed": 0.5}}}
    gumbel = GumbelPruner(model, config, make_evaluator(model), example_inputs=INPUTS[:2])
    with pytest.raises(ConfigError, match=r"phases.fixed = 0.5.*step 9 of 12"):
        AGPPruner(gumbel, interval_steps=3, total_times=3).compress(STEPS, None)


def test_a_ratio_that_changes_later_counts() -> None:
    model = Net()
    gumbel = GumbelPruner(model, GUMBEL, make_evaluator(model), example_inputs=INPUTS[:2])
    gumbel._target_spaces["conv1"]["weight"].sparse_ratio = 0.25
    _, masks = gumbel.compress(STEPS)
    assert float(masks["conv1"]["weight"].mean()) == 0.75


def test_one_after_the_other() -> None:
    """Each is done before the next begins, ours twice; what was decided stays."""
    torch.manual_seed(0)
    model = Net()
    evaluator = make_evaluator(model)
    first = L1NormPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.3}])
    _, before = first.compress()
    second = GumbelPruner.from_compressor(first, GUMBEL, evaluator=evaluator, example_inputs=INPUTS[:2])
    _, between = second.compress(STEPS)
    third = GumbelPruner.from_compressor(
        second, [{"op_names": ["conv2"], "sparse_ratio": 0.5}], example_inputs=INPUTS[:2]
    )
    _, masks = third.compress(STEPS)
    assert torch.equal(masks["fc1"]["weight"], before["fc1"]["weight"])
    assert torch.equal(masks["conv1"]["weight"], between["conv1"]["weight"])
    assert {name: float(targets["weight"].mean()) for name, targets in masks.items()} == {
        "conv1": 0.5, "conv2": 0.5, "fc1": pytest.approx(0.7),
    }  # fmt: skip
    mixed = Mixed(third, second, third)
    check_masks_are_honoured(mixed)
    check_result(mixed)


def test_the_evaluator_trains_what_another_pruner_has_wrapped_before() -> None:
    """Its optimizer was made on the plain model; wrapping and unwrapping must not change the parameters."""
    model = Net()
    evaluator = make_evaluator(model)
    pruner = L1NormPruner(model, [{"op_names": ["fc1"], "sparse_ratio": 0.5}])
    pruner.compress()
    before = copy.deepcopy(model.fc1._nni_wrapper.weight)
    GumbelPruner.from_compressor(pruner, GUMBEL, evaluator=evaluator, example_inputs=INPUTS[:2]).compress(STEPS)
    open_rows = model.fc1._nni_wrapper.weight_mask.flatten(1)[:, 0] == 1
    assert not torch.isclose(model.fc1._nni_wrapper.weight, before)[open_rows].all()


def test_the_log_stays_quiet_where_nothing_is_shared(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        mix(PRUNERS["l1norm"], ("fc1", "conv2"), gumbel_first=True)  # conv2 reads what conv1 computes: no mask of ours
    logged = [record.getMessage() for record in caplog.records]
    few = ("far from the budget", "will be learned in 12 steps")
    assert [message for message in logged if not any(words in message for words in few)] == []
