"""What a `GumbelPruner` is given, read and checked before anything is wrapped or trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nni.compression.base import config as nni_config
from nni.compression.utils import Evaluator

from gumbel_nni.compat.messages import complaints
from gumbel_nni.config_evaluator import first_inputs
from gumbel_plugin.config import ConfigLike, PruningConfig, PruningSection
from gumbel_plugin.config_list import LayerRule
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.sparsity.types import Unstructured, granularity_of
from gumbel_plugin.training.plan import Plan
from gumbel_plugin.training.planner import needs_groups
from gumbel_plugin.training.session_config import read_config


def load_config(config: ConfigLike) -> PruningConfig:
    """Read a configuration; the error of a config list has NNI's complaints, too."""
    if not isinstance(config, list):
        return PruningConfig.load(config)
    for number, entry in enumerate(config):
        if not isinstance(entry, Mapping):
            raise ConfigError(f"config_list.{number} is a {type(entry).__name__}; each entry must be a mapping")
    translated: list[Any] = nni_config.trans_legacy_config_list(config)
    # What an entry of NNI's older format excludes stands in all the others now.
    entries = [entry for entry, given in zip(translated, config, strict=True) if not given.get("exclude")]
    try:
        return PruningConfig.load(entries)
    except ConfigError as error:
        nnis = complaints(entries)
        raise ConfigError(f"{error} (NNI: {'; '.join(nnis)})" if nnis else str(error)) from error


def inputs_to_trace(config: PruningConfig, evaluator: Evaluator | None, given: Any) -> Any:
    """Return what to trace the model with, from the first of the four places that has it."""
    if given is not None:
        return given
    shaped = read_config(config, None)[2]
    if shaped is not None:
        return shaped
    dummy = evaluator.get_dummy_input() if evaluator is not None else None
    if dummy is not None:
        return dummy
    if config.data is not None:
        return first_inputs(config)
    if needs_groups(config.pruning):
        raise ConfigError(
            "removing whole channels needs inputs to trace the model with: pass example_inputs=, or example_shape in "
            "the configuration, or dummy_input in the evaluator, or a data section in the configuration"
        )
    return None


def nni_entries(pruning: PruningSection, plan: Plan) -> list[dict[str, Any]]:
    """Return the config list for NNI, which masks a residual block at its branch's last layer."""
    if pruning.method_options().gates_blocks:
        return [{"op_names": list(plan.gated_layers)}]
    return [nni_entry(rule) for rule in pruning.config_list]


def nni_entry(rule: LayerRule) -> dict[str, Any]:
    """Return an entry of a config list in words that NNI's schema accepts."""
    entry = rule.model_dump(exclude_defaults=True, exclude={"target_settings", "granularity", "apply_method"})
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in entry.items()}
    granularity: Any = rule.granularity if isinstance(rule.granularity, str) else list(rule.granularity)
    if granularity == "kernel":
        granularity = [[1, 1], "back", -1]
    elif isinstance(granularity_of(granularity), Unstructured):
        granularity = [1]
    return {**lists, "granularity": granularity}
