"""Torch-Pruning's arguments, each with its rule; names in them become the model's own layers and parameters.

Torch-Pruning passes over what it does not find in the model, so that a layer that should stay is pruned.
"""

from __future__ import annotations

import inspect
import logging
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, get_args

import torch_pruning as tp
from torch import nn

from gumbel_plugin.config import PruningSection
from gumbel_plugin.errors import ConfigError, GraphError, LifecycleError, TargetError, nearest, shown
from gumbel_plugin.graph.dependency_groups import DependencyGroups
from gumbel_plugin.graph.input_major_pruner import with_input_major
from gumbel_plugin.graph.tracing import Forward
from gumbel_plugin.graph.tracing_repairs import missing_pruners
from gumbel_plugin.layers.example_inputs import call_model
from gumbel_plugin.layers.model_check import refuse_unusable
from gumbel_plugin.layers.weights import modules_with_gates
from gumbel_plugin.sparsity.controller import BudgetConfig
from gumbel_plugin.training.group_planner import GroupMetric

_logger = logging.getLogger(__name__)

_METRICS: tuple[GroupMetric, ...] = get_args(GroupMetric)
_RATIOS = ("pruning_ratio", "ch_sparsity", "head_pruning_ratio")
_RATIO_DICTS = ("pruning_ratio_dict", "ch_sparsity_dict", "head_pruning_ratio_dict")
_COUNT_DICTS = ("num_heads", "in_channel_groups", "out_channel_groups", "channel_groups")
_BUDGETS = (*_RATIOS, "max_pruning_ratio", "round_to", "global_pruning", "isomorphic", *_RATIO_DICTS)
_UNSAID: tuple[object, ...] = (None, {}, inspect.Parameter.empty)  # defaults of arguments for which None says nothing


