"""From a configuration to what is gated: which layers, which masks, which budgets."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gumbel_plugin.config import LayerRule, PruningSection
from gumbel_plugin.errors import ConfigError, TargetError, nearest
from gumbel_plugin.learning.budget import Member, Scope
from gumbel_plugin.learning.sites import ColumnGates, WeightSite
from gumbel_plugin.masks import LearntMask, NoiseSource, method_named
from gumbel_plugin.masks.targets import ChannelGroup, ChannelSlice, granularity_of

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Plan:
    """What a session learns on one model.

    Attributes:
        masks: The masks, by name: a layer's name, or a group's.
        sites: Where they act, by layer name.
        scopes: The budgets.
        groups: The channel groups that are gated, by mask name.
    """

    masks: dict[str, LearntMask] = field(default_factory=dict)
    sites: dict[str, WeightSite] = field(default_factory=dict)
    scopes: list[Scope] = field(default_factory=list)
    groups: dict[str, ChannelGroup] = field(default_factory=dict)


def select_modules(model: nn.Module, rule: LayerRule) -> dict[str, nn.Module]:
    """Return the modules that a rule names, by name, in the model's order (NNI's rules of selection).

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
    for pattern in rule.op_names_re or ():
        if not any(re.match(pattern, name) for name in modules):
            raise TargetError(f"op_names_re: {pattern!r} matches no module of the model{nearest(pattern, modules)}")
    chosen = {name: module for name, module in modules.items() if _selected(name, module, rule)}
    if not chosen:
        raise TargetError(f"config_list entry {rule.as_nni()} selects no module: its keys exclude each other")
    for name, module in chosen.items():
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise TargetError(f"{name!r} is a {type(module).__name__}, which has no weight to mask")
    return chosen


def excluded_names(model: nn.Module, rules: Iterable[LayerRule]) -> set[str]:
    """Return the modules that some rule excludes by name, pattern or type."""
    return {
        name
        for name, module in model.named_modules()
        if any(_excluded(name, module, rule) for rule in rules)
    }


def needs_groups(config: PruningSection) -> bool:
    """Return whether any rule removes whole channels, so that the dependency graph is needed."""
    return any(rule.structured for rule in config.config_list)


def build_plan(model: nn.Module, config: PruningSection, groups: Sequence[ChannelGroup], seed: int) -> Plan:
    """Decide what is gated, without touching the model.

    Args:
        model: The plain model.
        config: What to prune.
        groups: The model's channel groups; needed where a rule is structured.
        seed: Seeds the masks' noise.

    Raises:
        TargetError: If a rule matches nothing, or nothing at all would be gated.
        ConfigError: If a granularity does not fit a layer, or rules contradict each other.
    """
    builder = _Builder(model, config, NoiseSource(seed))
    for rule in config.config_list:
        selected = select_modules(model, rule)
        if rule.structured:
            builder.add_groups(rule, selected, groups)
        else:
            for name, module in selected.items():
                builder.add_layer(rule, name, module)
    builder.finish()
    return builder.plan


