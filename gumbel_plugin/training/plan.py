"""What is gated: which layers, which masks, which budgets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.config import PruningSection
from gumbel_plugin.errors import ConfigError, TargetError
from gumbel_plugin.graph.channel_groups import ChannelGroup, ChannelSlice
from gumbel_plugin.graph.optimizer_state import ParameterChanges
from gumbel_plugin.graph.residual_blocks import ResidualBlock
from gumbel_plugin.layers.geometry import is_matrix, output_dimension
from gumbel_plugin.layers.weights import how_to_keep_weights
from gumbel_plugin.masks import LearnedMask, NoiseSource, method_named
from gumbel_plugin.masks.per_sample import PerSample
from gumbel_plugin.sparsity.budget import Budget, BudgetTerm
from gumbel_plugin.sparsity.counting import macs_of_layers
from gumbel_plugin.sparsity.types import WHOLE, SparsityType
from gumbel_plugin.training.bank import GateBank, GateSlice
from gumbel_plugin.training.gated_layer import ColumnGates, GatedLayer, reader_of

_logger = logging.getLogger(__name__)


class Plan:
    """What a session learns on one model: masks, where they act, and their budgets. The model is not touched.

    Attributes:
        masks: The masks, by name: a layer's name, or a group's (a slice of the bank).
        gated_layers: Where they act, by layer name.
        budgets: The budgets.
        groups: The channel groups that are gated, by mask name.
        bank: The gates of all groups, where the method lets them lie in one mask.
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
        self.masks: dict[str, Any] = {}
        self.gated_layers: dict[str, GatedLayer] = {}
        self.budgets: list[Budget] = []
        self.groups: dict[str, ChannelGroup] = {}
        self.bank: GateBank | None = None
        self._modules = dict(model.named_modules())
        self._config = config
        self.noise = NoiseSource(seed, per_rank=config.per_rank_samples)
        counts = issubclass(method_named(config.method), PerSample) and example_inputs is not None
        self._macs = macs_of_layers(model, example_inputs) if counts else None

    def scales(self) -> list[nn.Parameter]:
        """Return the scalars of smart rescale."""
        return [gated.scale for gated in self.gated_layers.values() if gated.scale is not None]

    def learned(self) -> list[LearnedMask]:
        """Return every mask once, the bank's among them."""
        own = [mask for mask in self.masks.values() if not isinstance(mask, GateSlice)]
        return own if self.bank is None else [*own, self.bank.mask]

    def weight_of(self, mask: object) -> Tensor | None:
        """Return the weight that a mask was made for; None if it has no layer of its own."""
        owners = (
            self.gated_layers[name] for name, own in self.masks.items() if own is mask and name in self.gated_layers
        )
        return next((gated.weight for gated in owners if gated.mask is mask), None)

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
        cost = sum(self._cost_of(layer, module) for layer, module in layers.items())
        return BudgetTerm(name, mask, None, cost or 1.0, least=0)

    def gate_group(self, group: ChannelGroup) -> BudgetTerm:
        """Gate the units of a channel group; `finish` must follow once all groups are gated."""
        if self._config.method_options().gates_blocks:
            raise ConfigError("options.unit 'block': whole channels are gated here, not blocks; use 'channel'")
        method = method_named(self._config.method)
        together = method.shares_budget and not issubclass(method, PerSample)
        self.masks[group.name] = GateSlice(group.size) if together else self._new_mask((group.size,), None)
        self.groups[group.name] = group
        return BudgetTerm(group.name, self.masks[group.name], None, self.unit_cost(group))

    def unit_cost(self, group: ChannelGroup) -> float:
        """Return how many weights (or multiply-accumulates) of convolutions and linear layers one unit stands for."""
        weights = 0.0
        for part in group.producers:
            module = self._modules[part.module]
            weight, dimension = module.weight, output_dimension(module)
            if isinstance(weight, Tensor) and weight.dim() > 1 and dimension is not None:
                weights += self._cost_of(part.module, module) / weight.shape[dimension] * len(part.positions)
        return weights / group.size + group.unlisted_weights or 1.0

    def _cost_of(self, name: str, module: nn.Module) -> float:
        """Return a layer's weights, or its multiply-accumulates where the method counts them."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return (self._macs.of(name) if self._macs else 0.0) or float(weight.numel())

    def finish(self, budgets: Sequence[Budget]) -> Plan:
        """Fill the bank, and let the gated groups act at the layers that read them; several may feed one layer.

        Args:
            budgets: What the masks share.

        Raises:
            TargetError: If the gates of a layer's inputs cannot act there.
        """
        slices = {name: mask for name, mask in self.masks.items() if isinstance(mask, GateSlice)}
        if slices:
            self.bank = GateBank(self._new_mask((sum(part.shape[0] for part in slices.values()),), None), slices)
        self.budgets = list(budgets)
        self._join_consumers()
        return self

    def _join_consumers(self) -> None:
        feeds: dict[str, list[tuple[Any, ChannelSlice]]] = {}
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
            gated = GatedLayer(name, module, scale=scale, rescale=self._config.rescale)
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
        first = next(iter(self.masks.values()), mask)
        if isinstance(first, LearnedMask) and first is not mask:
            mask.share(first)
        return mask


def carry_over(before: Plan, after: Plan | None, left: Mapping[str, Tensor], changes: ParameterChanges) -> None:
    """Let gates go on where they were after some of them left, in optimizers too.

    Args:
        before: The plan whose gates were decided.
        after: The plan that follows it, if one does.
        left: Which units are left of each channel group, bool.
        changes: What happened to the model's parameters; that of the gates' is added.
    """
    following: Mapping[str, Any] = {} if after is None else after.masks
    parts = [torch.zeros(0, dtype=torch.int64)]
    for name, mask in before.masks.items():
        kept = torch.nonzero(left.get(name, torch.ones(mask.shape, dtype=torch.bool))).flatten()
        if not isinstance(mask, GateSlice):
            changes.add_gates(mask, following.get(name), kept)
        elif name in following:
            parts.append(kept + mask.start)
    if before.bank is not None:
        changes.add_gates(before.bank.mask, after.bank.mask if after and after.bank else None, torch.cat(parts))
    changes.dropped.extend(before.scales())
