"""What a `GumbelPruner` is given beside its configuration, checked before anything is wrapped or trained."""

from __future__ import annotations

from typing import Any

from nni.compression.base.compressor import Compressor
from nni.compression.utils import Evaluator

from gumbel_plugin.errors import ConfigError, shown


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


def check_length(name: str, value: Any) -> None:
    """Refuse a number of steps or epochs that is neither a positive integer nor None.

    Raises:
        ConfigError: With the argument's name and value.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{name} = {shown(value)}: it must be a positive integer, or None")


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


def _described(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else shown(value)
