from __future__ import annotations

import datetime
import math
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gumbel_plugin.config import PruningSection
from gumbel_plugin.config_list import LayerRule
from gumbel_plugin.config_values import MAX_DEPTH, MAX_VALUES
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.sparsity.schedules import Schedule

ENTRY = {"op_types": ["Conv2d"], "sparse_ratio": 0.5}


def load(**sections: Any) -> RunConfig:
    return RunConfig.load({"pruning": {"config_list": [ENTRY]}, **sections})


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def recursive_dict() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["x"] = {"y": [value]}
    return value


def recursive_list() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def shared(levels: int) -> Any:
    """Return a list that is small in memory and has 10**levels items when it is written out."""
    value: Any = "x"
    for _ in range(levels):
        value = [value] * 10
    return value


PLACES: dict[str, Callable[[Any], Any]] = {
    "model.options": lambda value: load(model={"name": "lenet5", "options": {"width": value}}),
    "pruning.options": lambda value: RunConfig.load({"pruning": {"options": {"initial_logit": value}}}),
    "data": lambda value: load(data={"name": "digits", "samples": value}),
    "seed": lambda value: load(seed=value),
    "an unknown key": lambda value: load(unknown=value),
    "a list": lambda value: RunConfig.load([ENTRY, value]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (recursive_dict(), "contains itself"),
        (recursive_list(), "contains itself"),
        (nested(5000), f"nested too deeply: more than {MAX_DEPTH} levels"),
        (shared(9), f"more than {MAX_VALUES:,} values"),
        (range(10**12), f"more than {MAX_VALUES:,} values"),
        ({1: 2}, "the key 1 is no text"),
        ({None: 2}, "the key None is no text"),
        ({1, 2}, "is a set"),
        (b"bytes", "is a bytes"),
        (iter([1]), "is a list_iterator"),
        (datetime.date(2020, 1, 1), "is a date"),
        (object, "is a type"),
        (10**5000, "= an integer of 16610 bits: an integer must be less than"),
        (-(2**63) - 1, "must be less than"),
        (math.nan, "= nan: a number must be finite"),
        (np.float32("inf"), "= inf: a number must be finite"),
        (1e308, "= 1e.308: a number must be finite and fit into float32"),
        (-1e-320, "= -1e-320: a number must be finite and fit into float32"),
        ("a\0b", "no NUL characters"),
        ("\udcff", "no surrogates"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_is_no_plain_data_is_an_error(place: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        PLACES[place](value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "config", [b"run.yaml", bytearray(b"x"), {1: 2}, [[1]], ["a"], object(), (x for x in [1]), {"": 1}]
)
def test_what_is_no_config_is_an_error(config: Any) -> None:
    with pytest.raises(ConfigError):
        RunConfig.load(config)


@pytest.mark.slow
@pytest.mark.parametrize("size", [10**5, 10**7])
def test_a_long_value_makes_no_long_message(size: int) -> None:
    wrong: list[dict[str, Any]] = [
        {"seed": "x" * size},
        {"x" * size: 1},
        {"data": {"name": "digits", "x" * size: 1}},
        {"training": {"loss": "x" * size}},
        {"pruning": {"method": "x" * size}},
        {"pruning": {"options": {"temperature": "x" * size}}},
        {"pruning": {"config_list": [{**ENTRY, "granularity": "x" * size}]}},
        {"pruning": {"config_list": [{**ENTRY, "op_names_re": ["(" * size]}]}},
        {"pruning": {"config_list": [{**ENTRY, "target_names": ["x" * size]}]}},
        {"pruning": {"config_list": [{**ENTRY, "target_settings": {"x" * size: 1}}]}},
        {"pruning": {"config_list": [{**ENTRY, "target_settings": {"weight": "x" * size}}]}},
    ]
    for values in wrong:
        with pytest.raises(ConfigError) as error:
            RunConfig.load({"pruning": {"config_list": [ENTRY]}, **values})
        assert len(str(error.value)) <= 2000


def test_many_errors_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"config_list\.7\.sparse_ratio = 2: .*; and 1992 more$"):
        RunConfig.load([{**ENTRY, "sparse_ratio": 2}] * 2000)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ("0.5", r"sparse_ratio = '0\.5': it is text; write the number without quotes"),
        ("50%", r"sparse_ratio = '50%': it is text; write the fraction 0\.5"),
        ("half", "sparse_ratio = 'half': Input should be a valid number"),
        ("nan", "sparse_ratio = 'nan': it is text"),
        (True, "sparse_ratio = True: True is no number"),
        (False, "sparse_ratio = False: False is no number"),
        (50, r"sparse_ratio = 50: Input should be less than 1; did you mean 0\.5\?"),
        (1.0, r"sparse_ratio = 1\.0: Input should be less than 1$"),
        ([0.5], r"sparse_ratio = \[0\.5\]: Input should be a valid number"),
    ],
)
def test_a_ratio_is_a_number(ratio: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.load([{**ENTRY, "sparse_ratio": ratio}])


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"seed": "5"}, "seed = '5'"),
        ({"seed": True}, "seed = True"),
        ({"training": {"max_epochs": "1"}}, "training.max_epochs = '1'"),
        ({"training": {"optimizer": {"lr": "0.1"}}}, "training.optimizer.lr = '0.1'"),
        ({"example_shape": [1, "28"]}, "example_shape = [1, '28']"),
        ({"example_shape": [1, True]}, "example_shape = [1, True]"),
        ({"report": {"latency_batches": ["1"]}}, "report.latency_batches = ['1']"),
        ({"pruning": {"options": {"temperature": "1.0"}}}, "options.temperature = '1.0'"),
        ({"pruning": {"options": {"temperature": True}}}, "options.temperature = True"),
        ({"pruning": {"options": {"temperature": {"start": "1.0", "end": 1}}}}, "options.temperature.start = '1.0'"),
        ({"pruning": {"options": {"temperature": {"start": 1, "end": True}}}}, "options.temperature.end = True"),
        ({"pruning": {"config_list": [{**ENTRY, "granularity": ["4", 4]}]}}, "granularity = ['4', 4]"),
        ({"pruning": {"config_list": [{**ENTRY, "global_group_id": True}]}}, "global_group_id = True"),
    ],
)
def test_numbers_in_disguise_are_refused_everywhere(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig.load({"pruning": {"config_list": [ENTRY]}, **values})
    assert f"{key}: " in str(error.value)


def test_numbers_as_users_have_them_are_taken() -> None:
    config = load(
        seed=np.int64(3),
        training={"optimizer": {"lr": "1e-3", "weight_decay": np.float64(0.5)}, "devices": "2"},
        pruning={"config_list": [{**ENTRY, "sparse_ratio": np.float32(0.5), "global_group_id": "7"}]},
        model={"name": "lenet5", "options": {"width": np.float64(2), "sizes": (1, 2), "path": Path("a/b")}},
    )
    assert config.seed == 3
    assert config.training.optimizer.lr == 0.001
    assert config.training.devices == "2"
    assert config.pruning.config_list[0].global_group_id == "7"
    assert config.model is not None
    assert config.model.options == {"width": 2.0, "sizes": [1, 2], "path": str(Path("a/b"))}


def test_sections_and_schedules_may_be_objects() -> None:
    section = PruningSection(
        config_list=(LayerRule(op_types=("Conv2d",), sparse_ratio=0.5),), options={"temperature": Schedule(2.0, 1.0)}
    )
    config = RunConfig.load(UserDict(pruning=section))
    assert config.pruning.method_options() == section.method_options()
    assert config.pruning.config_list == section.config_list
