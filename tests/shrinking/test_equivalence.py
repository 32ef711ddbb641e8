from __future__ import annotations

import copy
import json
import math
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError, EquivalenceError
from gumbel_plugin.shrinking.equivalence import EquivalenceReport, verify_equivalence


class Returns(nn.Module):
    """A model that is one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return self.function(*args, **kwargs)


@dataclass
class Detection:
    score: Tensor
    label: str


X = torch.zeros(2, 3)
DTYPES = (torch.float32, torch.float64)
KEEP = torch.tensor([0, 2, 5, 6])


def masked_and_small(activation: type[nn.Module] = nn.Sigmoid) -> tuple[nn.Module, nn.Module]:
    """A conv net whose consumer ignores channels 1, 3, 4, 7, and the same net without them."""
    torch.manual_seed(0)
    masked = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation(), nn.Conv2d(8, 5, 3, padding=1))
    nn.init.normal_(masked[1].weight)
    nn.init.normal_(masked[1].bias)
    nn.init.normal_(masked[1].running_mean)
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation(), nn.Conv2d(4, 5, 3, padding=1))
    closed = [c for c in range(8) if c not in KEEP]
    with torch.no_grad():
        masked[3].weight[:, closed] = 0
        for layer in (0, 1):
            for name, value in masked[layer].state_dict().items():
                small[layer].state_dict()[name].copy_(value[KEEP] if value.dim() else value)
        small[3].weight.copy_(masked[3].weight[:, KEEP])
        small[3].bias.copy_(masked[3].bias)
    return masked, small


IMAGES = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.GELU])
def test_channels_that_nobody_reads_may_go(activation: type[nn.Module]) -> None:
    report = verify_equivalence(*masked_and_small(activation), IMAGES)
    assert report.passed
    assert list(report.errors) == ["float32", "float64"]
    assert report.errors["float32"] < 1e-6
    assert report.errors["float64"] < 1e-14
    assert report.max_relative_error == report.errors["float32"]
    report.raise_for_failure()


def test_a_channel_that_still_mattered_is_found() -> None:
    masked, small = masked_and_small()
    with torch.no_grad():
        masked[3].weight[:, 1] = 1.0
    report = verify_equivalence(masked, small, IMAGES)
    assert not report.passed
    assert report.errors["float64"] > 1e-2
    with pytest.raises(EquivalenceError, match=r"NOT equivalent: float32 error \d\.\de-0\d \(tolerance 1e-05\)"):
        report.raise_for_failure()


@pytest.mark.parametrize(("delta", "passes"), [(1e-3, (False, False)), (1e-8, (True, False)), (1e-13, (True, True))])
def test_errors_are_the_difference_over_the_scale_and_float64_sees_what_float32_cannot(delta, passes) -> None:
    eight = Returns(lambda x: torch.full_like(x, 8.0))
    report = verify_equivalence(eight, Returns(lambda x: torch.full_like(x, 8.0) + delta), X)
    assert report.absolute_errors["float64"] == pytest.approx(delta, rel=0.02)
    assert report.errors["float64"] == pytest.approx(delta / 8, rel=0.02)
    assert report.tolerances == {"float32": pytest.approx(1e-5), "float64": pytest.approx(1e-10)}
    single = {
        dtype: verify_equivalence(eight, Returns(lambda x: x * 0 + 8 + delta), X, dtypes=[dtype]) for dtype in DTYPES
    }
    assert tuple(single[dtype].passed for dtype in DTYPES) == passes
    assert report.passed is all(passes)


def test_the_scale_is_that_of_the_largest_output_and_the_error_the_worst_of_all() -> None:
    masked = Returns(lambda x: {"a": torch.full_like(x, -100.0), "b": torch.full_like(x, 1.0)})
    small = Returns(lambda x: {"a": torch.full_like(x, -100.0), "b": torch.full_like(x, 1.5)})
    report = verify_equivalence(masked, small, X)
    assert report.absolute_errors["float64"] == 0.5
    assert report.errors["float64"] == 0.005


def test_the_tolerance_scales_both_dtypes() -> None:
    small = Returns(lambda x: torch.ones_like(x) + 1e-8)
    assert not verify_equivalence(Returns(torch.ones_like), small, X).passed
    assert verify_equivalence(Returns(torch.ones_like), small, X, tolerance=2e-3).passed


def test_outputs_that_are_all_zero_are_compared_absolutely() -> None:
    zero = Returns(torch.zeros_like)
    assert verify_equivalence(zero, zero, X).errors == {"float32": 0.0, "float64": 0.0}
    report = verify_equivalence(zero, Returns(lambda x: torch.full_like(x, 0.25)), X)
    assert report.errors["float32"] == 0.25
    assert not report.passed


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_anywhere_and_infinity_where_a_number_was_fail(bad: float) -> None:
    def spoilt(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.where(torch.arange(3) == 1, bad, x)

    def clean(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    for pair in ((spoilt, clean), (clean, spoilt)):
        report = verify_equivalence(Returns(pair[0]), Returns(pair[1]), X)
        assert not report.passed
        assert str(report).startswith("NOT equivalent")
    assert verify_equivalence(Returns(spoilt), Returns(spoilt), X).passed is math.isinf(bad)


def test_an_infinity_in_both_is_no_scale_that_hides_other_differences() -> None:
    masked = Returns(lambda x: (x, torch.tensor(-math.inf)))
    small = Returns(lambda x: (x + 1e-2, torch.tensor(-math.inf)))
    assert not verify_equivalence(masked, small, X).passed


def test_nan_in_one_sample_is_not_forgotten_by_the_next() -> None:
    calls = iter(range(100))
    model = Returns(lambda x: x / 0 * 0 if next(calls) == 0 else x)
    report = verify_equivalence(Returns(lambda x: x), model, X, dtypes=[torch.float32])
    assert math.isnan(report.errors["float32"])
    assert not report.passed


def test_integer_outputs_must_be_equal() -> None:
    masked = Returns(lambda x: (x, torch.tensor([1, 2])))
    assert verify_equivalence(masked, masked, X).passed
    assert not verify_equivalence(masked, Returns(lambda x: (x, torch.tensor([1, 3]))), X).passed


@pytest.mark.parametrize(
    ("masked", "small", "message"),
    [
        (lambda x: x, lambda x: x[:, :2], r"output is \(2, 3\) torch.float32 in the masked .* \(2, 2\) torch.float32"),
        (lambda x: {"a": [x, x.sum(0)]}, lambda x: {"a": [x, x.sum(1)]}, r"output\['a'\]\[1\] is \(3,\) .* \(2,\)"),
        (lambda x: {"a": x}, lambda x: {"b": x}, r"masked .* output\['a'\]; the small model returns output\['b'\]"),
        (lambda x: (x, x), lambda x: (x, None), r"output\[0\], output\[1\]; the small model returns output\[0\]"),
        (lambda x: x, lambda x: x > 0, r"torch.float32 in the masked .* torch.bool"),
        (lambda x: None, lambda x: None, "nothing to compare"),
        (lambda x: x[:0], lambda x: x[:0], "nothing to compare"),
    ],
)
def test_outputs_that_cannot_be_compared_are_named(masked, small, message: str) -> None:
    with pytest.raises(EquivalenceError, match=message):
        verify_equivalence(Returns(masked), Returns(small), X)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, [x, None]),
        lambda x: {"a": {"b": x}},
        lambda x: Detection(score=x, label="cat"),
        lambda x: torch.complex(x, x),
        lambda x: {"a": x, "cache": object()},
        lambda x: (x, float(x.sum())),
        lambda x: SimpleNamespace(a=[x], itself=Detection),
        lambda x: UserDict(a=x),
        lambda x: {"a": x.detach().numpy()},
        lambda x: torch.distributions.Normal(x, 1.0),
    ],
)
def test_a_difference_is_found_inside_any_output(wrap: Callable[[Tensor], Any]) -> None:
    assert verify_equivalence(Returns(wrap), Returns(wrap), X).passed
    assert not verify_equivalence(Returns(wrap), Returns(lambda x: wrap(x + 1e-3)), X).passed


def test_positional_and_keyword_inputs_reach_the_model() -> None:
    masked, small = Returns(lambda x, y: x - y), Returns(lambda x, y: x - y)
    for inputs in ((X, X), [X, X], {"y": X, "x": X}):
        assert verify_equivalence(masked, small, inputs).passed
        assert not verify_equivalence(masked, Returns(lambda x, y: y - x), inputs).passed


def test_both_models_get_the_same_inputs_new_ones_for_each_sample_and_again_under_the_seed() -> None:
    seen: list[Tensor] = []
    model = Returns(lambda x: seen.append(x) or x)
    report = verify_equivalence(model, model, X, samples=3, dtypes=[torch.float32], seed=5)
    assert report.samples == 3
    assert all(torch.equal(masked, small) for masked, small in zip(seen[::2], seen[1::2], strict=True))
    assert len({tuple(x.flatten().tolist()) for x in seen}) == 3
    first, seen[:] = list(seen), []
    verify_equivalence(model, model, X, samples=3, dtypes=[torch.float32], seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first, seen, strict=True))
    seen[:] = []
    verify_equivalence(model, model, X, samples=3, dtypes=[torch.float32], seed=6)
    assert not torch.equal(first[0], seen[0])


def test_models_and_global_state_stay_as_they_are() -> None:
    masked, small = masked_and_small()
    masked.train()
    masked[1].eval()
    small.insert(1, nn.Dropout())  # would differ in train mode
    small.append(Returns(lambda x: x + 0 * torch.rand_like(x)))  # draws from the global generator
    masked(torch.randn(1, 3, 8, 8)).sum().backward()
    states = [copy.deepcopy(model.state_dict()) for model in (masked, small)]
    flags = [[m.training for m in model.modules()] for model in (masked, small)]
    grad = masked[0].weight.grad.clone()
    rng = torch.get_rng_state()
    precision = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()

    assert verify_equivalence(masked, small, IMAGES).passed

    assert [[m.training for m in model.modules()] for model in (masked, small)] == flags
    for model, state in zip((masked, small), states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(value.dtype == state[name].dtype for name, value in model.state_dict().items())
    assert torch.equal(masked[0].weight.grad, grad)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_default_dtype() == torch.float32
    assert precision == (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())


def test_reduced_precision_is_off_while_the_models_run_and_back_on_after_an_error() -> None:
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("torch before 2.9 has no precision per operator")
    seen: list[str] = []
    model = Returns(lambda x: seen.append(torch.backends.cudnn.conv.fp32_precision) or x.no_such_method())
    before = torch.backends.cudnn.conv.fp32_precision
    with pytest.raises(AttributeError, match="no_such_method"):
        verify_equivalence(model, model, X)
    assert seen == ["ieee"]
    assert torch.backends.cudnn.conv.fp32_precision == before != "ieee"
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.to(dtype=torch.bfloat16),
        lambda x: torch.softmax(x, -1, dtype=torch.float32),
    ],
)
def test_a_cast_inside_the_model_does_not_blur_the_float64_comparison(cast: Callable[[Tensor], Tensor]) -> None:
    weight = torch.tensor([1.0, 0.0, 0.0])
    report = verify_equivalence(
        Returns(cast), Returns(lambda x: cast(x) + 1e-12 * weight.to(x)), X, dtypes=[torch.float64]
    )
    assert report.absolute_errors["float64"] == pytest.approx(1e-12, rel=1e-2)  # float32 would give 0 or 6e-8


def test_a_tensor_made_in_the_forward_meets_weights_of_its_own_dtype() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(x + self.cell(torch.zeros(len(x), 3)))

    model = Recurrent()
    assert verify_equivalence(model, model, X).passed


def test_a_model_in_half_precision_is_compared_in_the_dtypes_asked_for() -> None:
    model = nn.Linear(3, 4).to(torch.bfloat16)
    assert verify_equivalence(model, model, X.to(torch.bfloat16)).passed
    assert model.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"dtypes": ()}, "dtypes is"),
        ({"dtypes": (torch.float16,)}, "torch.float16"),
    ],
)
def test_bad_arguments_are_named(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        verify_equivalence(nn.Identity(), nn.Identity(), X, **argument)


def test_the_report_reads_well_and_has_plain_types() -> None:
    report = EquivalenceReport({"float64": 3e-16}, {"float64": 6e-16}, {"float64": 1e-10}, samples=2)
    assert str(report) == "equivalent: float64 error 3.0e-16 (tolerance 1e-10); 2 random inputs"
    assert report.max_relative_error == 3e-16
    assert json.loads(json.dumps(report.as_dict())) == {
        "passed": True,
        "samples": 2,
        "errors": {"float64": 3e-16},
        "absolute_errors": {"float64": 6e-16},
        "tolerances": {"float64": 1e-10},
    }


def test_a_hugging_face_model_without_its_dead_mlp_channels() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    masked = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=8, **sizes))
    small = copy.deepcopy(masked)
    ids = torch.arange(10).view(2, 5)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = getattr(small.model.layers[0].mlp, name)
        weight = layer.weight.data[:, KEEP] if name == "down_proj" else layer.weight.data[KEEP]
        layer.weight = nn.Parameter(weight.clone())
    assert not verify_equivalence(masked, small, inputs).passed
    with torch.no_grad():
        masked.model.layers[0].mlp.down_proj.weight[:, [c for c in range(8) if c not in KEEP]] = 0
    report = verify_equivalence(masked, small, inputs)
    assert report.passed
    assert report.errors["float64"] < 1e-14
