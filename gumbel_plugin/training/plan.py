"""From a configuration to what is gated: which layers, which masks, which budgets."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.config import PruningSection
from gumbel_plugin.config_list import LayerRule
from gumbel_plugin.errors import ConfigError, TargetError
from gumbel_plugin.graph.channel_groups import ChannelGroup, ChannelSlice
from gumbel_plugin.graph.residual_blocks import ResidualBlock, residual_block
from gumbel_plugin.layers.geometry import input_dimension, is_matrix, output_dimension
from gumbel_plugin.layers.weights import how_to_keep_weights
from gumbel_plugin.masks import LearnedMask, NoiseSource, method_named
from gumbel_plugin.masks.per_sample import PerSample
from gumbel_plugin.masks.weight_dependent import WeightDependent
from gumbel_plugin.sparsity.budget import Budget, BudgetTerm
from gumbel_plugin.sparsity.cost_model import applications
from gumbel_plugin.sparsity.types import WHOLE, SparsityType, granularity_of
from gumbel_plugin.training.gated_layer import ColumnGates, GatedLayer, reader_of
from gumbel_plugin.training.selection import excluded_names, is_excluded, select_modules, unmatched

_logger = logging.getLogger(__name__)


class Plan:
    """What a session learns on one model: masks, where they act, and their budgets. The model is not touched.

    Attributes:
        masks: The masks, by name: a layer's name, or a group's.
        gated layers: Where they act, by layer name.
        scopes: The budgets.
        groups: The channel groups that are gated, by mask name.
        noise: The random numbers that all masks share.
    """

    def __init__(self, model: nn.Module, config: PruningSection, seed: int, example_inputs: Any = None) -> None:
        """Start an empty plan.

        Args:
            model: The plain model.
            config: What to prune.
            seed: Seeds the noise that all masks share.
            example_inputs: One batch, for methods that count multiply-accumulates; without it, each weight counts once.
        """
        self.masks: dict[str, LearnedMask] = {}
        self.gated_layers: dict[str, GatedLayer] = {}
        self.budgets: list[Budget] = []
        self.groups: dict[str, ChannelGroup] = {}
        self._modules = dict(model.named_modules())
        self._config = config
        self.noise = NoiseSource(seed, per_rank=config.per_rank_samples)
        self._positions: dict[str, float] = {}
        if issubclass(method_named(config.method), PerSample) and example_inputs is not None:
            layers = [name for name, module in self._modules.items() if is_matrix(module)]
            self._positions = applications(model, layers, example_inputs)

    def scales(self) -> list[nn.Parameter]:
        """Return the scalars of smart rescale."""
        return [gated.scale for gated in self.gated_layers.values() if gated.scale is not None]

    def gate_layer(self, name: str, granularity: SparsityType) -> BudgetTerm:
        """Gate the units of one layer's weight."""
        gated = self.gated(name)
        shape = granularity.latent_shape(gated.weight.shape)
        self.masks[name] = gated.mask = self._new_mask(shape, granularity)
        return BudgetTerm(name, gated.mask, gated, float(granularity.unit_size(gated.weight.shape)))

    def gate_block(self, name: str, block: ResidualBlock) -> BudgetTerm:
        """Gate a whole residual block; the gate acts on its branch, at the last layer."""
        gated = self.gated(f"{name}.{block.last}")
        mask = self._new_mask((1,) * gated.weight.dim(), WHOLE)
        if isinstance(mask, PerSample):
            mask.read_features(block.channels)
        self.masks[name] = gated.mask = mask
        gated.block = block
        layers = {f"{name}.{inner}": module for inner, module in block.module.named_modules() if is_matrix(module)}
        cost = sum(module.weight.numel() * self._positions.get(layer, 1.0) for layer, module in layers.items())
        return BudgetTerm(name, mask, None, cost or 1.0, least=0)

    def gate_group(self, group: ChannelGroup) -> BudgetTerm:
        """Gate the units of a channel group; `join_consumers` must follow once all groups are gated."""
        if self._config.method_options().gates_blocks:
            raise ConfigError("options.unit 'block': whole channels are gated here, not blocks; use 'channel'")
        self.masks[group.name] = mask = self._new_mask((group.size,), None)
        self.groups[group.name] = group
        return BudgetTerm(group.name, mask, None, self.unit_cost(group))

    def unit_cost(self, group: ChannelGroup) -> float:
        """Return how many weights (or multiply-accumulates) of convolutions and linear layers one unit stands for."""
        weights = 0.0
        for part in group.producers:
            module = self._modules[part.module]
            weight, dimension = module.weight, output_dimension(module)
            if isinstance(weight, Tensor) and weight.dim() > 1 and dimension is not None:
                each = weight.numel() / weight.shape[dimension] * self._positions.get(part.module, 1.0)
                weights += each * len(part.positions)
        return weights / group.size + group.unlisted_weights or 1.0

    def join_consumers(self) -> None:
        """Let the gated groups act at the layers that read them; several may feed one layer."""
        feeds: dict[str, list[tuple[LearnedMask, ChannelSlice]]] = {}
        for name, group in self.groups.items():
            for part in group.consumers:
                feeds.setdefault(part.module, []).append((self.masks[name], part))
        for layer, parts in feeds.items():
            gated = self.gated(layer)
            gated.columns = ColumnGates.join(self._modules[layer], parts)
            if gated.read_by_parent and any(isinstance(mask, PerSample) for mask in gated.masks):
                raise TargetError(
                    f"{layer!r} is never called, its parent reads its weight; method {self._config.method!r} gates the "
                    f"activations of each sample, which it cannot do there: exclude the channels that {layer!r} reads"
                )

    def gated(self, name: str) -> GatedLayer:
        """Return the gated layer of a layer, a new one if it has none.

        Raises:
            TargetError: If the weight is no parameter of this layer alone, so that a mask could not be written into it.
        """
        if name not in self.gated_layers:
            module = self._modules[name]
            self._check_own_weight(name, module)
            scale = nn.Parameter(torch.ones(())) if self._config.rescale == "learned" else None
            gated = GatedLayer(name, module, module, scale=scale, rescale=self._config.rescale)
            gated.reader = reader_of(self._modules, name)
            self.gated_layers[name] = gated
        return self.gated_layers[name]

    def _check_own_weight(self, name: str, module: nn.Module) -> None:
        weight = module._parameters.get("weight")
        if weight is None:
            way = how_to_keep_weights(module)
            raise TargetError(
                f"{name!r}: its weight is computed (parametrized, or normalized), so no mask can be written into it; "
                f"{f'call {way} first' if way else 'remove the parametrization first'}, or exclude the layer"
            )
        if weight.numel() == 0:
            raise TargetError(f"{name!r} has a weight of shape {tuple(weight.shape)}, with nothing to mask: exclude it")
        for other, candidate in self._modules.items():
            if candidate is not module and any(parameter is weight for parameter in candidate._parameters.values()):
                raise TargetError(
                    f"{name!r} shares its weight with {other!r}, which its mask would change too: exclude it"
                )

    def _new_mask(self, shape: Sequence[int], granularity: SparsityType | None) -> LearnedMask:
        method = method_named(self._config.method)
        mask = method(shape, self._config.method_options(), self.noise, len(self.masks), granularity)
        if self.masks:
            mask.share(next(iter(self.masks.values())))
        return mask


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
    builder = _Builder(model, config, Plan(model, config, seed, example_inputs), groups)
    _warn_of_words_without_effect(model, config.config_list)
    names = {module: name for name, module in model.named_modules()}  # one name a module, also where it has two
    for rule in config.config_list:
        selected = list(dict.fromkeys(names[module] for module in select_modules(model, rule, groups, blocks).values()))
        builder.claim(selected)
        if blocks:
            builder.add_blocks(rule, selected)
        elif rule.structured:
            builder.add_groups(rule, selected, groups)
        else:
            for name in selected:
                builder.add_layer(rule, name)
    return builder.finish()


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

    def __init__(self, model: nn.Module, config: PruningSection, plan: Plan, groups: Sequence[ChannelGroup]) -> None:
        self.plan = plan
        self._modules = dict(model.named_modules())
        self._scopes: dict[object, Budget] = {}
        self._ties: dict[int | str, tuple[BudgetTerm, LayerRule]] = {}
        self._claimed: set[str] = set()
        self._gated: set[str] = set()
        blocks = config.method_options().gates_blocks
        rules = config.config_list
        chosen = {module for rule in rules for module in select_modules(model, rule, groups, blocks).values()}
        self._excluded = {n for n in excluded_names(model, config.config_list) if self._modules[n] not in chosen}

    def claim(self, layers: Iterable[str]) -> None:
        """Note which layers an entry selects; no layer belongs to two."""
        for name in layers:
            if name in self._claimed:
                raise ConfigError(f"{name!r} is selected by two config_list entries; exclude it from one of them")
            self._claimed.add(name)

    def add_layer(self, rule: LayerRule, name: str) -> None:
        """Gate the units of one layer's weight, or let it share the gates of the layer that it is tied to."""
        if name in self.plan.masks:
            raise ConfigError(
                f"{name!r} is masked by its own entry and as part of a channel group; exclude it from one"
            )
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
            raise ConfigError(
                f"dependency_group_id {rule.dependency_group_id!r}: {name!r} has gates of shape {shape}, "
                f"{first.name!r} of shape {mask.shape}; they cannot share them"
            )
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
        if group.name in self.plan.masks:
            raise ConfigError(
                f"{group.name!r} is masked by its own entry and as part of a channel group; exclude it from one"
            )
        first = self._tied_to(rule, group.name)
        if first is None:
            self._join_budget(rule, self.plan.gate_group(group))
            return
        known = self.plan.groups.get(first.name)
        if known is None or known.size != group.size:
            raise ConfigError(
                f"dependency_group_id {rule.dependency_group_id!r}: {group.name!r} has gates of shape ({group.size},), "
                f"{first.name!r} of shape {first.mask.shape}; they cannot share them"
            )
        self.plan.groups[first.name] = replace(
            known, producers=known.producers + group.producers, consumers=known.consumers + group.consumers
        )
        first.cost += self.plan.unit_cost(group)

    def _tied_to(self, rule: LayerRule, name: str) -> BudgetTerm | None:
        """Return whose gates the rule's dependency_group_id says to share, if somebody has it already."""
        tie = rule.dependency_group_id
        if tie is None or tie not in self._ties:
            return None
        first, other = self._ties[tie]
        if _budget(rule) != _budget(other):
            raise ConfigError(
                f"dependency_group_id {tie!r}: {name!r} and {first.name!r} share their gates, so their entries must "
                "agree on sparse_ratio, sparse_threshold, min_sparse_ratio, max_sparse_ratio and global_group_id"
            )
        return first

    def finish(self) -> Plan:
        """Return the plan."""
        self.plan.join_consumers()
        if not self.plan.masks:
            raise TargetError("nothing would be gated: no selected layer belongs to a group that can be cut exactly")
        self.plan.budgets = list(self._scopes.values())
        for budget in self.plan.budgets:
            budget.check_units()
        return self.plan

    def _join_budget(self, rule: LayerRule, term: BudgetTerm, together: str | None = None) -> None:
        """Give a member its budget: its own, or one shared by `global_group_id` or by what belongs `together`."""
        term.max_ratio = 1.0 if rule.max_sparse_ratio is None else rule.max_sparse_ratio
        term.min_ratio = rule.min_sparse_ratio or 0.0
        shared = rule.global_group_id
        key = (together or term.name) if shared is None else ("global", shared)
        name = together or term.name if shared is None else f"global_group_id {shared!r}"
        budget = self._scopes.setdefault(key, Budget(name, [], rule.sparse_ratio, rule.sparse_threshold))
        for setting, known, new in (
            ("sparse_ratio", budget.ratio, rule.sparse_ratio),
            ("sparse_threshold", budget.threshold, rule.sparse_threshold),
        ):
            if known != new:
                raise ConfigError(f"{name}: its entries give {setting} {known} and {new}; a shared budget has one")
        budget.add(term)
        if rule.dependency_group_id is not None:
            self._ties.setdefault(rule.dependency_group_id, (term, rule))


def _budget(rule: LayerRule) -> tuple[object, ...]:
    return (
        rule.sparse_ratio,
        rule.sparse_threshold,
        rule.min_sparse_ratio,
        rule.max_sparse_ratio,
        rule.global_group_id,
    )
