"""Gates that each sample has of its own while it learns, polarized until all samples agree: the consensus stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from typing_extensions import override

from gumbel_plugin.errors import ConfigError, LifecycleError
from gumbel_plugin.masks.base import LearnedMask, MaskOptions, NoiseSource, Usage
from gumbel_plugin.masks.functional import at_least_float32, straight_through
from gumbel_plugin.sparsity.schedules import Schedule, constant
from gumbel_plugin.sparsity.types import WHOLE, Granularity

_WINDOW = 100
"""Over about how many batches the running votes are averaged."""

_TIE_BREAK = 1e-4
"""The weight of a gate's confidence beside its votes: it decides between gates on which the same share votes open."""


class ConsensusOptions(MaskOptions):
    """Options of `ConsensusMask`. Nothing of this is published but the idea; the values are this project's choice.

    Attributes:
        unit: ``channel`` gates the channels of each dependency group, ``block`` whole residual blocks.
        hidden: Width of the gating module's hidden layer.
        initial_logit: Where every gate's logit starts, for every sample; above 0, so that the gates start open.
        lambda_act: Weight of the usage loss: the squared distance of the used fraction of the multiply-accumulates from
            1 − sparse_ratio.
        lambda_polar: Weight of the polarization, a number or a schedule over the mask learning. It should start low:
            while nearly all samples agree that a gate is open, it keeps that gate open.
    """

    unit: Literal["channel", "block"] = "channel"
    hidden: int = Field(default=16, ge=1)
    initial_logit: float = Field(default=2.0, gt=0)
    lambda_act: float = Field(default=10.0, ge=0)
    lambda_polar: float | Schedule = Schedule(0.0, 2.0, "linear")

    @field_validator("lambda_polar")
    @classmethod
    def _not_negative(cls, value: float | Schedule) -> float | Schedule:
        lowest = min(value.start, value.end) if isinstance(value, Schedule) else value
        if lowest < 0:
            raise ValueError(f"the weight of a loss must be at least 0, got {lowest}")
        return value

    @property
    @override
    def gates_blocks(self) -> bool:
        return self.unit == "block"


@dataclass
class _Network:
    """What all masks of one network have in common: how many gates they are together."""

    gates: int = 0


