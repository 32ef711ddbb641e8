"""The equivalence check: does the small model compute what the masked model computes?

Both run on the same random inputs, in float32 and in float64. A difference that is only rounding shrinks from about
1e-7 to about 1e-16 of the output scale between the two; a structural mistake (a constant not folded, a statistic over
other channels) stays as large as it was. One rounding is no mistake: that of a bias which took a constant in, and was
then stored in float32. In float64 it is compared as it was before (see `gumbel_plugin.layers.precision`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError, EquivalenceError
from gumbel_plugin.layers.example_inputs import (
    ExampleInputs,
    call_model,
    checked_inputs,
    inputs_on_device_of,
    named_tensors,
    observing,
    random_inputs_like,
)
from gumbel_plugin.layers.kept_tensors import forgetting_tensors
from gumbel_plugin.layers.precision import cast_to, computing_in

# Tolerance of each dtype as a multiple of float32's: 1e-5 and 1e-10 by default, each well above its rounding error.
_TOLERANCE_FACTORS = {torch.float32: 1.0, torch.float64: 1e-5}


@dataclass(frozen=True)
class EquivalenceReport:
    """What `verify_equivalence` measured; every mapping is keyed by dtype name (``"float32"``).

    Attributes:
        errors: max |masked - small| / max |masked|, over all outputs and samples; NaN if any output had one. Where
            every masked output is 0 there is no scale, and the absolute error stands here.
        absolute_errors: max |masked - small|.
        tolerances: The largest error that passes.
        samples: Number of random inputs.
    """

    errors: dict[str, float]
    absolute_errors: dict[str, float]
    tolerances: dict[str, float]
    samples: int

    @property
    def passed(self) -> bool:
        """Whether every dtype's error is within its tolerance (NaN never is)."""
        return all(error <= self.tolerances[dtype] for dtype, error in self.errors.items())

    @property
    def max_relative_error(self) -> float:
        """The float32 error; if float32 was not asked for, that of the first dtype."""
        return self.errors.get("float32", next(iter(self.errors.values())))

    def as_dict(self) -> dict[str, Any]:
        """Return plain types, ready for JSON or YAML."""
        return {"passed": self.passed, "samples": self.samples, **asdict(self)}

    def raise_for_failure(self) -> None:
        """Do nothing if the models agree.

        Raises:
            EquivalenceError: With the numbers, if they do not.
        """
        if not self.passed:
            raise EquivalenceError(f"the small model does not compute what the masked model computes: {self}")

    def __str__(self) -> str:
        measured = ", ".join(
            f"{dtype} error {error:.1e} (tolerance {self.tolerances[dtype]:.0e})"
            for dtype, error in self.errors.items()
        )
        return f"{'equivalent' if self.passed else 'NOT equivalent'}: {measured}; {self.samples} random inputs"


def verify_equivalence(
    masked: nn.Module,
    small: nn.Module,
    example_inputs: ExampleInputs,
    *,
    samples: int = 4,
    tolerance: float = 1e-5,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    seed: int = 0,
) -> EquivalenceReport:
    """Compare two models on random inputs, in eval mode.

    Deep copies are compared: the models, their train/eval flags, dtypes and gradients, and torch's global generators
    stay as they are. Reduced precision (TF32, casts to float32 inside a model that is compared in float64) is switched
    off meanwhile. Outputs may be tensors, numbers, and mappings, sequences and dataclasses of them, as Hugging Face
    models return; other objects, such as their caches, are not compared. Integer and bool outputs must be equal, an
    infinity equals only itself.

    Args:
        masked: The reference.
        small: What must compute the same; it may live on another device.
        example_inputs: A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments. They give
            the shapes; see `random_inputs_like` for what is drawn.
        samples: Number of random inputs.
        tolerance: Largest accepted float32 error relative to the output scale; in float64 it is 1e-5 times this.
        dtypes: Any of float32 and float64.
        seed: Of the random inputs.

    Returns:
        The report; it does not raise for a difference in numbers, see `EquivalenceReport.raise_for_failure`.

    Raises:
        ConfigError: If an argument is out of range, or the inputs cannot be used (see `checked_inputs`).
        EquivalenceError: If the outputs differ in structure, shape or dtype, or hold nothing to compare.
    """
    _check_arguments(samples, tolerance, dtypes)
    inputs = checked_inputs(example_inputs)
    return compare(copy.deepcopy(masked), copy.deepcopy(small), inputs, samples, tolerance, dtypes, seed)


