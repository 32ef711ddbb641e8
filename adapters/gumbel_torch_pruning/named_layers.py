"""Layers and parameters in Torch-Pruning's arguments: names become the model's own, and what is not its own is refused.

Torch-Pruning passes over what it does not find in the model, so that a layer that should stay is pruned.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

import torch_pruning as tp
from torch import nn

from gumbel_plugin.errors import ConfigError, TargetError, nearest, shown

RATIO_DICTS = ("pruning_ratio_dict", "ch_sparsity_dict", "head_pruning_ratio_dict")
_PARTS = ("num_heads", "in_channel_groups", "out_channel_groups", "channel_groups")
_Part = TypeVar("_Part", nn.Module, nn.Parameter)
_Key = TypeVar("_Key", bound=Hashable)


def with_layers(arguments: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return Torch-Pruning's arguments with the model's layers and parameters where names stand for them.

    Args:
        arguments: What the user gave; it is left alone.
        model: The model that they speak of.

    Raises:
        TargetError: If a name or a layer is none of the model's.
        ConfigError: If something else than a layer, a parameter or a name is where one must be, or a layer's number of
            heads or groups is none or does not divide its channels.
    """
    own = _OwnParts(model)
    found = dict(arguments)
    if found.get("ignored_layers") is not None:
        given = _listed("ignored_layers", found["ignored_layers"], (str, nn.Module, nn.Parameter))
        found["ignored_layers"] = [own.part("ignored_layers", each) for each in given]
    for name in RATIO_DICTS:
        if found.get(name) is not None:
            pairs = ((own.key(name, key), ratio) for key, ratio in _mapping(name, found[name]).items())
            found[name] = _once(name, pairs)
    for name in _PARTS:
        if found.get(name) is not None:
            pairs = ((own.layer(name, key), count) for key, count in _mapping(name, found[name]).items())
            found[name] = _once(name, pairs)
            for layer, count in found[name].items():
                _check_count(name, layer, count)
    if found.get("unwrapped_parameters") is not None:
        found["unwrapped_parameters"] = _unwrapped(own, found["unwrapped_parameters"])
    if found.get("customized_pruners") is not None:
        pruners = _mapping("customized_pruners", found["customized_pruners"])
        found["customized_pruners"] = {_customized(own, key, pruner): pruner for key, pruner in pruners.items()}
    if "root_module_types" in found:
        found["root_module_types"] = _root_types(found["root_module_types"])
    return found


class _OwnParts:
    """The layers and parameters of one model, by name."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: layer for name, layer in model.named_modules(remove_duplicate=False) if name}
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._model = model

    def layer(self, argument: str, given: object) -> nn.Module:
        """Return the layer that is given or named."""
        if given is self._model:
            return self._model
        found: nn.Module = _found(argument, given, self._layers, nn.Module, "layer")
        return found

    def parameter(self, argument: str, given: object) -> nn.Parameter:
        """Return the parameter that is given or named."""
        return _found(argument, given, self._parameters, nn.Parameter, "parameter")

    def part(self, argument: str, given: object) -> nn.Module | nn.Parameter:
        """Return the layer, or else the parameter, that is given or named."""
        named = isinstance(given, str) and given not in self._layers and given in self._parameters
        return (
            self.parameter(argument, given) if named or isinstance(given, nn.Parameter) else self.layer(argument, given)
        )

    def key(self, argument: str, given: object) -> nn.Module | tuple[nn.Module, ...]:
        """Return a key of a dictionary of ratios: a layer, or several that share their ratio."""
        if isinstance(given, tuple) and argument != "head_pruning_ratio_dict":
            return tuple(self.layer(argument, each) for each in given)
        return self.layer(argument, given)


def _found(argument: str, given: Any, parts: Mapping[str, _Part], kind: type[_Part], what: str) -> _Part:
    if isinstance(given, str):
        if given not in parts:
            raise TargetError(f"{argument}: the model has no {what} {shown(given)}{nearest(given, parts)}")
        return parts[given]
    if not isinstance(given, kind):
        raise ConfigError(f"{argument}: {shown(given)} is neither a {what} of the model nor the name of one")
    if all(given is not part for part in parts.values()):
        raise TargetError(
            f"{argument}: a {what} is a {type(given).__name__} of another model; pass this model's own, or its name"
        )
    return given


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


def _once(argument: str, pairs: Iterable[tuple[_Key, Any]]) -> dict[_Key, Any]:
    """Return a dictionary of the pairs; a name and the layer itself may not both be in it."""
    found: dict[_Key, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"{argument}: one {type(key).__name__} is given twice, by its name and itself")
        found[key] = value
    return found


def _check_count(argument: str, layer: nn.Module, count: object) -> None:
    """Refuse a number of heads or groups into which a layer's channels do not fall."""
    kind = type(layer).__name__
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"{argument}[{kind}] = {shown(count)}: must be a whole number of at least 1")
    side = "in" if argument == "in_channel_groups" else "out"
    widths = (getattr(layer, f"{side}_{unit}", None) for unit in ("features", "channels"))
    width = next((width for width in widths if isinstance(width, int)), None)
    if width is not None and width % count:
        raise ConfigError(f"{argument}[{kind}] = {count}: must divide the layer's {width} {side}put channels")


def _unwrapped(own: _OwnParts, given: Any) -> list[tuple[nn.Parameter, int]]:
    """Return pairs of a parameter and its dimension: documented as a dictionary, read as a list."""
    argument = "unwrapped_parameters"
    pairs = []
    for pair in given.items() if isinstance(given, Mapping) else _listed(argument, given, (str, nn.Parameter)):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ConfigError(f"{argument}: {shown(pair)} must be a parameter (or its name) and a dimension")
        parameter, dim = own.parameter(argument, pair[0]), pair[1]
        dims = parameter.dim()
        if isinstance(dim, bool) or not isinstance(dim, int) or not -dims <= dim < dims:
            raise ConfigError(f"{argument}: {shown(dim)} is no dimension of a parameter that has {dims}")
        pairs.append((parameter, dim))
    return pairs


def _customized(own: _OwnParts, key: object, pruner: object) -> type | nn.Module:
    """Return a key of ``customized_pruners``: a class of layers, or one layer."""
    if not isinstance(pruner, tp.BasePruningFunc):
        hint = "; pass an instance of it" if inspect.isclass(pruner) else ""
        raise ConfigError(f"customized_pruners: {shown(pruner)} is no torch_pruning.BasePruningFunc{hint}")
    return key if inspect.isclass(key) else own.layer("customized_pruners", key)


def _root_types(given: Any) -> list[type[nn.Module]]:
    types = _listed("root_module_types", given, (str, type, nn.Module))
    for each in types:
        if not (inspect.isclass(each) and issubclass(each, nn.Module)):
            raise ConfigError(f"root_module_types: {shown(each)} is no class of layers such as torch.nn.Linear")
    if not types:
        raise ConfigError("root_module_types = []: nothing would be pruned; leave it out, or name a class of layers")
    return types


__all__ = ["RATIO_DICTS", "with_layers"]
