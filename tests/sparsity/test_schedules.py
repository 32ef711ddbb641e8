from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from gumbel_plugin.sparsity.schedules import Schedule, as_schedule

SHAPES = ["linear", "cosine", "exponential", "cubic"]
ends = st.floats(0.01, 100.0)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@given(start=ends, end=ends, a=st.floats(0, 1), b=st.floats(0, 1))
def test_a_schedule_runs_from_start_to_end_and_never_turns_back(
    shape: str, start: float, end: float, a: float, b: float
) -> None:
    schedule = Schedule(start, end, shape)
    assert schedule(0.0) == pytest.approx(start)
    assert schedule(1.0) == pytest.approx(end)
    first, second = schedule(min(a, b)), schedule(max(a, b))
    slack = 1e-9 * max(start, end)
    assert min(start, end) - slack <= first <= max(start, end) + slack
    assert (second - first) * (end - start) >= -slack * abs(end - start)


@pytest.mark.parametrize("shape", [*SHAPES, "constant"])
def test_progress_is_clamped(shape: str) -> None:
    schedule = Schedule(2.0, 0.5, shape)
    assert schedule(-3.0) == schedule(0.0)
    assert schedule(7.0) == schedule(1.0)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", 1 + (9 - 1) * 0.25),
        ("cosine", 1 + (9 - 1) * (1 - math.cos(math.pi / 4)) / 2),
        ("exponential", 9**0.25),
        ("cubic", 9 + (1 - 9) * 0.75**3),  # Zhu and Gupta: s_f + (s_i - s_f) (1 - t)^3
        ("constant", 1.0),
    ],
)
def test_the_curves_are_the_ones_named(shape: str, expected: float) -> None:
    assert Schedule(1.0, 9.0, shape)(0.25) == pytest.approx(expected)


def test_a_constant_stays() -> None:
    assert [as_schedule(0.7)(p) for p in (0.0, 0.3, 1.0)] == [0.7] * 3


def test_it_is_read_from_a_mapping_and_linear_by_default() -> None:
    read = TypeAdapter(Schedule).validate_python({"start": 2, "end": 1})
    assert read == Schedule(2.0, 1.0, "linear")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start": 1.0, "end": 0.0, "shape": "exponential"}, "positive ends, got 1.0 to 0.0"),
        ({"start": -1.0, "end": 1.0, "shape": "exponential"}, "positive ends"),
        ({"start": 1.0, "end": 0.5, "shape": "square"}, "'cubic'"),
        ({"start": 1.0, "end": 0.5, "steps": 3}, "(?i)unexpected keyword"),
    ],
)
def test_wrong_schedules_say_what_is_wrong(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Schedule).validate_python(values)
