from __future__ import annotations

import copy
from typing import Any

import pytest

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.runs.overrides import apply_overrides
from gumbel_plugin.runs.run_config import RunConfig

FULL: dict[str, Any] = {
    "training": {"max_epochs": 3},
    "pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}, {"op_names": ["fc"]}]},
    "example_shape": [2, 1, 28, 28],
    "seed": 7,
}


def test_overrides_reach_sections_and_items_and_make_missing_ones() -> None:
    before = copy.deepcopy(FULL)
    changed = apply_overrides(
        FULL, ["pruning.config_list.0.sparse_ratio=0.9", "training.patience=3", "new.section.key=[1, x]", "seed=null"]
    )
    assert changed["pruning"]["config_list"][0]["sparse_ratio"] == 0.9
    assert changed["training"]["patience"] == 3
    assert changed["new"]["section"]["key"] == [1, "x"]
    assert changed["seed"] is None
    assert before == FULL


def test_a_value_may_hold_an_equals_sign() -> None:
    assert apply_overrides({}, ["a=b=c"]) == {"a": "b=c"}


def test_items_of_a_list_are_replaced_by_number() -> None:
    assert apply_overrides({"a": [1, 2]}, ["a.1=3"]) == {"a": [1, 3]}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed", r"--set 'seed' must read key\.subkey=value"),
        ("=3", "must read"),
        ("seed.sub=3", "'seed' is a plain value, it has no sub-keys"),
        ("example_shape.x=3", "'x' is no number of an item; the list has 4"),
        ("example_shape.4=3", "'4' is no number of an item"),
        ("pruning.config_list.7.sparse_ratio=3", "'7' is no number of an item; the list has 2"),
        ("seed=[1", "no valid YAML"),
    ],
)
def test_wrong_overrides_are_named(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(FULL, [setting])


def test_an_overridden_config_is_still_checked() -> None:
    with pytest.raises(ConfigError, match=r"seed = 'x'"):
        RunConfig.load(apply_overrides(FULL, ["seed=x"]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (f"{'a.' * 100}b=1", "nested too deeply"),
        (f"a={'9' * 5000}", "is no valid int"),
        (f"a={'[' * 5000}", "nested too deeply"),
        ("a={b: 1, b: 2}", "the key 'b' is given twice"),
        ("a=!!bool maybe", "is no valid bool"),
        (f"b.{'9' * 5000}=1", "is no number of an item"),
        ("b.²=1", "is no number of an item"),
        ("x" * 100_000, "must read key.subkey=value"),
        (f"a.{'x' * 100_000}=1", "'a' is a plain value"),
    ],
)
def test_damaged_settings_are_errors(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        apply_overrides({"a": 1, "b": [1]}, [setting])
    assert len(str(error.value)) < 1000


def test_a_setting_may_have_an_exponent_without_a_point() -> None:
    assert apply_overrides({}, ["training.optimizer.lr=1e-3"]) == {"training": {"optimizer": {"lr": 0.001}}}
