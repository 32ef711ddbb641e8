"""Where NNI fails without a message, or goes on and is wrong: the same checks, with what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from nni.common import is_traceable
from nni.compression.base.compressor import Compressor
from nni.compression.base.config import default_config_schema
from nni.compression.base.setting import PruningSetting, QuantizationSetting
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator, evaluator
from nni.compression.utils.constructor_helper import LRSchedulerConstructHelper, OptimizerConstructHelper
from schema import SchemaError
from torch import Tensor, nn

from gumbel_nni.compat.patching import replaces
from gumbel_plugin.errors import ConfigError, TargetError, nearest, shown
from gumbel_plugin.storage.mask_format import check_format


def complaints(config_list: Sequence[Any], mode: str = "pruning") -> list[str]:
    """Return NNI's complaints about the entries of a config list, one line each."""
    found = []
    for index, entry in enumerate(config_list):
        try:
            default_config_schema(mode).validate(entry)
        except SchemaError as error:
            found.append(f"config_list[{index}]: {' '.join(str(error).split())}")
    return found


@replaces(Compressor, "_validate_config")
def config_errors_with_index(original: Any, self: Any) -> None:
    """Let the error of a config list name the entry that it is about.

    Cause (whatever the versions): NNI validates entry by entry, and its message names the key only.
    """
    found = complaints(self.config_list, self.mode)
    if found:
        raise ConfigError("; ".join(found))


def check_evaluator(given: Any) -> None:
    """Refuse what is neither one of NNI's evaluators nor None.

    Raises:
        ConfigError: With the line to write.
    """
    if given is not None and not isinstance(given, Evaluator):
        raise ConfigError(
            f"evaluator is {_described(given)}; it must be one of NNI's, such as "
            "TorchEvaluator(training_func, nni.trace(torch.optim.Adam)(model.parameters()), training_step), or None "
            "where the configuration names what to train with"
        )


def check_compressor(given: Any) -> None:
    """Refuse what is no compressor of NNI's where one is inherited from.

    Raises:
        ConfigError: With what to call instead.
    """
    if not isinstance(given, Compressor):
        raise ConfigError(
            f"from_compressor needs a compressor of NNI's, but got {_described(given)}; for a plain model call "
            "GumbelPruner(model, config_list, evaluator)"
        )


def check_masks(masks: Mapping[str, Mapping[str, Tensor | None]], wrappers: Mapping[str, ModuleWrapper]) -> None:
    """Refuse masks that do not fit a pruner, which NNI ignores or takes as they are.

    Raises:
        TargetError: If a module or target is not masked by the pruner, or a mask has the wrong shape.
    """
    check_format(masks)
    for name, targets in masks.items():
        if name not in wrappers:
            raise TargetError(f"mask for module {name!r}, not wrapped here{nearest(name, wrappers)}")
        spaces = wrappers[name].pruning_target_spaces
        for target, mask in targets.items():
            if target not in spaces:
                raise TargetError(f"mask for {name}.{target}, no pruning target{nearest(target, spaces)}")
            shape = spaces[target].shape
            if mask is not None and shape is not None and list(mask.shape) != list(shape):
                raise TargetError(f"{name}.{target}: mask {tuple(mask.shape)}, tensor {tuple(shape)}")


