"""Torch-Pruning's arguments, checked and in the form that it takes them."""

from __future__ import annotations

import inspect
import logging
import numbers
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch_pruning as tp
from torch import nn

from gumbel_plugin.config import PruningSection
from gumbel_plugin.errors import ConfigError, GraphError, LifecycleError, TargetError, nearest, shown
from gumbel_plugin.graph.tracing import Forward
from gumbel_plugin.graph.tracing_repairs import missing_pruners
from gumbel_plugin.layers.example_inputs import call_model
from gumbel_plugin.layers.model_check import refuse_unusable
from gumbel_plugin.layers.weights import modules_with_gates
from gumbel_torch_pruning.named_layers import RATIO_DICTS

_logger = logging.getLogger(__name__)

_TARGETS = ("channels", "macs", "parameters", "latency")
_RATIOS = ("pruning_ratio", "ch_sparsity", "head_pruning_ratio")
_COUNTS = ("iterative_steps", "round_to")
_BUDGETS = (*_RATIOS, "max_pruning_ratio", "round_to", "global_pruning", "isomorphic")
_SWITCHES = ("global_pruning", "isomorphic", "prune_num_heads", "prune_head_dims")
_FUNCTIONS = ("importance", "iterative_pruning_ratio_scheduler", "forward_fn", "output_transform")


def check_arguments(target: str, arguments: Mapping[str, Any], pruning: PruningSection, inexact: bool) -> None:
    """Check what can be checked without the model.

    Raises:
        ConfigError: If an argument is unknown, out of range or contradicts another one.
    """
    if target not in _TARGETS:
        raise ConfigError(f"target {shown(target)} is unknown{nearest(str(target), _TARGETS)}")
    valid = inspect.signature(tp.pruner.BasePruner.__init__).parameters.keys() - {"self", "model", "example_inputs"}
    for name in arguments:
        if name not in valid:
            raise ConfigError(f"argument {name!r} is unknown{nearest(name, valid)}")
    ratios = {name: arguments[name] for name in _RATIOS if name in arguments}
    for name in RATIO_DICTS:
        given = arguments.get(name)
        if given and target != "channels":
            raise ConfigError(f"{name} speaks of channels; with target={target!r} the groups share one budget")
        if isinstance(given, Mapping):
            ratios.update({f"{name}[{_kinds(key)}]": ratio for key, ratio in given.items()})
    for name, ratio in ratios.items():
        if not (ratio is None and name == "ch_sparsity") and not (_is_number(ratio) and 0 <= ratio < 1):
            raise ConfigError(f"{name} = {shown(ratio)}: must be in [0, 1)")
    limit = arguments.get("max_pruning_ratio", 1.0)
    if not (_is_number(limit) and 0 < limit <= 1):
        raise ConfigError(f"max_pruning_ratio = {shown(limit)}: must be in (0, 1]")
    highest = max(ratios, key=lambda name: ratios[name] or 0.0, default="")
    if highest and (ratios[highest] or 0.0) > limit:
        _logger.warning("%s = %g is above max_pruning_ratio = %g, which holds", highest, ratios[highest], limit)
    for name in _COUNTS:
        count = arguments.get(name, 1)
        if not (count is None and name == "round_to") and not (_is_number(count, numbers.Integral) and count >= 1):
            raise ConfigError(f"{name} = {shown(count)}: must be a whole number of at least 1")
    for name in _SWITCHES:
        if not isinstance(arguments.get(name, False), bool):
            raise ConfigError(f"{name} = {shown(arguments[name])}: must be True or False")
    for name in _FUNCTIONS:
        function = arguments.get(name, len)
        if not callable(function) and not (function is None and name != "iterative_pruning_ratio_scheduler"):
            raise ConfigError(f"{name} = {shown(function)}: must be a function")
    if pruning.config_list:
        _check_config_list(pruning, target, inexact, arguments)
    elif pruning.budget.given:
        raise ConfigError(
            "pruning.budget says how much goes, but pruning.config_list is empty: name the layers there, or say it by "
            "target= and pruning_ratio="
        )


