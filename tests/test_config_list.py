"""Entries of NNI's config lists, in every form that NNI takes them: all keys of its schema, and NNI 2's format.

That NNI reads them alike is for tests/gumbel_nni/test_nni_config.py.
"""

from __future__ import annotations

import ast
import logging
import re
from typing import Any

import pytest
from torch import nn

from gumbel_plugin.config_list import LayerRule
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.training.planner import build_plan

# A value for each key of NNI's schema for pruning, and what is said where it has no meaning here.
KEYS: dict[str, tuple[Any, str]] = {
    "op_types": (["Linear"], ""),
    "op_names": (["0"], ""),
    "op_names_re": (["0"], ""),
    "exclude_op_names": (["2"], ""),
    "exclude_op_types": (["ReLU"], ""),
    "exclude_op_names_re": (["2"], ""),
    "target_names": (["weight", "bias"], ""),
    "target_settings": ({"weight": {"sparse_ratio": 0.5}}, ""),
    "sparse_ratio": (0.5, ""),
    "sparse_threshold": (0.5, ""),
    "max_sparse_ratio": (0.75, ""),
    "min_sparse_ratio": (0.25, ""),
    "global_group_id": (1, ""),
    "dependency_group_id": ("a", ""),
    "internal_metric_block": (2, "internal_metric_block has no meaning here"),
    "granularity": ([1, 3], ""),
    "apply_method": ("bypass", "apply_method 'bypass' has no meaning here: gates multiply the weight"),
    "align": ({"module_name": "0", "target_name": "weight", "dims": [0]}, "such entries are for the list"),
}
SELECTIONS = ("op_types", "op_names", "op_names_re")
SETTINGS = {key for key in KEYS if not key.startswith(("op_", "exclude_op_", "target_"))}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))


def entry_with(key: str) -> dict[str, Any]:
    selected = {} if key in SELECTIONS else {"op_names": ["0"]}
    return {**selected, "granularity": "element", key: KEYS[key][0]}