def _described(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else shown(value)


@replaces(evaluator.TorchEvaluator, "__init__")
def untraced_optimizers(
    original: Any, self: Any, training_func: Any, optimizers: Any, *args: Any, **kwargs: Any
) -> None:
    """Give the line to write where an evaluator's optimizer or scheduler was not made through ``nni.trace``.

    Cause (whatever the versions): TorchEvaluator asserts without a message; TransformersEvaluator takes the default
    optimizer instead of the given one.
    """
    schedulers = args[1] if len(args) > 1 else kwargs.get("lr_schedulers")
    for made in (optimizers, schedulers or []):
        for each in made if isinstance(made, list | tuple) else [made]:
            _check_traced(each)
    original(self, training_func, optimizers, *args, **kwargs)


@replaces(evaluator.TransformersEvaluator, "__init__", part_of=untraced_optimizers)
def _init_transformers_evaluator(original: Any, self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
    for made in (getattr(trainer, "optimizer", None), getattr(trainer, "lr_scheduler", None)):
        if made is not None:
            _check_traced(made)
    original(self, trainer, *args, **kwargs)


@replaces(OptimizerConstructHelper, "from_trace", part_of=untraced_optimizers)
@replaces(LRSchedulerConstructHelper, "from_trace", part_of=untraced_optimizers)
def _from_trace(original: Any, *args: Any) -> Any:
    _check_traced(args[-1])
    return original(*args)


def _check_traced(made: Any) -> None:
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


@replaces(OptimizerConstructHelper, "params2names")
def optimizers_of_another_model(
    original: Any, self: Any, model: nn.Module, params: Iterable[Any]
) -> list[dict[str, Any]]:
    """Refuse an optimizer whose parameters are not the model's.

    Cause (a gap, whatever the versions): NNI rebuilds it with the parameters that it recognizes, and trains the others
    no more, without a word; that is what an optimizer made on a wrapped model comes to.
    """
    given = [{**group, "params": _listed(group["params"])} if isinstance(group, dict) else group for group in params]
    tensors = [tensor for group in given for tensor in _tensors(group)]
    own = {id(parameter) for parameter in model.parameters()}
    strangers = sum(id(tensor) not in own for tensor in tensors)
    if strangers:
        raise ConfigError(
            f"{strangers} of the optimizer's parameters are not the model's, and would not be trained: make the "
            "optimizer on the plain model, before any compressor wraps it or after unwrap_model()"
        )
    groups: list[dict[str, Any]] = original(self, model, given)
    return groups


def _tensors(group: Any) -> list[Tensor]:
    params = group["params"] if isinstance(group, dict) else group
    return [params] if isinstance(params, Tensor) else list(params)


def _listed(params: Any) -> Any:
    """Make a list of a generator; a set stays one, for NNI to refuse."""
    return params if isinstance(params, Tensor | set) else list(params)


@replaces(ModuleWrapper, "extend_target_spaces")
def layer_types_by_name(original: Any, self: Any, sub_config: dict[str, Any], mode: str) -> dict[str, Any]:
    """Let the error of an unsupported layer type name the layer, and what pruners and quantizers take.

    Cause (whatever the versions): an AssertionError names the type only, and an internal registry.
    """
    known = {"pruning": set(PruningSetting.registry), "quantization": set(QuantizationSetting.registry)}
    kind = type(self.module).__name__
    if mode in known and kind not in known[mode]:
        other = "quantization" if mode == "pruning" else "pruning"
        shared = ", ".join(sorted(known["pruning"] & known["quantization"]))
        raise TargetError(
            f"{self.name!r} is a {kind}: {mode} does not take this layer type, {other} "
            f"{'does' if kind in known[other] else 'does not either'}; both take {shared}"
        )
    spaces: dict[str, Any] = original(self, sub_config, mode)
    return spaces


@replaces(ModuleWrapper, "extend_target_spaces")
def derived_layer_types(original: Any, self: Any, sub_config: dict[str, Any], mode: str) -> dict[str, Any]:
    """Let pruners take layers of classes that are derived from torch's (timm's ``Conv2dSame``).

    Cause (a gap, whatever the versions): NNI knows the settings of a layer's type by the name of its class.
    """
    kinds = [kind.__name__ for kind in type(self.module).__mro__]
    known = next((kind for kind in kinds if kind in PruningSetting.registry), None)
    if mode == "pruning" and known is not None and known != kinds[0]:
        PruningSetting.register(kinds[0], PruningSetting.registry[known])
    spaces: dict[str, Any] = original(self, sub_config, mode)
    return spaces
