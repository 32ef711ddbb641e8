"""Config lists: NNI selects the same layers, cuts them into the same units, and has the keys that the core knows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from nni.compression.base.compressor import register_scalers
from nni.compression.base.config import (
    default_config_schema,
    select_modules_by_config,
    trans_legacy_config_list,
)
from nni.compression.base.wrapper import register_wrappers
from torch import nn

from gumbel_nni.pruner_arguments import nni_entry
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.sparsity.types import granularity_of
from tests.test_config import rule
from tests.test_config_list import KEYS, OLD_ENTRIES, SETTINGS, entry_with, line_of
from tests.training.test_plan import PARTLY_SELECTED, SELECTED, Nested

ENTRIES = [
    {"sparse_ratio": 0.5},
    {"sparse_threshold": 0.5},
    {},
    {"sparse_ratio": 0, "global_group_id": 1, "max_sparse_ratio": 1, "min_sparse_ratio": 0.1},
    {"sparse_ratio": 0.5, "dependency_group_id": "a", "granularity": "element"},
    {"sparse_ratio": 0.5, "granularity": "kernel"},
    {"sparse_ratio": 0.5, "granularity": "in_channel"},
    {"sparse_ratio": 0.5, "granularity": [4, -1]},
    {"exclude_op_names": ["a"], "exclude_op_names_re": ["b.*"], "exclude_op_types": ["Linear"]},
    {"target_names": ["weight"], "target_settings": {"weight": {"sparse_ratio": 0.3}}},
]


@pytest.mark.parametrize("keys", ENTRIES)
def test_nni_accepts_what_as_nni_says(keys: dict[str, Any]) -> None:
    entry = nni_entry(rule(**keys))
    assert default_config_schema("pruning").validate(entry) == entry
    assert "sparse_ratio" in entry or "sparse_ratio" not in {
        **keys,
        **keys.get("target_settings", {}).get("weight", {}),
    }


@pytest.mark.parametrize("keys", [{"op_names": ["a"]}, {"op_names_re": ["a.*"]}])
def test_nni_accepts_other_selections(keys: dict[str, Any]) -> None:
    entry = nni_entry(RunConfig.load([{**keys, "sparse_ratio": 0.5}]).pruning.config_list[0])
    assert default_config_schema("pruning").validate(entry) == {**keys, "sparse_ratio": 0.5, "granularity": "default"}


@pytest.mark.parametrize("granularity", ["element", "kernel", "in_channel", "out_channel", "default", [2, 2], [-1, 2]])
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 8, 2), nn.Linear(4, 8), nn.Conv1d(4, 8, 2)], ids=lambda x: type(x).__name__
)
def test_nni_sees_the_same_units(granularity: Any, layer: nn.Module) -> None:
    entry = RunConfig.load([{"op_types": [type(layer).__name__], "granularity": granularity}]).pruning.config_list[0]
    wrappers, spaces = register_wrappers(nn.Sequential(copy.deepcopy(layer)), [nni_entry(entry)], "pruning")
    register_scalers(spaces, lambda space: "out_channel")
    shrunk = wrappers["0"].pruning_target_spaces["weight"]._scaler.shrink(layer.weight, keepdim=True)
    assert granularity_of(entry.granularity).latent_shape(layer.weight.shape) == tuple(shrunk.shape)


# Selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "expected"), SELECTED + [(keys, names) for keys, names, _ in PARTLY_SELECTED])
def test_nni_selects_the_same_layers(keys: dict[str, Any], expected: list[str]) -> None:
    theirs, _, _ = select_modules_by_config(Nested(), keys)
    assert set(theirs) == set(expected)


# Keys -------------------------------------------------------------------------------------------------------------


def keys_of(schema: dict[Any, Any]) -> Iterator[str]:
    """Yield the keys of one of NNI's schemas, those of alternatives and optional ones included."""
    for key in schema:
        found = getattr(key, "schema", key)
        yield from [found] if isinstance(found, str) else found.args


def test_the_table_has_every_key_of_nnis_schema() -> None:
    top = default_config_schema("pruning")._schema
    (settings,) = (value for key, value in top.items() if getattr(key, "schema", key) == "target_settings")
    assert set(keys_of(top)) == set(KEYS)
    assert set(keys_of(settings[str])) == SETTINGS < set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_nni_takes_every_key(key: str) -> None:
    entry = entry_with(key)
    given = {**entry, "granularity": entry["granularity"] if key == "granularity" else [1]}
    assert default_config_schema("pruning").validate(given).keys() == given.keys()


@pytest.mark.parametrize(("entry", "ratio", "limit"), OLD_ENTRIES)
def test_an_entry_of_nni_2_means_the_same_to_nni(entry: dict[str, Any], ratio: float, limit: float | None) -> None:
    default_config_schema("pruning").validate(line_of(entry))
    theirs = trans_legacy_config_list([entry])[0]["target_settings"]["weight"]
    assert (theirs["sparse_ratio"], theirs.get("max_sparse_ratio")) == (ratio, limit)