class ConsensusMask(LearnedMask):
    """Binary gates computed from each sample: average pool of what the unit reads → two-layer MLP → σ → ≥ ½.

    The gradient goes straight through the threshold. With ḡ the mean of a gate over the batch, the extra losses are
    λ_polar · mean over all gates of ḡ(1 − ḡ), zero only where all samples agree, and λ_act · (usage(ḡ) −
    (1 − sparse_ratio))², usage being weighted by multiply-accumulates. Whoever evaluates the network meanwhile, and the
    cut at the end, sees each gate at its consensus: what most samples of the last batches voted for.

    Source: Zhi et al., *Learning a Consensus Sub-Network with Polarization Regularization and One Pass Training*, arXiv
    2302.10798, of which only the abstract's idea is followed; everything in detail is this project's choice.
    """

    Options: ClassVar[type[MaskOptions]] = ConsensusOptions
    manages_own_sparsity: ClassVar[bool] = True
    per_sample: ClassVar[bool] = True
    counts_macs: ClassVar[bool] = True
    published_optimizer: ClassVar[Mapping[str, str | float] | None] = {"name": "adam", "lr": 0.01}
    options: ConsensusOptions
    votes: Tensor
    confidence: Tensor
    batches: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        options: ConsensusOptions,
        noise: NoiseSource,
        stream: int,
        granularity: Granularity | None = None,
    ) -> None:
        super().__init__(shape, options, noise, stream, granularity)
        if granularity != (WHOLE if options.gates_blocks else None):
            raise ConfigError(
                f"granularity {granularity}: method 'consensus' gates whole channels or blocks (options.unit is "
                f"{options.unit!r}); leave the granularity out"
            )
        self.units = math.prod(self.shape)
        self.output = nn.Parameter(torch.zeros(self.units, options.hidden))
        self.bias = nn.Parameter(torch.full((self.units,), options.initial_logit))
        self.register_buffer("votes", torch.ones(self.shape))
        self.register_buffer("confidence", torch.sigmoid(self.bias.detach()).reshape(self.shape).clone())
        self.register_buffer("batches", torch.zeros(()))
        self.read(self.units)
        given = options.lambda_polar
        self._polar_schedule = given if isinstance(given, Schedule) else constant(given)
        self.lambda_polar = self._polar_schedule(0.0)
        self._network = _Network(self.units)
        self._asker = 0
        self._read_last: Tensor | None = None
        self._soft: Tensor | None = None

    @override
    def read(self, features: int) -> None:
        # The layers have no first bias and run over units or features first, so that units can leave one by one.
        uniform = self.noise.uniform_like(torch.empty(features, self.options.hidden), self.stream, bits=32)
        self.input = nn.Parameter((2 * uniform - 1) * math.sqrt(6 / features))  # Kaiming's, for the ReLU that follows

    # Each sample's gates ------------------------------------------------------------------------------------------

    @override
    def gates_of_samples(self, features: Callable[[], Tensor], layer: nn.Module) -> Tensor:
        known = self._drawn
        # A backward that recomputes a checkpointed layer must do again what the layer did, and leave no trace.
        again = torch._C._current_graph_task_id() != -1
        if known is not None and known[0] == self.noise.forward and self._asker != id(layer):
            return known[1]
        read = features()
        soft = torch.sigmoid(self._logits(read))
        gates = straight_through(soft.detach() >= 0.5, soft)
        if not again:
            self._drawn, self._asker = (self.noise.forward, gates), id(layer)
            self._read_last, self._soft = read.detach(), soft.detach()
            if self.training and not self.evaluated_per_sample:
                self._count(gates.detach(), self._soft)
        return gates

    def _logits(self, features: Tensor) -> Tensor:
        first, second, bias = (at_least_float32(part) for part in (self.input, self.output, self.bias))
        return torch.relu(features.to(first.dtype) @ first) @ second.t() + bias

    @torch.no_grad()
    def _count(self, gates: Tensor, soft: Tensor) -> None:
        self.batches.add_(1)
        share = max(1 / float(self.batches), 1 / _WINDOW)
        self.votes.lerp_(gates.mean(0).reshape(self.shape).to(self.votes), share)
        self.confidence.lerp_(soft.mean(0).reshape(self.shape).to(self.confidence), share)

    @override
    def last_votes(self) -> tuple[Tensor, Tensor] | None:
        if self._drawn is None or self._soft is None:
            return None
        return self._drawn[1].detach(), self._soft

    @override
    def set_consensus(self, votes: Tensor, confidence: Tensor) -> None:
        self.votes.copy_(votes.reshape(self.shape))
        self.confidence.copy_(confidence.reshape(self.shape))

    @override
    def forget_sample(self) -> None:
        super().forget_sample()
        self._soft = self._read_last = None

    # The losses ---------------------------------------------------------------------------------------------------

    @override
    def penalty(self, weight: Tensor | None) -> Tensor | None:
        mean = self.batch_mean()
        if mean is None or self.lambda_polar == 0:
            return None
        return self.lambda_polar * (mean * (1 - mean)).sum() / self._network.gates

    @override
    def budget_loss(
        self, masks: Sequence[LearnedMask], weights: Sequence[Tensor | None], ratio: float, usage: Usage
    ) -> Tensor | None:
        own = [mask for mask in masks if isinstance(mask, ConsensusMask)]
        means = [mask.batch_mean() for mask in own]
        if all(mean is None for mean in means):
            return None  # no training forward yet
        # A unit that this forward left out counts as its samples voted before.
        used = [mask.votes.reshape(mask.shape) if mean is None else mean for mask, mean in zip(own, means, strict=True)]
        return self.options.lambda_act * (usage(used) - (1 - ratio)).square()

    def batch_mean(self) -> Tensor | None:
        """Return the mean gates of the last batch, of `shape`; None before any batch.

        The gradient is that of the gating module alone: the losses of the gates do not bend the network's features. So
        it needs nothing of the network's graph, which a caller may have freed by now.
        """
        if self._drawn is None or self._read_last is None:
            return None
        soft = torch.sigmoid(self._logits(self._read_last))
        return straight_through(self._drawn[1].detach(), soft).mean(0).reshape(self.shape)

    @override
    def share(self, first: LearnedMask) -> None:
        if isinstance(first, ConsensusMask):
            first._network.gates += self.units
            self._network = first._network

    @override
    def advance(self, progress: float) -> None:
        self.lambda_polar = self._polar_schedule(progress)

    # The consensus ------------------------------------------------------------------------------------------------

    @override
    def sample(self, weight: Tensor | None) -> Tensor:
        raise LifecycleError("gates of method 'consensus' belong to samples while they are learned: run the model")

    @override
    def mask_weight(self, weight: Tensor) -> Tensor:
        return weight if self.follows_samples else super().mask_weight(weight)

    @override
    def scores(self, weight: Tensor | None) -> Tensor:
        return (self.votes - 0.5) + _TIE_BREAK * (self.confidence - 0.5)

    @override
    def probability(self, weight: Tensor | None) -> Tensor:
        """Return the running mean of σ; without a gradient, since this method steers itself."""
        return self.confidence

    @override
    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_soft": None, "_read_last": None}