def compare(
    masked: nn.Module,
    small: nn.Module,
    example_inputs: ExampleInputs,
    samples: int = 4,
    tolerance: float = 1e-5,
    dtypes: Sequence[torch.dtype] = tuple(_TOLERANCE_FACTORS),
    seed: int = 0,
) -> EquivalenceReport:
    """Do the work of `verify_equivalence` on models whose forwards may leave traces in them, as a call count is one."""
    errors, absolute_errors, tolerances = {}, {}, {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        absolute, scale = _difference_and_scale(masked, small, example_inputs, samples, dtype, seed)
        errors[name] = absolute / scale if scale > 0 else absolute
        absolute_errors[name] = absolute
        tolerances[name] = tolerance * _TOLERANCE_FACTORS[dtype]
    return EquivalenceReport(errors, absolute_errors, tolerances, samples)


def _check_arguments(samples: int, tolerance: float, dtypes: Sequence[torch.dtype]) -> None:
    if samples < 1:
        raise ConfigError(f"samples is {samples}; it must be at least 1")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ConfigError(f"tolerance is {tolerance}; it must be positive and finite")
    if not dtypes or any(dtype not in _TOLERANCE_FACTORS for dtype in dtypes):
        raise ConfigError(f"dtypes is {tuple(dtypes)}; it must name torch.float32, torch.float64 or both")


def _difference_and_scale(
    masked: nn.Module, small: nn.Module, example_inputs: ExampleInputs, samples: int, dtype: torch.dtype, seed: int
) -> tuple[float, float]:
    """Return max |masked - small| (NaN if there is one) and max |masked| over all samples."""
    generator = torch.Generator().manual_seed(seed)
    pairs: list[tuple[float, float]] = []
    unchanged = forgetting_tensors(masked, small)  # what they cache would be of this dtype
    with unchanged, cast_to(masked, dtype), cast_to(small, dtype), observing(masked, small), computing_in(dtype):
        for _ in range(samples):
            inputs = random_inputs_like(example_inputs, generator, dtype)
            reference, candidate = (
                dict(named_tensors(call_model(model, inputs_on_device_of(model, inputs)))) for model in (masked, small)
            )
            pairs += _compared(reference, candidate)
    if not pairs:
        raise EquivalenceError("the models return no tensor with elements, so there is nothing to compare")
    worst = torch.tensor(pairs, dtype=torch.float64).amax(dim=0)  # NaN wins
    return float(worst[0]), float(worst[1])


def _compared(reference: Mapping[str, Tensor], candidate: Mapping[str, Tensor]) -> Iterator[tuple[float, float]]:
    """Yield (max |difference|, max |finite reference|) of every output that has elements."""
    if reference.keys() != candidate.keys():
        raise EquivalenceError(
            "the outputs differ in structure: the masked model returns "
            f"{', '.join(reference) or 'no tensor'}; the small model returns {', '.join(candidate) or 'no tensor'}"
        )
    for path, ours in reference.items():
        theirs = candidate[path]
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise EquivalenceError(
                f"{path} is {tuple(ours.shape)} {ours.dtype} in the masked model and "
                f"{tuple(theirs.shape)} {theirs.dtype} in the small model"
            )
        if ours.numel() > 0:
            yield _difference(ours.detach().cpu(), theirs.detach().cpu())


def _difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    if not (ours.is_floating_point() or ours.is_complex()):
        return (0.0 if torch.equal(ours, theirs) else math.inf), 0.0
    wide = torch.complex128 if ours.is_complex() else torch.float64
    ours, theirs = ours.to(wide), theirs.to(wide)
    difference = torch.where(ours == theirs, 0.0, (ours - theirs).abs())  # equal infinities differ by nothing
    magnitude = ours.abs()
    return float(difference.max()), float(torch.where(magnitude.isfinite(), magnitude, 0.0).max())