class _Builder:
    """Collects masks, sites and scopes rule by rule."""

    def __init__(self, model: nn.Module, config: PruningSection, noise: NoiseSource) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.config = config
        self.noise = noise
        self.plan = Plan()
        self._scopes: dict[object, Scope] = {}
        self._ties: dict[object, str] = {}
        self._excluded = excluded_names(model, config.config_list)

    def add_layer(self, rule: LayerRule, name: str, module: nn.Module) -> None:
        """Gate the units of one layer's weight."""
        if name in self.plan.masks:
            raise ConfigError(f"{name!r} is selected by two config_list entries; exclude it from one of them")
        weight = module.weight
        granularity = granularity_of(rule.granularity)
        shape = granularity.gate_shape(weight.shape)  # type: ignore[union-attr, arg-type]
        site = self._site(name)
        tie = rule.dependency_group_id
        if tie is not None and tie in self._ties:
            mask = self.plan.masks[self._ties[tie]]
            if mask.shape != shape:
                raise ConfigError(
                    f"dependency_group_id {tie!r}: {name!r} has gates of shape {shape}, "
                    f"{self._ties[tie]!r} of shape {mask.shape}; they cannot share them"
                )
            site.mask = mask
            return
        if tie is not None:
            self._ties[tie] = name
        options = self.config.method_options()
        mask = method_named(self.config.method)(shape, options, self.noise, len(self.plan.masks), granularity)
        self.plan.masks[name] = site.mask = mask
        cost = float(granularity.unit_size(weight.shape))  # type: ignore[union-attr, arg-type]
        self._join_scope(rule, Member(name, mask, site, cost))

    def add_groups(self, rule: LayerRule, selected: Mapping[str, nn.Module], groups: Sequence[ChannelGroup]) -> None:
        """Gate every exact group that has a selected layer among its producers."""
        for group in groups:
            producers = {part.module for part in group.producers}
            if not producers & set(selected) or group.name in self.plan.masks:
                continue
            kept_out = sorted(producers & self._excluded)
            if kept_out:
                _logger.info("group %s is not gated: the configuration excludes %s", group.name, ", ".join(kept_out))
            elif group.safety != "exact":
                _logger.warning("group %s is not gated: %s", group.name, group.reason)
            else:
                self._add_group(rule, group)

    def _add_group(self, rule: LayerRule, group: ChannelGroup) -> None:
        options = self.config.method_options()
        mask = method_named(self.config.method)((group.size,), options, self.noise, len(self.plan.masks))
        self.plan.masks[group.name] = mask
        self.plan.groups[group.name] = group
        weights = [self.modules[part.module].weight for part in group.producers]
        matrices = sum(weight.numel() for weight in weights if isinstance(weight, Tensor) and weight.dim() > 1)
        self._join_scope(rule, Member(group.name, mask, None, matrices / group.size))

    def finish(self) -> None:
        """Join the groups that feed the same layer, and order the scopes."""
        feeds: dict[str, list[tuple[LearntMask, ChannelSlice]]] = {}
        for name, group in self.plan.groups.items():
            for part in group.consumers:
                feeds.setdefault(part.module, []).append((self.plan.masks[name], part))
        for layer, parts in feeds.items():
            self._site(layer).columns = ColumnGates.join(self.modules[layer], parts)
        if not self.plan.masks:
            raise TargetError("nothing would be gated: no selected layer belongs to a group that can be cut exactly")
        self.plan.scopes = list(self._scopes.values())

    def _site(self, name: str) -> WeightSite:
        if name not in self.plan.sites:
            module = self.modules[name]
            scale = nn.Parameter(torch.ones(())) if self.config.rescale == "learned" else None
            self.plan.sites[name] = WeightSite(name, module, module, scale=scale, rescale=self.config.rescale)
        return self.plan.sites[name]

    def _join_scope(self, rule: LayerRule, member: Member) -> None:
        member.max_ratio = 1.0 if rule.max_sparse_ratio is None else rule.max_sparse_ratio
        member.min_ratio = rule.min_sparse_ratio or 0.0
        shared = rule.global_group_id
        key = member.name if shared is None else ("global", shared)
        scope = self._scopes.setdefault(key, Scope(str(shared or member.name), [], rule.sparse_ratio))
        if scope.ratio != rule.sparse_ratio:
            raise ConfigError(
                f"global_group_id {shared!r}: its entries give sparse_ratio {scope.ratio} and {rule.sparse_ratio}; "
                "a shared budget has one"
            )
        scope.threshold = rule.sparse_threshold
        scope.members.append(member)


def _selected(name: str, module: nn.Module, rule: LayerRule) -> bool:
    if rule.op_names or rule.op_names_re:
        named = name in (rule.op_names or ()) or any(re.match(pattern, name) for pattern in rule.op_names_re or ())
        if not named:
            return False
    if rule.op_types and type(module).__name__ not in rule.op_types:
        return False
    return not _excluded(name, module, rule)


def _excluded(name: str, module: nn.Module, rule: LayerRule) -> bool:
    return (
        name in rule.exclude_op_names
        or type(module).__name__ in rule.exclude_op_types
        or any(re.match(pattern, name) for pattern in rule.exclude_op_names_re)
    )
