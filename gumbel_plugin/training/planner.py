"""The planner: from a configuration to what is gated, under which budgets."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from gumbel_plugin.config import PruningSection
from gumbel_plugin.config_list import LayerRule
from gumbel_plugin.errors import ConfigError, TargetError
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.graph.residual_blocks import ResidualBlock, residual_block
from gumbel_plugin.layers.geometry import input_dimension
from gumbel_plugin.masks.weight_dependent import WeightDependent
from gumbel_plugin.sparsity.budget import Budget, BudgetTerm
from gumbel_plugin.sparsity.types import granularity_of
from gumbel_plugin.training.metric_budgets import budgets_by_metric
from gumbel_plugin.training.plan import Plan
from gumbel_plugin.training.selection import excluded_names, is_excluded, select_modules, unmatched

_logger = logging.getLogger(__name__)

_BUDGET = ("sparse_ratio", "sparse_threshold", "min_sparse_ratio", "max_sparse_ratio", "global_group_id")


def needs_groups(config: PruningSection) -> bool:
    """Return whether any rule removes whole channels, so that the dependency graph is needed."""
    return not config.method_options().gates_blocks and any(rule.structured for rule in config.config_list)


def build_plan(
    model: nn.Module,
    config: PruningSection,
    groups: Sequence[ChannelGroup],
    seed: int,
    example_inputs: Any = None,
) -> Plan:
    """Decide what is gated, without touching the model.

    Args:
        model: The plain model.
        config: What to prune.
        groups: The model's channel groups; needed where a rule is structured.
        seed: Seeds the masks' noise.
        example_inputs: See `Plan`.

    Raises:
        TargetError: If a rule selects nothing, or nothing at all would be gated.
        ConfigError: If a granularity does not fit a layer, or rules contradict each other.
    """
    if not config.config_list:
        raise ConfigError("pruning.config_list is empty: it must name the layers to prune")
    blocks = config.method_options().gates_blocks
    chosen = [select_modules(model, rule, groups, blocks) for rule in config.config_list]
    every = {module for modules in chosen for module in modules.values()}
    builder = _Builder(model, config, Plan(model, config, seed, example_inputs), every)
    _warn_of_words_without_effect(model, config.config_list)
    names = {module: name for name, module in model.named_modules()}  # one name a module, also where it has two
    for rule, modules in zip(config.config_list, chosen, strict=True):
        selected = list(dict.fromkeys(names[module] for module in modules.values()))
        builder.claim(selected)
        if blocks:
            builder.add_blocks(rule, selected)
        elif rule.structured:
            builder.add_groups(rule, selected, groups)
        else:
            for name in selected:
                builder.add_layer(rule, name)
    return builder.finish(example_inputs)


def _warn_of_words_without_effect(model: nn.Module, rules: Sequence[LayerRule]) -> None:
    """Say once what of a config list does nothing: settings without a meaning here, types and patterns without a match.

    A rule that selects nothing at all is `select_modules`' to refuse.
    """
    settings = [text for rule in rules for text in rule.without_effect()]
    for rule in rules:
        ratio, limit = rule.sparse_ratio, rule.max_sparse_ratio
        if ratio is not None and limit is not None and ratio > limit and rule.global_group_id is None:
            settings.append(f"sparse_ratio {ratio} is above max_sparse_ratio {limit}, which holds")
    if settings:
        _logger.warning("config_list: %s", "; ".join(dict.fromkeys(settings)))
    words = list(dict.fromkeys(text for rule in rules for text in unmatched(model, rule)))
    if words:
        _logger.warning("config_list: these select no module of this model and were skipped: %s", "; ".join(words))


class _Builder:
    """Fills a plan from an NNI config list, rule by rule."""

    def __init__(self, model: nn.Module, config: PruningSection, plan: Plan, chosen: Container[nn.Module]) -> None:
        self.plan = plan
        self._modules = dict(model.named_modules())
        self._model, self._config = model, config
        self._budgets: dict[object, Budget] = {}
        self._ties: dict[int | str, tuple[BudgetTerm, LayerRule]] = {}
        self._claimed: set[str] = set()
        self._gated: set[str] = set()
        self._excluded = {n for n in excluded_names(model, config.config_list) if self._modules[n] not in chosen}

    def claim(self, layers: Iterable[str]) -> None:
        """Note which layers an entry selects; no layer belongs to two."""
        for name in layers:
            if name in self._claimed:
                raise ConfigError(f"{name!r} is selected by two config_list entries; exclude it from one of them")
            self._claimed.add(name)

    def add_layer(self, rule: LayerRule, name: str) -> None:
        """Gate the units of one layer's weight, or let it share the gates of the layer that it is tied to."""
        granularity = granularity_of(rule.granularity, input_dimension(self._modules[name]))
        first = self._tied_to(rule, name)
        if first is None:
            self._join_budget(rule, self.plan.gate_layer(name, granularity))
            return
        mask = self.plan.masks[first.name]
        if isinstance(mask, WeightDependent):
            raise ConfigError(
                f"dependency_group_id {rule.dependency_group_id!r}: gates of method {mask.method_name!r} are "
                f"functions of one layer's weight, so {name!r} and {first.name!r} cannot share them"
            )
        gated = self.plan.gated(name)
        shape = granularity.latent_shape(gated.weight.shape)
        if (mask.shape, mask.sparsity_type) != (shape, granularity):
            raise _unequal(rule, name, shape, first)
        gated.mask = mask
        first.cost += granularity.unit_size(gated.weight.shape)

    def add_blocks(self, rule: LayerRule, selected: Sequence[str]) -> None:
        """Gate the selected residual blocks; they share the entry's budget, because each has only one gate."""
        self._check_block_rule(rule)
        found = {name: residual_block(self._modules[name]) for name in selected}
        blocks = {name: block for name, block in found.items() if isinstance(block, ResidualBlock)}
        others = "; ".join(f"{name!r}: {reason}" for name, reason in found.items() if name not in blocks)
        if not blocks:
            raise ConfigError(
                "pruning.options.unit 'block': none of the modules that the entry selects is a residual block whose "
                f"skip is the identity ({others}); name the blocks by op_types, op_names or op_names_re"
            )
        if others:
            _logger.info("not gated as residual blocks: %s", others)
        together = f"residual blocks of {next(iter(blocks))!r}'s entry"
        for name, block in blocks.items():
            self._join_budget(rule, self.plan.gate_block(name, block), together)

    def _check_block_rule(self, rule: LayerRule) -> None:
        keys = ("max_sparse_ratio", "min_sparse_ratio", "dependency_group_id")
        given = [key for key in keys if getattr(rule, key) is not None]
        if not rule.structured:
            given.append("granularity")
        if given:
            raise ConfigError(f"{given[0]}: residual blocks (options.unit 'block') have one gate each; leave it out")

    def add_groups(self, rule: LayerRule, selected: Sequence[str], groups: Sequence[ChannelGroup]) -> None:
        """Gate every exact group that has a selected layer among its producers, or is called after one."""
        for group in groups:
            terms = {part.module for part in group.producers} | ({group.name} & self._modules.keys())
            if not terms & set(selected) or group.name in self._gated:
                continue
            excluded = {name for name in terms if is_excluded(name, self._modules[name], rule)} | self._excluded
            kept_out = sorted(terms & excluded)
            if kept_out:
                _logger.info("group %s is not gated: the configuration excludes %s", group.name, ", ".join(kept_out))
            elif group.safety != "exact":
                _logger.warning("group %s is not gated: %s", group.name, group.reason)
            else:
                self._gated.add(group.name)
                self._add_group(rule, group)

    def _add_group(self, rule: LayerRule, group: ChannelGroup) -> None:
        first = self._tied_to(rule, group.name)
        if first is None:
            self._join_budget(rule, self.plan.gate_group(group))
            return
        known = self.plan.groups.get(first.name)
        if known is None or known.size != group.size:
            raise _unequal(rule, group.name, (group.size,), first)
        self.plan.groups[first.name] = replace(
            known, producers=known.producers + group.producers, consumers=known.consumers + group.consumers
        )
        first.cost += self.plan.unit_cost(group)

    def _tied_to(self, rule: LayerRule, name: str) -> BudgetTerm | None:
        """Return whose gates the rule's dependency_group_id says to share, if somebody has it already.

        Raises:
            ConfigError: If gates of that name are planned already, or the entries of both ask for different things.
        """
        if name in self.plan.masks:
            raise ConfigError(
                f"{name!r} is masked by its own entry and as part of a channel group; exclude it from one"
            )
        tie = rule.dependency_group_id
        if tie is None or tie not in self._ties:
            return None
        first, other = self._ties[tie]
        if any(getattr(rule, key) != getattr(other, key) for key in _BUDGET):
            raise ConfigError(
                f"dependency_group_id {tie!r}: {name!r} and {first.name!r} share their gates, so their entries must "
                f"agree on {', '.join(_BUDGET[:-1])} and {_BUDGET[-1]}"
            )
        return first

    def finish(self, example_inputs: Any) -> Plan:
        """Return the plan."""
        if not self.plan.masks:
            raise TargetError("nothing would be gated: no selected layer belongs to a group that can be cut exactly")
        budgets, spec = list(self._budgets.values()), self._config.budget
        if spec.given:
            budgets = budgets_by_metric(self._model, self.plan, budgets, spec, example_inputs)
        for budget in budgets:
            budget.check_ratio()
        return self.plan.finish(budgets)

    def _join_budget(self, rule: LayerRule, term: BudgetTerm, together: str | None = None) -> None:
        """Give a mask its budget: its own, or one shared by `global_group_id` or by what belongs `together`."""
        term.max_ratio = 1.0 if rule.max_sparse_ratio is None else rule.max_sparse_ratio
        term.min_ratio = rule.min_sparse_ratio or 0.0
        shared = rule.global_group_id
        key = (together or term.name) if shared is None else ("global", shared)
        name = together or term.name if shared is None else f"global_group_id {shared!r}"
        budget = self._budgets.setdefault(key, Budget(name, [], rule.sparse_ratio, rule.sparse_threshold))
        for setting, known, new in (
            ("sparse_ratio", budget.ratio, rule.sparse_ratio),
            ("sparse_threshold", budget.threshold, rule.sparse_threshold),
        ):
            if known != new:
                raise ConfigError(f"{name}: its entries give {setting} {known} and {new}; a shared budget has one")
        budget.add(term)
        if rule.dependency_group_id is not None:
            self._ties.setdefault(rule.dependency_group_id, (term, rule))


def _unequal(rule: LayerRule, name: str, shape: Sequence[int], first: BudgetTerm) -> ConfigError:
    return ConfigError(
        f"dependency_group_id {rule.dependency_group_id!r}: {name!r} has gates of shape {tuple(shape)}, "
        f"{first.name!r} of shape {first.mask.shape}; they cannot share them"
    )
