"""Arguments that speak of layers: by module, as Torch-Pruning takes them, or by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from gumbel_plugin.errors import ConfigError, TargetError, nearest, shown

_COUNTS = ("num_heads", "channel_groups", "in_channel_groups", "out_channel_groups")
_RATIO_DICTS = ("pruning_ratio_dict", "ch_sparsity_dict", "head_pruning_ratio_dict")


def with_modules(arguments: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the arguments with modules and parameters of the model where the user wrote names.

    Args:
        arguments: Torch-Pruning's arguments.
        model: The model that they speak of.

    Raises:
        ConfigError: If an argument, or something in it, is of a wrong type.
        TargetError: If a module or a parameter is not in the model.
    """
    own = dict(arguments)
    known = _Known(model)
    if own.get("ignored_layers") is not None:
        own["ignored_layers"] = [
            known.find("ignored_layers", each, parameters=True) for each in _listed(own["ignored_layers"])
        ]
    for argument in _RATIO_DICTS:
        own.update(_keyed(argument, own, partial(known.find_all, argument)))
    for argument in _COUNTS:
        own.update(_keyed(argument, own, partial(known.find, argument)))
        for key, count in (own.get(argument) or {}).items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                what = f"{argument}[{known.name(key)!r}]"
                raise ConfigError(f"{what} = {shown(count)}: must be a whole number of at least 1")
    own.update(
        _keyed(
            "customized_pruners",
            own,
            lambda key: key if isinstance(key, type) else known.find("customized_pruners", key),
        )
    )
    if own.get("unwrapped_parameters") is not None:
        own["unwrapped_parameters"] = _dimensions(known, own["unwrapped_parameters"])
    return own


class _Known:
    """The modules and parameters of a model, by name and by themselves."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._names: dict[int, str] = {
            id(part): name for name, part in (*self._modules.items(), *self._parameters.items())
        }
        self._names[id(model)] = ""

    def name(self, part: object) -> str:
        """Return what the model calls a module or a parameter."""
        return self._names[id(part)]

    def find(self, argument: str, wanted: Any, parameters: bool = False) -> Any:
        """Return the module, or also the parameter, that the user means by a name or by itself."""
        if isinstance(wanted, str):
            choices: dict[str, Any] = {**(self._parameters if parameters else {}), **self._modules}
            if wanted not in choices:
                raise TargetError(f"{argument}: {shown(wanted)} is not in the model{nearest(wanted, choices)}")
            return choices[wanted]
        if not isinstance(wanted, nn.Module | nn.Parameter if parameters else nn.Module):
            raise ConfigError(f"{argument}: {shown(wanted)} is neither a module nor the name of one")
        if id(wanted) not in self._names:
            raise TargetError(
                f"{argument}: {type(wanted).__name__} of another model (of a copy, perhaps) is not in the model"
                f"{nearest('', self._modules)}"
            )
        return wanted

    def find_all(self, argument: str, wanted: Any) -> Any:
        """Do the same for a key that may be a tuple of modules."""
        if isinstance(wanted, tuple):
            return tuple(self.find(argument, each) for each in wanted)
        return self.find(argument, wanted)

    def find_parameter(self, argument: str, wanted: Any) -> nn.Parameter:
        """Return the parameter that the user means by a name or by itself."""
        found = self._parameters.get(wanted) if isinstance(wanted, str) else wanted
        if not isinstance(found, nn.Parameter) or id(found) not in self._names:
            hint = nearest(wanted if isinstance(wanted, str) else "", self._parameters)
            what = shown(wanted) if isinstance(wanted, str) else type(wanted).__name__
            raise TargetError(f"{argument}: {what} is no parameter of the model{hint}")
        return found


def _listed(layers: Any) -> list[Any]:
    """Return one layer, or some, as a list."""
    if isinstance(layers, str | nn.Parameter):
        return [layers]
    if isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList):
        return [layers]
    try:
        return list(layers)
    except TypeError:
        raise ConfigError(f"ignored_layers = {shown(layers)}: must be modules or names of modules") from None


def _keyed(argument: str, arguments: Mapping[str, Any], find: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a dict that is keyed by layers with its keys as modules; nothing if it is not given."""
    given = arguments.get(argument)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{argument} = {shown(given)}: must be a dict that is keyed by modules or their names")
    return {argument: {find(key): value for key, value in given.items()}}


def _dimensions(known: _Known, given: Any) -> list[tuple[nn.Parameter, int]]:
    """Return parameters with the dimensions of their channels; documented as a dict, read as a list of pairs."""
    try:
        pairs = [(wanted, dim) for wanted, dim in (given.items() if isinstance(given, Mapping) else given)]
    except (TypeError, ValueError):
        raise ConfigError("unwrapped_parameters must be a dict, or pairs, of parameters and dimensions") from None
    found = []
    for wanted, dim in pairs:
        parameter = known.find_parameter("unwrapped_parameters", wanted)
        if isinstance(dim, bool) or not isinstance(dim, int) or not -parameter.dim() <= dim < parameter.dim():
            raise ConfigError(
                f"unwrapped_parameters[{known.name(parameter)!r}] = {shown(dim)}: must be a dimension of a parameter "
                f"that has {parameter.dim()}"
            )
        found.append((parameter, dim))
    return found
