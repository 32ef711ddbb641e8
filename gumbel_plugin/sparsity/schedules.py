"""Schedules: a number as a function of how far the training is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from pydantic import ConfigDict, field_validator, model_validator
from pydantic.dataclasses import dataclass

from gumbel_plugin.config_values import as_number

Shape = Literal["constant", "linear", "cosine", "exponential", "cubic"]

# The fraction of the way from start to end at progress p in [0, 1]; exponential is handled apart (it is a ratio).
_CURVES: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 0.0,
    "linear": lambda p: p,
    "cosine": lambda p: 0.5 - 0.5 * math.cos(math.pi * p),
    "cubic": lambda p: 1.0 - (1.0 - p) ** 3,  # Zhu and Gupta 2017: steep first, gentle at the end
}


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Schedule:
    """A value that moves from `start` to `end` while the progress goes from 0 to 1.

    Attributes:
        start: The value at progress 0.
        end: The value at progress 1.
        shape: The curve between them. ``exponential`` multiplies by a constant factor; both ends must be positive.
    """

    start: float
    end: float
    shape: Shape = "linear"

    @field_validator("start", "end", mode="before")
    @classmethod
    def _are_numbers(cls, value: Any) -> Any:
        return as_number(value, float)

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if self.shape == "exponential" and min(self.start, self.end) <= 0:
            raise ValueError(f"an exponential schedule needs positive ends, got {self.start} to {self.end}")
        return self

    @property
    def lowest(self) -> float:
        """The lower one of its ends."""
        return min(self.start, self.end)

    def __call__(self, progress: float) -> float:
        """Return the value at this progress (clamped to [0, 1])."""
        p = min(1.0, max(0.0, progress))
        if self.shape == "exponential":
            return float(self.start * (self.end / self.start) ** p)
        return self.start + (self.end - self.start) * _CURVES[self.shape](p)


def as_schedule(value: float | Schedule) -> Schedule:
    """Return a schedule as it is, and a number as the schedule that stays there."""
    return value if isinstance(value, Schedule) else Schedule(value, value, "constant")
