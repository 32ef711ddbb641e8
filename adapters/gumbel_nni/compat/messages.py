"""Where NNI fails without a word, or says nothing and goes wrong: the same checks, with what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from gumbel_nni.compat.patching import replace_once
from gumbel_plugin.errors import ConfigError, TargetError


def config_errors_with_index() -> bool:
    """Let the error of a config list say which entry it is about.

    Cause (whatever the versions): NNI validates entry by entry, and its message names the key only.
    """
    from nni.compression.base.compressor import Compressor

    replace_once(Compressor, "_validate_config", _validate_config)
    return True


def untraced_optimizers() -> bool:
    """Say the line to write where an evaluator's optimizer or scheduler was not made through ``nni.trace``.

    Cause (whatever the versions): TorchEvaluator asserts without a message; TransformersEvaluator takes the default
    optimizer instead of the given one.
    """
    from nni.compression.utils import constructor_helper, evaluator

    replace_once(evaluator.TorchEvaluator, "__init__", _init_torch_evaluator)
    replace_once(evaluator.TransformersEvaluator, "__init__", _init_transformers_evaluator)
    for helper in (constructor_helper.OptimizerConstructHelper, constructor_helper.LRSchedulerConstructHelper):
        if not hasattr(helper.from_trace, "__wrapped__"):
            helper.from_trace = staticmethod(_traced_only(helper.from_trace))
    return True


def optimizers_of_another_model() -> bool:
    """Refuse an optimizer whose parameters are not the model's.

    Cause (a gap, whatever the versions): NNI rebuilds it with the parameters that it recognizes, and trains the others
    no more, without a word; that is what an optimizer made on a wrapped model comes to.
    """
    from nni.compression.utils.constructor_helper import OptimizerConstructHelper

    replace_once(OptimizerConstructHelper, "params2names", _params2names)
    return True


def layer_types_by_name() -> bool:
    """Let the error of an unsupported layer type name the layer, and what pruners and quantizers take.

    Cause (whatever the versions): an AssertionError names the type only, and an internal registry.
    """
    from nni.compression.base.wrapper import ModuleWrapper

    replace_once(ModuleWrapper, "extend_target_spaces", _extend_known_layers)
    return True


def complaints(config_list: Sequence[Any], mode: str = "pruning") -> list[str]:
    """Return what NNI says against the entries of a config list, one line each."""
    from nni.compression.base.config import default_config_schema
    from schema import SchemaError

    found = []
    for index, entry in enumerate(config_list):
        try:
            default_config_schema(mode).validate(entry)
        except SchemaError as error:
            found.append(f"config_list[{index}]: {' '.join(str(error).split())}")
    return found


def _validate_config(self: Any) -> None:
    found = complaints(self.config_list, self.mode)
    if found:
        raise ConfigError("; ".join(found))


def _init_torch_evaluator(self: Any, training_func: Any, optimizers: Any, *args: Any, **kwargs: Any) -> None:
    for optimizer in optimizers if isinstance(optimizers, list | tuple) else [optimizers]:
        _check_traced(optimizer)
    schedulers = args[1] if len(args) > 1 else kwargs.get("lr_schedulers")
    for scheduler in schedulers if isinstance(schedulers, list | tuple) else [schedulers] if schedulers else []:
        _check_traced(scheduler)
    _init_torch_evaluator.__wrapped__(self, training_func, optimizers, *args, **kwargs)  # type: ignore[attr-defined]


def _init_transformers_evaluator(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
    for made in (getattr(trainer, "optimizer", None), getattr(trainer, "lr_scheduler", None)):
        if made is not None:
            _check_traced(made)
    _init_transformers_evaluator.__wrapped__(self, trainer, *args, **kwargs)  # type: ignore[attr-defined]


def _traced_only(from_trace: Any) -> Any:
    def checked(*args: Any) -> Any:
        _check_traced(args[-1])
        return from_trace(*args)

    checked.__wrapped__ = from_trace  # type: ignore[attr-defined]
    return checked


def _check_traced(made: Any) -> None:
    from nni.common import is_traceable

    if is_traceable(made):
        return
    cls = type(made)
    if isinstance(made, torch.optim.Optimizer):
        settings = f"lr={made.defaults['lr']:g}" if "lr" in made.defaults else "..."
        line = f"optimizer = nni.trace({_path(cls)})(model.parameters(), {settings})"
    else:
        line = f"scheduler = nni.trace({_path(cls)})(optimizer, ...)"
    raise ConfigError(
        f"the evaluator's {cls.__name__} was not made through nni.trace, so NNI cannot make it again for the wrapped "
        f"model; write: {line}"
    )


def _path(cls: type) -> str:
    module = "torch.optim" if cls.__module__.startswith("torch.optim.") else cls.__module__
    lr = "lr_scheduler." if cls.__module__ == "torch.optim.lr_scheduler" else ""
    return f"{module}.{lr}{cls.__name__}"


def _params2names(self: Any, model: nn.Module, params: Iterable[Any]) -> list[dict[str, Any]]:
    given = [{**group, "params": _listed(group["params"])} if isinstance(group, dict) else group for group in params]
    tensors = [tensor for group in given for tensor in _tensors(group)]
    own = {id(parameter) for parameter in model.parameters()}
    strangers = sum(id(tensor) not in own for tensor in tensors)
    if strangers:
        raise ConfigError(
            f"{strangers} of the optimizer's parameters are not the model's, and would not be trained: make the "
            "optimizer on the plain model, before any compressor wraps it or after unwrap_model()"
        )
    groups: list[dict[str, Any]] = _params2names.__wrapped__(self, model, given)  # type: ignore[attr-defined]
    return groups


def _tensors(group: Any) -> list[torch.Tensor]:
    params = group["params"] if isinstance(group, dict) else group
    return [params] if isinstance(params, torch.Tensor) else list(params)


def _listed(params: Any) -> Any:
    """Make a list of a generator; a set stays one, for NNI to complain of."""
    return params if isinstance(params, torch.Tensor | set) else list(params)


def _extend_known_layers(self: Any, sub_config: dict[str, Any], mode: str) -> dict[str, Any]:
    from nni.compression.base.setting import PruningSetting, QuantizationSetting

    known = {"pruning": set(PruningSetting.registry), "quantization": set(QuantizationSetting.registry)}
    kind = type(self.module).__name__
    if mode in known and kind not in known[mode]:
        other = "quantization" if mode == "pruning" else "pruning"
        shared = ", ".join(sorted(known["pruning"] & known["quantization"]))
        raise TargetError(
            f"{self.name!r} is a {kind}: {mode} does not take this layer type, {other} "
            f"{'does' if kind in known[other] else 'does not either'}; both take {shared}"
        )
    spaces: dict[str, Any] = _extend_known_layers.__wrapped__(self, sub_config, mode)  # type: ignore[attr-defined]
    return spaces
