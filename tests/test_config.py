from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gumbel_plugin.config import OptimizerConfig, PruningSection
from gumbel_plugin.config_list import LayerRule
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.sparsity.schedules import Schedule
from gumbel_plugin.storage.yaml_files import read_yaml

CONFIGS = Path(__file__).parent.parent / "configs"
ENTRY = {"op_types": ["Conv2d"], "sparse_ratio": 0.5}
FULL: dict[str, Any] = {
    "model": {"name": "lenet5", "num_classes": 10, "in_channels": 1, "options": {"width": 2}},
    "data": {"name": "digits", "root": "data", "batch_size": 32, "validation_fraction": 0.1},
    "training": {"max_epochs": 3, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}, "gradient_clip": 1.0},
    "pruning": {
        "method": "gumbel_softmax",
        "options": {"temperature": {"start": 2.0, "end": 0.5, "shape": "cosine"}, "initial_logit": 1.0},
        "config_list": [
            {**ENTRY, "global_group_id": "all", "max_sparse_ratio": 0.9, "exclude_op_names": ["conv1"]},
            {"op_names_re": ["fc.*"], "granularity": [4, 4], "dependency_group_id": 3, "sparse_threshold": 0.25},
        ],
        "weights": "trained",
        "rescale": "learned",
        "budget": {"ramp": 0.5, "strength": 2.0},
        "phases": {"dense": 0.25, "fixed": 0.25},
    },
    "example_shape": [2, 1, 28, 28],
    "seed": 7,
}


def pruning(**keys: Any) -> PruningSection:
    return RunConfig.load({"pruning": {"config_list": [ENTRY], **keys}}).pruning


def rule(**keys: Any) -> LayerRule:
    return pruning(config_list=[{"op_types": ["Conv2d"], **keys}]).config_list[0]


# Reading ----------------------------------------------------------------------------------------------------------


def test_a_file_a_dict_a_config_list_and_a_config_say_the_same(tmp_path: Path) -> None:
    as_dict = RunConfig.load({"pruning": {"config_list": [ENTRY]}})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"pruning": {"config_list": [ENTRY]}}))
    as_list_in_file = tmp_path / "list.yaml"
    as_list_in_file.write_text(yaml.safe_dump([ENTRY]))
    assert RunConfig.load([ENTRY]) == as_dict
    assert RunConfig.load(path) == as_dict
    assert RunConfig.load(str(path)) == as_dict
    assert RunConfig.load(as_list_in_file) == as_dict
    assert RunConfig.load(as_dict) is as_dict


def test_reading_leaves_the_callers_values_alone() -> None:
    values = copy.deepcopy(FULL)
    RunConfig.load(values)
    assert values == FULL


@pytest.mark.parametrize("values", [FULL, {"pruning": {"config_list": [ENTRY]}}], ids=["full", "least"])
def test_a_resolved_config_reads_back_as_itself(values: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.load(values)
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml())
    assert RunConfig.load(path) == config
    assert RunConfig.load(path).to_yaml() == config.to_yaml()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configs_are_valid(path: Path) -> None:
    config = RunConfig.load(path)
    assert RunConfig.load(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("config", [None, 5, 0.5])
def test_what_is_no_config_is_an_error(config: Any) -> None:
    with pytest.raises(ConfigError, match="it must be a YAML file's path, a dict, an NNI config list"):
        RunConfig.load(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "no valid YAML"), ("just words", "must hold a mapping"), ("", "must hold a mapping")],
)
def test_files_that_hold_no_config_are_an_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(path)
    assert str(path) in str(error.value)


def test_a_file_of_another_encoding_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("# größer".encode("latin-1"))
    with pytest.raises(ConfigError, match="no valid YAML: 'utf-8' codec"):
        read_yaml(path)


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'nowhere\.yaml' does not exist"):
        RunConfig.load("nowhere.yaml")


# Rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dta": {}}, "dta: unknown key; did you mean 'data'"),
        ({"data": {"name": "digits", "batch": 3}}, r"data\.batch: unknown key; did you mean 'batch_size'"),
        (
            {"training": {"optimizer": {"learning_rate": 1}}},
            r"training\.optimizer\.learning_rate: unknown key; valid: lr",
        ),
        ({"training": {"max_epochs": 0}}, r"training\.max_epochs = 0: .*greater than or equal to 1"),
        ({"model": {}}, r"model\.name: required, but missing"),
        (
            {"model": {"name": "x", "options": {"name": "y", "in_channels": 1}}},
            "in_channels, name stand beside options",
        ),
        ({"seed": "x"}, "seed = 'x': .*integer"),
        ({"seed": 10**23}, "seed = 1.*: .*less than"),
        ({"seed": -1}, "seed = -1: .*greater than"),
    ],
)
def test_errors_name_the_key_the_value_and_the_rule(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.load({"pruning": {"config_list": [ENTRY]}, **values})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metod": "x"}, r"pruning\.metod: unknown key; did you mean 'method'"),
        ({"method": "gumble"}, "'gumble' is unknown; did you mean 'gumbel_softmax'"),
        ({"options": {"temperatur": 1}}, r"options\.temperatur: unknown key; did you mean 'temperature'"),
        ({"options": {"temperature": 0}}, r"options\.temperature = 0: the temperature must stay above 0"),
        ({"options": {"temperature": {"start": 1, "end": -1}}}, "temperature must stay above 0, got -1"),
        (
            {"options": {"temperature": {"strat": 1, "end": 1}}},
            r"options\.temperature\.strat: unknown key; did you mean 'start'",
        ),
        ({"options": {"temperature": {"start": 1, "end": 2, "shape": "square"}}}, r"temperature\.shape = 'square'"),
        (
            {"phases": {"dense": 0.6, "fixed": 0.5}},
            r"pruning\.phases: dense \+ fixed must stay below 1, got 0\.6 \+ 0\.5",
        ),
        (
            {"weights": "frozen", "phases": {"dense": 0.1}},
            r"weights 'frozen' .*\(got 0\.1 and 0\.0\).*nothing to train",
        ),
        (
            {"weights": "frozen", "phases": {"fixed": 0.1}},
            r"weights 'frozen' .*\(got 0\.0 and 0\.1\).*nothing to train",
        ),
        ({"budget": {"ramp": 1.5}}, r"pruning\.budget\.ramp = 1\.5"),
        ({"gate_optimizer": {"name": "sgdd"}}, r"pruning\.gate_optimizer\.name = 'sgdd'"),
    ],
)
def test_wrong_pruning_settings_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pruning(**keys)


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1])
def test_a_ratio_outside_zero_to_one_is_an_error(ratio: float) -> None:
    with pytest.raises(ConfigError, match=rf"pruning\.config_list\.0\.sparse_ratio = {ratio}: Input should be"):
        rule(sparse_ratio=ratio)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sparsty": 0.5}, r"config_list\.0\.sparsty: unknown key; did you mean 'sparse_ratio'"),
        ({"sparse_ratio": 0.5, "sparse_threshold": 0.5}, "sparse_ratio and sparse_threshold exclude each other"),
        ({"granularity": "outchannel"}, "'outchannel' is unknown; did you mean 'out_channel'"),
        ({"granularity": [0, 2]}, "each positive or -1"),
        ({"granularity": [1.5]}, r"granularity\.0 = 1\.5: .*integer"),
        ({"target_names": ["_output_"]}, r"target_names \['_output_'\]: learned masks cover 'weight'"),
        ({"target_settings": {"input": {}}}, r"target_settings \['input'\] cannot be learned"),
        ({"target_settings": 3}, "target_settings = 3"),
        ({"target_settings": {"weight": 3}}, r"target_settings\.weight = 3: it must be a mapping"),
        ({"global_group_id": [1]}, r"global_group_id.*valid (integer|string)"),
        ({"min_sparse_ratio": 0.6, "max_sparse_ratio": 0.2}, "min_sparse_ratio 0.6 is above max_sparse_ratio 0.2"),
        ({"op_names_re": ["conv("]}, r"'conv\(' is no regular expression"),
        ({"op_names_re": ["[[a]"]}, r"'\[\[a\]' is no regular expression: Possible nested set"),
        ({"op_names_re": ["a{99999999999}"]}, "is no regular expression: the repetition number"),
        ({"exclude_op_names_re": ["*"]}, r"'\*' is no regular expression"),
        ({"op_types": "Conv2d"}, r"config_list\.0\.op_types = 'Conv2d'"),
        ({"op_types": None}, "names its layers by op_types, op_names or op_names_re; it has none"),
    ],
)
def test_wrong_entries_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule(**keys)


def test_the_second_entry_is_named_by_its_number() -> None:
    with pytest.raises(ConfigError, match=r"pruning\.config_list\.1\.sparse_ratio = 2"):
        RunConfig.load([ENTRY, {**ENTRY, "sparse_ratio": 2}])


def test_settings_of_the_weight_may_stand_under_target_settings() -> None:
    nested = rule(
        target_names=["weight", "bias"], target_settings={"weight": {"sparse_ratio": 0.3, "granularity": [2]}}
    )
    assert nested.sparse_ratio == 0.3
    assert nested.granularity == (2,)
    with pytest.raises(ConfigError, match=r"sparse_ratio = 2"):
        rule(target_settings={"weight": {"sparse_ratio": 2}})


@pytest.mark.parametrize(
    ("granularity", "structured"),
    [
        ("default", True),
        ("out_channel", True),
        ("element", False),
        ("kernel", False),
        ("in_channel", False),
        ([2], False),
    ],
)
def test_whole_output_channels_are_structured(granularity: Any, structured: bool) -> None:
    assert rule(granularity=granularity).structured is structured


# Defaults ---------------------------------------------------------------------------------------------------------


def test_the_gates_defaults_are_the_published_ones() -> None:
    frozen, trained = pruning(weights="frozen"), pruning()
    assert frozen.gate_optimizer_config() == OptimizerConfig(name="sgd", lr=50.0, momentum=0.9)
    assert trained.gate_optimizer_config() == OptimizerConfig(name="adam", lr=0.05)
    assert frozen.method_options().initial_logit == 0.0
    assert trained.method_options().initial_logit == 3.0
    assert pruning(options={"initial_logit": -1}, weights="frozen").method_options().initial_logit == -1
    given = pruning(gate_optimizer={"name": "sgd", "lr": 2.0}, weights="frozen")
    assert given.gate_optimizer_config() == OptimizerConfig(name="sgd", lr=2.0)


def test_a_temperature_schedule_is_read_from_a_mapping() -> None:
    options = pruning(options={"temperature": {"start": 2, "end": 1, "shape": "cosine"}}).method_options()
    assert options.temperature == Schedule(2.0, 1.0, "cosine")


def test_sections_do_not_change() -> None:
    config = RunConfig.load(FULL)
    attempt: Callable[[], None] = lambda: setattr(config, "seed", 3)  # noqa: E731
    with pytest.raises(ValueError, match="frozen"):
        attempt()


@pytest.mark.parametrize("key", ["s[eed", "str", "pruning[0]"])
def test_an_unknown_key_is_named_whatever_it_looks_like(key: str) -> None:
    """Names of pydantic's own, of which an alternative was tried, look like these."""
    with pytest.raises(ConfigError, match=rf"{re.escape(key)}: unknown key"):
        RunConfig.load({"pruning": {}, key: 0})