def warnings_of(entry: dict[str, Any], caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build_plan(network(), RunConfig.load([entry]).pruning, [], seed=0)
    return caplog.messages


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_honored_or_named_in_one_warning(key: str, caplog: pytest.LogCaptureFixture) -> None:
    entry = entry_with(key)
    says = KEYS[key][1]
    if key == "align":  # a list with such entries: tests/gumbel_nni/test_gumbel_pruner.py
        with pytest.raises(ConfigError, match=says):
            RunConfig.load([entry])
        return
    found = warnings_of(entry, caplog)
    assert len(found) == (1 if says else 0)
    assert says in "".join(found)


@pytest.mark.parametrize("key", sorted(SETTINGS - {"align"}))
def test_settings_of_the_weight_are_those_of_the_entry(key: str) -> None:
    value = KEYS[key][0]
    nested = LayerRule.model_validate({"op_names": ["0"], "target_settings": {"weight": {key: value}}})
    assert getattr(nested, key) == getattr(LayerRule.model_validate({"op_names": ["0"], key: value}), key)


@pytest.mark.parametrize("key", sorted(SETTINGS))
def test_settings_of_the_bias_follow_the_weight(key: str, caplog: pytest.LogCaptureFixture) -> None:
    bias = {key: KEYS[key][0]}
    entry = {"op_names": ["0"], "granularity": "element", "target_settings": {"bias": bias}}
    (found,) = warnings_of(entry, caplog)
    assert f"target_settings.bias.{key} has no meaning here: a bias follows its weight's mask" in found


def test_what_nni_writes_by_itself_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    align = {"module_name": None, "target_name": "weight", "dims": [0]}
    settings = {"weight": {"sparse_ratio": 0.5, "apply_method": "mul"}, "bias": {"apply_method": "mul", "align": align}}
    entry = {"op_names": ["0"], "granularity": "element", "internal_metric_block": 1, "target_settings": settings}
    assert warnings_of(entry, caplog) == []


def test_a_ratio_above_its_limit_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    entry = {"op_names": ["0"], "granularity": "element", "sparse_ratio": 0.8, "max_sparse_ratio": 0.5}
    (found,) = warnings_of(entry, caplog)
    assert "sparse_ratio 0.8 is above max_sparse_ratio 0.5, which holds" in found
    assert warnings_of({**entry, "sparse_ratio": 0.5}, caplog) == []


def test_several_entries_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    rules = [{"op_names": [name], "granularity": "element", "apply_method": "add"} for name in ("0", "2")]
    with caplog.at_level(logging.WARNING):
        build_plan(network(), RunConfig.load(rules).pruning, [], seed=0)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        ([[2, 2]], (2, 2)),
        ([[2, 2], "front"], (2, 2)),
        ([[2, 2], "front", 1], (2, 2)),
        ([[1], "back", -1], "out_channel"),
        ([[-1, 1], "back", -1], "in_channel"),
        ([[1, 1], "back", -1], "kernel"),
    ],
)
def test_a_granularity_in_nnis_nested_form(granularity: Any, expected: Any) -> None:
    assert LayerRule.model_validate({"op_names": ["0"], "granularity": granularity}).granularity == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"granularity": "per_channel"}, "'per_channel' is for inputs and outputs; for a weight write 'out_channel'"),
        ({"granularity": [[3, 1], "back", -1]}, r"of the sizes that are padded, only .*\(kernel\) can be learned"),
        ({"granularity": [[1], "back", -1, 4]}, "of the sizes that are padded"),
        ({"internal_metric_block": 0}, "internal_metric_block = 0"),
        ({"apply_method": "gumbel_mul"}, "apply_method = 'gumbel_mul'"),
        ({"target_settings": {"bias": {"sparse_ration": 1}}}, "unknown key; did you mean 'sparse_ratio'"),
        ({"target_settings": {"bias": 3}}, r"target_settings\.bias = 3: it must be a mapping"),
        ({"quant_dtype": "int8"}, "quant_dtype is a quantizer's"),
        ({"quant_types": ["weight"], "quant_bits": 8}, "quant_types is a quantizer's"),
    ],
)
def test_what_breaks_a_rule(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.load([{"op_names": ["0"], **keys}])


# Entries of NNI 2, and the ratio and the limit that they mean.
OLD_ENTRIES: list[tuple[dict[str, Any], float, float | None]] = [
    ({"op_types": ["Linear"], "sparsity": 0.5}, 0.5, None),
    ({"op_types": ["Linear"], "sparsity_per_layer": 0.5}, 0.5, None),
    ({"op_names": ["0", "2"], "total_sparsity": 0.5, "max_sparsity_per_layer": 0.8}, 0.5, 0.8),
    ({"op_partial_names": ["0"], "op_types": ["Linear"], "sparsity": 0.5}, 0.5, None),
]


def line_of(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the line that the error about an entry of NNI 2 gives to write."""
    with pytest.raises(ConfigError, match=r"is NNI 2's: write instead \{") as caught:
        RunConfig.load([entry])
    return ast.literal_eval(re.search(r"{.*}", str(caught.value))[0])


@pytest.mark.parametrize(("entry", "ratio", "limit"), OLD_ENTRIES)
def test_an_entry_of_nni_2_comes_with_the_line_to_write(
    entry: dict[str, Any], ratio: float, limit: float | None
) -> None:
    rule = RunConfig.load([line_of(entry)]).pruning.config_list[0]
    assert (rule.sparse_ratio, rule.max_sparse_ratio) == (ratio, limit)
    assert (rule.global_group_id is None) == ("total_sparsity" not in entry)


def test_an_exclusion_of_nni_2_comes_with_the_keys_to_add() -> None:
    rules = [{"op_types": ["Linear"], "sparse_ratio": 0.5}, {"op_names": ["2"], "exclude": True}]
    with pytest.raises(ConfigError, match=r"config_list\.1: exclude is NNI 2's: leave this entry out") as caught:
        RunConfig.load(rules)
    added = ast.literal_eval(re.search(r"{.*}", str(caught.value))[0])
    assert added == {"exclude_op_names": ["2"]}
    assert RunConfig.load([{**rules[0], **added}]).pruning.config_list[0].exclude_op_names == ("2",)
