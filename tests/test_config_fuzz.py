"""Damaged configurations: each loads, and then reads back as itself, or is one ConfigError of bounded length."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gumbel_plugin.errors import ConfigError, GumbelPluginError
from gumbel_plugin.runs.run import prepare
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.storage.yaml_files import parse_yaml

pytestmark = pytest.mark.slow

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
TEXTS = [path.read_text(encoding="utf-8") for path in CONFIGS]
RESOLVED = [RunConfig.load(path).model_dump(mode="json") for path in CONFIGS]
ENTRY = {"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": "default", "sparse_threshold": None}
RUNNABLE = {
    "model": {"name": "lenet300", "num_classes": 10, "in_channels": None, "options": {"in_features": 64}},
    "data": {"name": "digits", "samples": 20, "validation_fraction": 0.0, "root": None},
    "training": {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "precision": "32-true", "patience": None},
    "pruning": {
        "method": "gumbel_softmax",
        "options": {"temperature": 1.0},
        "config_list": [ENTRY],
        "weights": "trained",
    },
    "seed": 0,
}

NASTY_TEXT = (
    "!!bool maybe", "!!int x", "!!python/name:os.system", "!!binary YQ==", "9" * 5000, "0x" + "f" * 5000, "[" * 300,
    "{a: " * 300, "&a [*a]", "*nothing", "<<", "=", "~", "1e-3", "1e400", "-.inf", ".nan", "'0.5'", "50%", "yes",
    "2020-01-01", "190:20:30", '"\\0"', '"\\ud800"', '"\\u2028"', "\x07", "\ufeff", "x" * 5000, "? ", "- ", "|", ": ",
    "'", '"', "#", "%YAML 3.0", "---", "...", "\t", "{}", "[]", "[[]]", "{? [a] : b}", "a: b: c", "!<x> y", "1_000",
)  # fmt: skip
NASTY_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 50, 10**18, 10**5000, 0.5, 1.0, -0.5, 1e-320, 1e308, float("nan"), float("inf"),
    "", "0.5", "50%", "1e-3", "true", "x" * 5000, "a\0b", "\ud800", "a:b", "conv(", "(?P<x>a)(?P<x>b)", "[[a]",
    ["a{9999999999}"], ["[[a]"], "~nobody-is-this/x", b"x", [], {}, [[]], [None], {"": 0}, {1: 2}, {"x": {"y": [1]}},
    (1, 2), {1, 2}, object(), [0], [-1, -1], ["Linear"], ["fc1"], {"start": 1, "end": 0}, {"start": "x"}, Path("x"),
    RunConfig,
)  # fmt: skip

PLAUSIBLE_VALUES: tuple[Any, ...] = (
    None, True, 0, 1, 2, 50, 10**18, 0.5, 1e-320, 1e308, "", "x", "x" * 5000, "random", "magnitude", "frozen",
    "lenet5", "toy_regression", "mnist", "os:getcwd", "torch.nn:Identity", "builtins:dict", "~nobody-is-this/x", "bf16",
    "learned", [], {}, ["Linear"], ["fc1"], ["fc9"], ["[[a]"], [1, 64], [0], [3], "element", "kernel", {"start": 1},
)  # fmt: skip


@st.composite
def damaged_texts(draw: st.DrawFn) -> str:
    """A shipped file, with lines and characters deleted, doubled, swapped and replaced."""
    lines = draw(st.sampled_from(TEXTS)).splitlines()
    for _ in range(draw(st.integers(1, 3))):
        place, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        line, nasty = lines[place], draw(st.sampled_from(NASTY_TEXT))
        at = draw(st.integers(0, len(line)))
        key, colon, _ = line.partition(":")
        match draw(st.integers(0, 7)):
            case 0:
                lines[place] = ""
            case 1:
                lines.insert(other, line)
            case 2:
                lines[place], lines[other] = lines[other], line
            case 3:
                lines[place] = line[:at] + line[at + 1 :]
            case 4:
                lines[place] = line[:at] + nasty + line[at:]
            case 5:
                lines[place] = line[:at] + draw(st.characters()) + line[at:]
            case 6:
                lines[place] = " " + line
            case _:
                lines[place] = f"{key}{colon} {nasty}"
    return "\n".join(lines)


def places(values: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) in nested dicts and lists."""
    if not isinstance(values, dict | list):
        return []
    items = list(values.items() if isinstance(values, dict) else enumerate(values))
    return [place for key, item in items for place in ((values, key), *places(item))]


def damage(draw: st.DrawFn, values: dict[str, Any], nasty: tuple[Any, ...], count: int) -> dict[str, Any]:
    """Return a copy in which values are replaced, moved, wrapped, deleted, contained in themselves, or keys renamed."""
    result = copy.deepcopy(values)
    for _ in range(count):
        found = places(result)
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        match draw(st.integers(0, 7)):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[draw(st.sampled_from(["", "x", "nam", 3, None, "x" * 5000, "a\0"]))] = container.pop(key)
            case 2:
                container[key] = [container[key]]
            case 3:
                container[key] = {"x": container[key]}
            case 4:
                source, name = draw(st.sampled_from(found))
                container[key] = copy.deepcopy(source.get(name) if isinstance(source, dict) else source[:1])
            case _:
                container[key] = copy.deepcopy(draw(st.sampled_from(nasty)))
    return result


@st.composite
def damaged_values(draw: st.DrawFn) -> Any:
    values = damage(draw, draw(st.sampled_from(RESOLVED)), NASTY_VALUES, draw(st.integers(1, 3)))
    if draw(st.integers(0, 19)) == 0 and (found := places(values)):
        container, key = draw(st.sampled_from(found))
        container[key] = draw(st.sampled_from([values, container]))
    pruning = values.get("pruning")
    as_list = draw(st.booleans()) and isinstance(pruning, dict)
    return pruning.get("config_list", []) if as_list and isinstance(pruning, dict) else values


@st.composite
def damaged_runs(draw: st.DrawFn) -> dict[str, Any]:
    return damage(draw, RUNNABLE, PLAUSIBLE_VALUES, draw(st.integers(1, 2)))


@contextmanager
def bounded(kind: type[Exception]) -> Iterator[None]:
    """Let an error of this kind pass, and nothing else; its message must be short."""
    message = ""
    try:
        yield
    except kind as error:
        message = str(error)
    assert len(message) <= 2000


def loaded(config: Any) -> RunConfig | None:
    """Return the configuration, or None after an error as it must be."""
    with bounded(ConfigError):
        return RunConfig.load(config)
    return None


def assert_reads_back(config: RunConfig) -> None:
    text = config.to_yaml()
    again = RunConfig.load(parse_yaml(text))
    assert again == config
    assert again.to_yaml() == text


def cases(count: int) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


@cases(1000)
@given(damaged_texts())
def test_damaged_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    config = loaded(path)
    if config is not None:
        assert_reads_back(config)


@cases(1000)
@given(damaged_values())
def test_damaged_values(values: Any) -> None:
    config = loaded(values)
    if config is not None:
        assert_reads_back(config)


@cases(100)
@given(damaged_runs())
def test_damaged_runs_are_refused_before_they_begin(values: dict[str, Any]) -> None:
    config = loaded(values)
    if config is None:
        return
    with bounded(GumbelPluginError):
        prepare(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_undamaged_files_read_back(path: Path) -> None:
    assert_reads_back(RunConfig.load(path))