def _check_config_list(pruning: PruningSection, target: str, inexact: bool, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that say once more what a config list says already: what is gated, and how much of it goes.

    Raises:
        ConfigError: If there are such, or an entry removes anything but whole channels.
    """
    given = [name for name in (*_BUDGETS, *RATIO_DICTS) if name in arguments]
    given += ["iterative_steps"] * (arguments.get("iterative_steps", 1) > 1)
    given += ["target"] * (target != "channels") + ["inexact"] * inexact
    if given:
        raise ConfigError(
            f"{given[0]} beside pruning.config_list: the config list says what is gated and how much of it goes, in "
            "one step; leave one of the two out"
        )
    for rule in pruning.config_list:
        if not rule.structured:
            raise ConfigError(
                f"pruning.config_list: granularity {shown(rule.granularity)} masks weights of one layer, but this "
                "pruner removes whole channels; leave the granularity out, or use GumbelPruner"
            )


def check_graph(pruner: tp.pruner.BasePruner, arguments: Mapping[str, Any]) -> None:
    """Check what Torch-Pruning made of the arguments.

    Raises:
        ConfigError: If the schedule of ratios is none.
        TargetError: If a layer that has a ratio of its own is not in the graph.
    """
    _check_schedule(pruner)
    _check_layers(pruner, arguments)


def _check_schedule(pruner: tp.pruner.BasePruner) -> None:
    """Check what the user's ``iterative_pruning_ratio_scheduler`` returned.

    Raises:
        ConfigError: If it is not one ratio in [0, 1) for 0 steps and for each of the ``iterative_steps``.
    """
    steps = pruner.iterative_steps
    schedules = (pruner.per_step_pruning_ratio, pruner.per_step_head_pruning_ratio)
    for ratios in (*schedules, *pruner.pruning_ratio_dict.values(), *pruner.head_pruning_ratio_dict.values()):
        valid = isinstance(ratios, Collection) and len(ratios) == steps + 1
        if not valid or not all(_is_number(ratio) and 0 <= ratio < 1 for ratio in ratios):
            raise ConfigError(
                f"iterative_pruning_ratio_scheduler returned {shown(ratios)}: must be a list of {steps + 1} ratios in "
                "[0, 1), of which the first is for no step"
            )


def check_model(model: nn.Module) -> None:
    """Check that a model can be gated at all.

    Raises:
        ConfigError: If it is wrapped for data parallel training.
        LifecycleError: If it has gates already.
        GraphError: If all of it is frozen.
    """
    refuse_unusable(model, "GumbelGroupPruner")
    if modules_with_gates(model):
        raise LifecycleError("the model has gates already; call step() on the pruner that attached them first")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise GraphError("every parameter of the model is frozen, so there is nothing to learn from; unfreeze some")


def _check_layers(pruner: tp.pruner.BasePruner, arguments: Mapping[str, Any]) -> None:
    """Check that every layer that has a ratio of its own is in the graph; Torch-Pruning would ignore it.

    Raises:
        TargetError: If one is not.
    """
    names = {module: name for name, module in pruner.model.named_modules()}
    nodes = pruner.DG.module2node
    for argument in RATIO_DICTS:
        for key in arguments.get(argument) or {}:
            for module in key if isinstance(key, tuple) else (key,):
                if module not in names or all(part not in nodes for part in module.modules()):
                    name = names.get(module, f"{type(module).__name__} of another model")
                    valid = [names[node] for node in nodes if node in names]
                    raise TargetError(f"{argument}: {name!r} is not in the dependency graph{nearest(name, valid)}")


def own_copies(arguments: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the arguments with containers that Torch-Pruning may write into; its own defaults leak between pruners."""
    own = dict(arguments)
    for name in ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups"):
        own[name] = dict(own.get(name) or {})
    own["customized_pruners"] = {**missing_pruners(model), **(own.get("customized_pruners") or {})}
    return own


def forward_of(forward_fn: Forward | None, output_transform: Callable[[Any], Any] | None) -> Forward | None:
    """Return one function that does what both of Torch-Pruning's arguments do, None if neither is given."""
    if forward_fn is None and output_transform is None:
        return None

    def forward(model: nn.Module, example_inputs: Any) -> Any:
        outputs = (forward_fn or call_model)(model, example_inputs)
        return output_transform(outputs) if output_transform else outputs

    return forward


def _kinds(key: Any) -> str:
    parts = key if isinstance(key, tuple) else (key,)
    return ", ".join(shown(part) if isinstance(part, str) else type(part).__name__ for part in parts)


def _is_number(value: object, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