def _is_number(value: object, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_ratio(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_count(value: Any) -> bool:
    return _is_number(value, numbers.Integral) and value >= 1


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys((*_RATIOS, *_RATIO_DICTS), (_is_ratio, "must be in [0, 1)")),
    "max_pruning_ratio": (lambda value: _is_number(value) and 0 < value <= 1, "must be in (0, 1]"),
    **dict.fromkeys(
        ("iterative_steps", "round_to", *_COUNT_DICTS), (_is_count, "must be a whole number of at least 1")
    ),
    **dict.fromkeys(
        ("global_pruning", "isomorphic", "prune_num_heads", "prune_head_dims"),
        (lambda value: isinstance(value, bool), "must be True or False"),
    ),
    **dict.fromkeys(
        ("importance", "iterative_pruning_ratio_scheduler", "forward_fn", "output_transform"),
        (callable, "must be a function"),
    ),
}
"""What an argument's value, or each value of a dictionary, must be."""


def read_arguments(
    model: nn.Module, target: GroupMetric | None, arguments: Mapping[str, Any], pruning: PruningSection, inexact: bool
) -> tuple[GroupMetric, dict[str, Any]]:
    """Check what can be checked without a graph; return the metric, and the arguments as Torch-Pruning takes them.

    Args:
        model: The model that they speak of.
        target: What ratios are fractions of; None if that was not given.
        arguments: What the user gave; it is left alone. Containers that are returned may be written into, which
            Torch-Pruning does (its own defaults leak between pruners).
        pruning: What a configuration says beside.
        inexact: Whether groups are gated that cannot be cut exactly.

    Raises:
        ConfigError: If an argument is unknown, out of range or contradicts another one, or the model cannot be gated.
        TargetError: If a name or a layer is none of the model's.
        LifecycleError: If the model has gates already.
        GraphError: If all of it is frozen.
    """
    _check_model(model)
    parameters = inspect.signature(tp.pruner.BasePruner.__init__).parameters
    valid = parameters.keys() - {"self", "model", "example_inputs"}
    if target not in (None, *_METRICS):
        raise ConfigError(f"target {shown(target)} is unknown{nearest(str(target), _METRICS)}")
    for name in arguments:
        if name not in valid:
            raise ConfigError(f"argument {name!r} is unknown{nearest(name, valid)}")
    given = {key: each for key, each in arguments.items() if each is not None or parameters[key].default not in _UNSAID}
    if pruning.budget.given and not pruning.config_list:
        target, given = _with_budget(target, given, pruning.budget)
    metric = target or "channels"
    reader = _Reader(model)
    own = {name: reader.read(name, value) for name, value in given.items()}
    _check_together(metric, given, own)
    if pruning.config_list:
        _check_config_list(pruning, metric, inexact, given)
    for name in _COUNT_DICTS:
        own.setdefault(name, {})
    roots = own.get("root_module_types", parameters["root_module_types"].default)
    own["root_module_types"] = list(with_input_major(roots, model))
    own["customized_pruners"] = {**missing_pruners(model), **own.get("customized_pruners", {})}
    return metric, own


def _check_model(model: nn.Module) -> None:
    """Check that a model can be gated at all."""
    refuse_unusable(model, "GumbelGroupPruner")
    if modules_with_gates(model):
        raise LifecycleError("the model has gates already; call step() on the pruner that attached them first")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise GraphError("every parameter of the model is frozen, so there is nothing to learn from; unfreeze some")


def _with_budget(
    target: GroupMetric | None, given: Mapping[str, Any], budget: BudgetConfig
) -> tuple[GroupMetric, dict[str, Any]]:
    """Return the target and the arguments, with what a budget says that has no config list beside it.

    Raises:
        ConfigError: If both say something else, or the metric is none that this pruner has.
    """
    own_ratio = "ch_sparsity" if "ch_sparsity" in given else "pruning_ratio"
    shared = None if budget.scope is None else budget.scope == "network"
    for key, value, name, own in (
        ("metric", budget.metric, "target", target),
        ("ratio", budget.ratio, own_ratio, given.get(own_ratio)),
        ("scope", shared, "global_pruning", given.get("global_pruning")),
    ):
        if value is not None and own is not None and value != own:
            raise ConfigError(
                f"{name} = {shown(own)} and pruning.budget.{key} = {getattr(budget, key)!r} disagree: say it in one of "
                "both places"
            )
    metric = target or budget.metric
    if metric is None or metric == "weights":
        raise ConfigError(
            "pruning.budget counts weights unless it has another metric, and pruning.config_list is empty: name the "
            f"layers there, or give the budget one of the metrics {', '.join(_METRICS)}"
        )
    if metric != "channels" and budget.scope == "layer":
        raise ConfigError(f"pruning.budget.scope 'layer': {metric} are budgeted for the whole network; use 'network'")
    ratio = {} if budget.ratio is None else {own_ratio: budget.ratio}
    return metric, {"global_pruning": metric == "channels" and budget.scope != "layer", **ratio, **given}


def _check_together(metric: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check ratios against the metric and the limit."""
    ratios = {name: own[name] for name in _RATIOS if name in own}
    for name in _RATIO_DICTS:
        if own.get(name) and metric != "channels":
            raise ConfigError(f"{name} speaks of channels; with target={metric!r} the groups share one budget")
        ratios.update({f"{name}[{_key(key)}]": ratio for key, ratio in given.get(name, {}).items()})
    highest = max(ratios, key=lambda name: float(ratios[name]), default="")
    limit = own.get("max_pruning_ratio", 1.0)
    if highest and ratios[highest] > limit:
        _logger.warning("%s = %g is above max_pruning_ratio = %g, which holds", highest, ratios[highest], limit)


def _check_config_list(pruning: PruningSection, metric: str, inexact: bool, given: Mapping[str, Any]) -> None:
    """Refuse what says once more what a config list says already, and entries that remove anything but channels."""
    twice = [name for name in _BUDGETS if name in given]
    twice += ["iterative_steps"] * (given.get("iterative_steps", 1) > 1)
    twice += ["target"] * (metric != "channels") + ["inexact"] * inexact
    if twice:
        raise ConfigError(
            f"{twice[0]} beside pruning.config_list: the config list says what is gated and how much of it goes, in "
            "one step; leave one of the two out"
        )
    for rule in pruning.config_list:
        if not rule.structured:
            raise ConfigError(
                f"pruning.config_list: granularity {shown(rule.granularity)} masks weights of one layer, but this "
                "pruner removes whole channels; leave the granularity out, or use GumbelPruner"
            )


class _Reader:
    """Reads arguments that speak of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = {name: layer for name, layer in model.named_modules(remove_duplicate=False) if name}
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def read(self, argument: str, given: Any) -> Any:
        """Return an argument's value with the model's own layers and parameters in it."""
        if argument in (*_RATIO_DICTS, *_COUNT_DICTS):
            return self._numbers(argument, given)
        if argument in _RULES:
            return _checked(argument, given, argument)
        reader = getattr(self, argument, None)  # what has a form of its own has a method of its name
        return given if reader is None else reader(given)

    def ignored_layers(self, given: Any) -> list[nn.Module | nn.Parameter]:
        """Return layers, and parameters of none."""
        found = []
        for each in _listed("ignored_layers", given, (str, nn.Module, nn.Parameter)):
            named = isinstance(each, str) and each not in self._layers and each in self._parameters
            kind = nn.Parameter if named or isinstance(each, nn.Parameter) else nn.Module
            found.append(self._part("ignored_layers", each, kind))
        return found

    def unwrapped_parameters(self, given: Any) -> list[tuple[nn.Parameter, int]]:
        """Return pairs of a parameter and its dimension: documented as a dictionary, read as a list."""
        argument, pairs = "unwrapped_parameters", []
        for pair in given.items() if isinstance(given, Mapping) else _listed(argument, given, (str, nn.Parameter)):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ConfigError(f"{argument}: {shown(pair)} must be a parameter (or its name) and a dimension")
            parameter, dim = self._part(argument, pair[0], nn.Parameter), pair[1]
            dims = parameter.dim()
            if not _is_number(dim, int) or not -dims <= dim < dims:
                raise ConfigError(f"{argument}: {shown(dim)} is no dimension of a parameter that has {dims}")
            pairs.append((parameter, dim))
        return pairs

    def customized_pruners(self, given: Any) -> dict[type | nn.Module, tp.BasePruningFunc]:
        """Return pruning functions by class of layers, or by layer."""
        found = {}
        for key, pruner in _mapping("customized_pruners", given).items():
            if not isinstance(pruner, tp.BasePruningFunc):
                hint = "; pass an instance of it" if inspect.isclass(pruner) else ""
                raise ConfigError(f"customized_pruners: {shown(pruner)} is no torch_pruning.BasePruningFunc{hint}")
            found[key if inspect.isclass(key) else self._part("customized_pruners", key)] = pruner
        return found

    def root_module_types(self, given: Any) -> list[type[nn.Module]]:
        """Return the classes of layers that define groups."""
        types = _listed("root_module_types", given, (str, type, nn.Module))
        for each in types:
            if not (inspect.isclass(each) and issubclass(each, nn.Module)):
                raise ConfigError(f"root_module_types: {shown(each)} is no class of layers such as torch.nn.Linear")
        if not types:
            raise ConfigError("root_module_types = []: nothing would be pruned; leave it out, or name a layer's class")
        return types

    def _numbers(self, argument: str, given: Any) -> dict[Any, Any]:
        """Return numbers by layer, or by several layers that share a ratio; each has only one."""
        found: dict[Any, Any] = {}
        for key, value in _mapping(argument, given).items():
            several = isinstance(key, tuple) and argument in ("pruning_ratio_dict", "ch_sparsity_dict")
            parts = [self._part(argument, each) for each in (key if several else (key,))]
            own = tuple(parts) if several else parts[0]
            if own in found:
                raise ConfigError(f"{argument}: one {type(own).__name__} is given twice, by its name and itself")
            found[own] = _checked(f"{argument}[{_key(key)}]", value, argument)
            if argument in _COUNT_DICTS:
                _require_divisor(argument, key, parts[0], value)
        return found

    def _part(self, argument: str, given: Any, kind: type = nn.Module) -> Any:
        """Return the layer, or the parameter, that is given or named."""
        parts: Mapping[str, object] = self._layers if kind is nn.Module else self._parameters
        what = "layer" if kind is nn.Module else "parameter"
        if isinstance(given, str):
            if given not in parts:
                raise TargetError(f"{argument}: the model has no {what} {shown(given)}{nearest(given, parts)}")
            return parts[given]
        if not isinstance(given, kind):
            raise ConfigError(f"{argument}: {shown(given)} is neither a {what} of the model nor the name of one")
        if given is not self._model and all(given is not part for part in parts.values()):
            raise TargetError(
                f"{argument}: a {what} is a {type(given).__name__} of another model; pass this model's own, or its name"
            )
        return given


def _checked(what: str, value: Any, argument: str) -> Any:
    """Return a value that the argument's rule allows."""
    holds, rule = _RULES[argument]
    if not holds(value):
        raise ConfigError(f"{what} = {shown(value)}: {rule}")
    return value


def _require_divisor(argument: str, key: object, layer: nn.Module, count: int) -> None:
    """Refuse a number of heads or groups into which a layer's channels do not fall."""
    side = "in" if argument == "in_channel_groups" else "out"
    widths = (getattr(layer, f"{side}_{unit}", None) for unit in ("features", "channels"))
    width = next((width for width in widths if isinstance(width, int)), None)
    if width is not None and width % count:
        raise ConfigError(f"{argument}[{_key(key)}] = {count}: must divide the layer's {width} {side}put channels")


def _listed(argument: str, given: Any, single: tuple[type, ...]) -> list[Any]:
    """Return the entries of a list; what is one entry itself is a list of one."""
    if isinstance(given, single):
        return [given]
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise ConfigError(f"{argument} = {shown(given)}: must be a list")
    return list(given)


def _mapping(argument: str, given: Any) -> Mapping[Any, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{argument} = {shown(given)}: must be a dictionary")
    return given


def _key(key: Any) -> str:
    """Return a dictionary's key as a message shows it: a layer's name, or the class of a layer."""
    parts = key if isinstance(key, tuple) else (key,)
    return ", ".join(shown(part) if isinstance(part, str) else type(part).__name__ for part in parts)


def check_graph(pruner: tp.pruner.BasePruner, arguments: Mapping[str, Any], dependency: DependencyGroups) -> None:
    """Check what Torch-Pruning made of the arguments; warn if heads are to be pruned, but none can be.

    Raises:
        ConfigError: If the schedule of ratios is none: one in [0, 1) for 0 steps and for each of the steps.
        TargetError: If a layer that has a ratio of its own is not in the graph; Torch-Pruning would ignore it.
    """
    steps = pruner.iterative_steps
    schedules = (pruner.per_step_pruning_ratio, pruner.per_step_head_pruning_ratio)
    for ratios in (*schedules, *pruner.pruning_ratio_dict.values(), *pruner.head_pruning_ratio_dict.values()):
        if not isinstance(ratios, Collection) or len(ratios) != steps + 1 or not all(map(_is_ratio, ratios)):
            raise ConfigError(
                f"iterative_pruning_ratio_scheduler returned {shown(ratios)}: must be a list of {steps + 1} ratios in "
                "[0, 1), of which the first is for no step"
            )
    names = {module: name for name, module in pruner.model.named_modules()}
    nodes = pruner.DG.module2node
    for argument in _RATIO_DICTS:
        for key in arguments.get(argument, {}):
            for module in key if isinstance(key, tuple) else (key,):
                if all(part not in nodes for part in module.modules()):
                    valid = [names[node] for node in nodes if node in names]
                    name = names[module]
                    raise TargetError(f"{argument}: {name!r} is not in the dependency graph{nearest(name, valid)}")
    heads = [group for group in dependency.groups if group.name in dependency.heads]
    if pruner.prune_num_heads and all(group.safety != "exact" for group in heads):
        reasons = list(dict.fromkeys(f"{group.name}: {group.reason}" for group in heads))
        reasons[3:] = [f"and {len(reasons) - 3} more"] if len(reasons) > 3 else []
        why = "; ".join(reasons) or "no attention layer with several heads was found in the model"
        _logger.warning("prune_num_heads=True prunes no head: %s", why)


def forward_of(forward_fn: Forward | None, output_transform: Callable[[Any], Any] | None) -> Forward | None:
    """Return one function that does what both of Torch-Pruning's arguments do, None if neither is given."""
    if forward_fn is None and output_transform is None:
        return None

    def forward(model: nn.Module, example_inputs: Any) -> Any:
        outputs = (forward_fn or call_model)(model, example_inputs)
        return output_transform(outputs) if output_transform else outputs

    return forward
