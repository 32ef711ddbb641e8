"""Which modules an entry of a config list selects, by NNI's rules of selection."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from gumbel_plugin.config import LayerRule
from gumbel_plugin.errors import TargetError, nearest
from gumbel_plugin.masks.targets import ChannelGroup


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
        TargetError: If a name, pattern or type of the rule matches nothing; NNI ignores it silently.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    types = {type(module).__name__ for module in modules.values()}
    for key, words, valid in (
        ("op_names", rule.op_names, modules),
        ("op_types", rule.op_types, types),
        ("exclude_op_names", rule.exclude_op_names, modules),
    ):
        for word in words or ():
            if word not in valid:
                raise TargetError(f"{key}: {word!r} matches no module of the model{nearest(word, valid)}")
    for key, patterns in (("op_names_re", rule.op_names_re), ("exclude_op_names_re", rule.exclude_op_names_re)):
        for pattern in patterns or ():
            if not any(re.match(pattern, name) for name in modules):
                raise TargetError(f"{key}: {pattern!r} matches no module of the model{nearest(pattern, modules)}")
    for word in rule.exclude_op_types or ():
        if word not in types and not hasattr(nn, word):  # a list for many models may name torch's that this one lacks
            raise TargetError(f"exclude_op_types: {word!r} matches no module of the model{nearest(word, types)}")
    chosen = {name: module for name, module in modules.items() if _selected(name, module, rule)}
    if not chosen:
        raise TargetError(f"config_list entry {rule.as_nni()} selects no module: its keys exclude each other")
    whole = {group.name for group in groups} if rule.structured else set()
    for name, module in chosen.items():
        if not blocks and name not in whole and not isinstance(getattr(module, "weight", None), Tensor):
            raise TargetError(f"{name!r} is a {type(module).__name__}, which has no weight to mask")
    return chosen


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
