"""Which modules an entry of a config list selects, by NNI's rules of selection."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from gumbel_plugin.config_list import LayerRule
from gumbel_plugin.errors import TargetError, nearest, shown
from gumbel_plugin.graph.channel_groups import ChannelGroup


def select_modules(
    model: nn.Module, rule: LayerRule, groups: Sequence[ChannelGroup] = (), blocks: bool = False
) -> dict[str, nn.Module]:
    """Return the modules that a rule names, by name, in the model's order (NNI's rules of selection).

    Args:
        model: The model.
        rule: The rule.
        groups: Channel groups; a structured rule may name what they are called after, such as an attention layer.
        blocks: Whether the rule names residual blocks, which have no weight themselves.

    Raises:
        TargetError: If nothing is selected, or a name matches nothing; NNI ignores it silently. A type or a pattern
            that matches nothing beside others that do is no error (`unmatched`): one list may serve many models.
    """
    modules = _named(model)
    _check_words(modules, rule)
    chosen = {name: module for name, module in modules.items() if _selected(name, module, rule)}
    if not chosen:
        entry = shown(rule.model_dump(exclude_defaults=True))
        raise TargetError(f"config_list entry {entry} selects no module: its keys exclude each other")
    whole = {group.name for group in groups} if rule.structured else set()
    for name, module in chosen.items():
        if not blocks and name not in whole and not isinstance(getattr(module, "weight", None), Tensor):
            raise TargetError(f"{name!r} is a {type(module).__name__}, which has no weight to mask")
    return chosen


def unmatched(model: nn.Module, rule: LayerRule) -> list[str]:
    """Return the types and patterns of a rule that match no module, with what is nearest, one text each."""
    modules = _named(model)
    types = {type(module).__name__ for module in modules.values()}
    found = [f"op_types: {word!r}{nearest(word, types)}" for word in rule.op_types or () if word not in types]
    return found + [
        f"op_names_re: {pattern!r}{nearest(pattern, modules)}"
        for pattern in rule.op_names_re or ()
        if not _matches(pattern, modules)
    ]


def excluded_names(model: nn.Module, rules: Iterable[LayerRule]) -> set[str]:
    """Return the modules that some rule excludes by name, pattern or type."""
    return {name for name, module in model.named_modules() if any(is_excluded(name, module, rule) for rule in rules)}


def is_excluded(name: str, module: nn.Module, rule: LayerRule) -> bool:
    """Return whether a rule excludes a module by name, pattern or type."""
    return (
        name in rule.exclude_op_names
        or type(module).__name__ in rule.exclude_op_types
        or any(re.match(pattern, name) for pattern in rule.exclude_op_names_re)
    )


def _selected(name: str, module: nn.Module, rule: LayerRule) -> bool:
    if rule.op_names or rule.op_names_re:
        named = name in (rule.op_names or ()) or any(re.match(pattern, name) for pattern in rule.op_names_re or ())
        if not named:
            return False
    if rule.op_types and type(module).__name__ not in rule.op_types:
        return False
    return not is_excluded(name, module, rule)


def _named(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if name}


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(re.match(pattern, name) for name in names)


def _check_words(modules: dict[str, nn.Module], rule: LayerRule) -> None:
    """Refuse names that match nothing, and types and patterns of which none does."""
    types = {type(module).__name__ for module in modules.values()}
    for key, names in (("op_names", rule.op_names), ("exclude_op_names", rule.exclude_op_names)):
        for name in names or ():
            if name not in modules:
                raise _no_match(key, name, modules)
    if rule.op_types and not types & set(rule.op_types):
        raise _no_match("op_types", rule.op_types[0], types)
    if rule.op_names_re and not rule.op_names and not any(_matches(each, modules) for each in rule.op_names_re):
        raise _no_match("op_names_re", rule.op_names_re[0], modules)
    for pattern in rule.exclude_op_names_re:
        if not _matches(pattern, modules):
            raise _no_match("exclude_op_names_re", pattern, modules)
    for word in rule.exclude_op_types:
        if word not in types and not hasattr(nn, word):  # a list for many models may name torch's that this one lacks
            raise _no_match("exclude_op_types", word, types)


def _no_match(key: str, word: str, valid: Iterable[str]) -> TargetError:
    return TargetError(f"{key}: {shown(word)} matches no module of the model{nearest(word, valid)}")
