"""What a `GumbelPruner` is given, read and checked before anything is wrapped or trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from nni.compression.base import config as nni_config
from nni.compression.base.compressor import Compressor
from nni.compression.utils import Evaluator

from gumbel_nni.compat.messages import complaints
from gumbel_plugin.config import ConfigLike, PruningConfig
from gumbel_plugin.errors import ConfigError, shown
from gumbel_plugin.training.planner import needs_groups


def check_evaluator(evaluator: Any) -> None:
    """Refuse what is neither one of NNI's evaluators nor None.

    Raises:
        ConfigError: With the line to write.
    """
    if evaluator is not None and not isinstance(evaluator, Evaluator):
        raise ConfigError(
            f"evaluator is {_described(evaluator)}; it must be one of NNI's, such as "
            "TorchEvaluator(training_func, nni.trace(torch.optim.Adam)(model.parameters()), training_step), or None "
            "where the configuration says what to train with"
        )


def check_compressor(compressor: Any) -> None:
    """Refuse what is no compressor of NNI's where one is inherited from.

    Raises:
        ConfigError: With what to call instead.
    """
    if not isinstance(compressor, Compressor):
        raise ConfigError(
            f"from_compressor needs a compressor of NNI's, but got {_described(compressor)}; for a plain model call "
            "GumbelPruner(model, config_list, evaluator)"
        )


def load_config(config: ConfigLike) -> PruningConfig:
    """Read a configuration; where NNI has something to say against a config list too, say that as well."""
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
    if config.example_shape is not None:
        return torch.randn(config.example_shape, generator=torch.Generator().manual_seed(config.seed))
    dummy = evaluator.get_dummy_input() if evaluator is not None else None
    if dummy is not None:
        return dummy
    if config.data is not None:
        from gumbel_nni.config_evaluator import first_inputs

        return first_inputs(config)
    if needs_groups(config.pruning):
        raise ConfigError(
            "removing whole channels needs inputs to trace the model with: pass example_inputs=, or example_shape in "
            "the configuration, or dummy_input in the evaluator, or a data section in the configuration"
        )
    return None


def _described(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else shown(value)
