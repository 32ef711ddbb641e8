"""Gates that belong to samples while they are learned, and the consensus that is left of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import override

from gumbel_plugin.errors import LifecycleError
from gumbel_plugin.masks.base import LearnedMask, Phase
from gumbel_plugin.masks.functional import straight_through

_WINDOW = 100
"""Over about how many batches the running consensus is averaged."""

_TIE_BREAK = 1e-4
"""The weight of a gate's confidence beside its consensus: it decides between gates that as many samples open."""


class PerSample(LearnedMask):
    """Gates that each sample has of its own until they are decided: they multiply activations, not weights.

    A method says by `sample_logits` how they follow from what is read; its costs are multiply-accumulates, where they
    are known, and not weights. Whoever evaluates the network meanwhile, and the cut at the end, sees each gate at its
    consensus: what most samples of the last batches had. See `gumbel_plugin.training.sample_gates`.

    Attributes:
        evaluated_per_sample: Whether each sample's own gates act outside of training too.
        votes: The running mean of each gate over the samples.
        confidence: The running mean of its σ.
    """

    evaluated_per_sample = False
    votes: Tensor
    confidence: Tensor
    batches: Tensor

    def sample_logits(self, features: Tensor) -> Tensor:
        """Return the logits of samples' gates, (samples, units), from what they read, (samples, features)."""
        raise NotImplementedError

    def read_features(self, count: int) -> None:
        """Say how many features there are to read; without it, one for every gate."""
        raise NotImplementedError

    @override
    def create_latents(self) -> None:
        self.register_buffer("votes", torch.ones(self.shape))
        self.register_buffer("confidence", torch.sigmoid(torch.full(self.shape, self.options.initial_logit)))
        self.register_buffer("batches", torch.zeros(()))
        self.read_features(math.prod(self.shape))
        self._asker = 0
        self._features: Tensor | None = None

    # Each sample's gates ------------------------------------------------------------------------------------------

    @property
    def follows_samples(self) -> bool:
        """Whether each sample's own gates act now."""
        return self.evaluated_per_sample or (self.training and self.phase is Phase.LEARNING)

    def gates_of_samples(self, features: Callable[[], Tensor], layer: nn.Module) -> Tensor:
        """Return the gates of the samples that are in the network now, (samples, units).

        They are computed once in a forward, by whoever asks first, and shared by all that ask later.

        Args:
            features: Computes what the unit reads, averaged over positions, (samples, features).
            layer: Who asks.
        """
        if self._drawn is not None and self._drawn[0] == self.noise.forward and self._asker != id(layer):
            return self._drawn[1]
        read = features()
        soft = torch.sigmoid(self.sample_logits(read))
        gates = straight_through(soft.detach() >= 0.5, soft)
        # A backward that recomputes a checkpointed layer must do again what the layer did, and leave no trace.
        if torch._C._current_graph_task_id() == -1:
            self._drawn, self._asker, self._features = (self.noise.forward, gates), id(layer), read.detach()
            if self.training and not self.evaluated_per_sample:
                self._average(gates.detach(), soft.detach())
        return gates

    def last_sample_gates(self) -> tuple[Tensor, Tensor] | None:
        """Return the gates of the samples that came last, and their σ, (samples, units), if there were any.

        The gradient of σ ends at the features: the losses of the gates do not bend them. So it needs nothing of the
        network's graph, which a caller may have freed by now.
        """
        if self._drawn is None or self._features is None:
            return None
        return self._drawn[1].detach(), torch.sigmoid(self.sample_logits(self._features))

    def batch_mean(self) -> Tensor | None:
        """Return the mean gates of the last batch, of `shape`, with their gradient; None before any batch."""
        last = self.last_sample_gates()
        return None if last is None else straight_through(*last).mean(0).reshape(self.shape)

    @override
    def sample(self, weight: Tensor | None) -> Tensor:
        raise LifecycleError(
            f"gates of method {self.method_name!r} belong to samples while they are learned: run the model"
        )

    @override
    def mask_weight(self, weight: Tensor) -> Tensor:
        return weight if self.follows_samples else super().mask_weight(weight)

    @override
    def forget_sample(self) -> None:
        super().forget_sample()
        self._features = None

    # The consensus ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _average(self, gates: Tensor, soft: Tensor) -> None:
        self.batches.add_(1)
        share = max(1 / float(self.batches), 1 / _WINDOW)
        for mean, values in ((self.votes, gates), (self.confidence, soft)):
            mean.lerp_(values.mean(0).reshape(self.shape).to(mean), share)

    def set_consensus(self, gates: Tensor, confidence: Tensor) -> None:
        """Take over what the samples of some data have on average.

        Args:
            gates: Each gate's mean over the samples, (units,).
            confidence: The mean of its σ, (units,).
        """
        self.votes.copy_(gates.reshape(self.shape))
        self.confidence.copy_(confidence.reshape(self.shape))

    @override
    def scores(self, weight: Tensor | None) -> Tensor:
        return (self.votes - 0.5) + _TIE_BREAK * (self.confidence - 0.5)

    @override
    def probability(self, weight: Tensor | None) -> Tensor:
        """Return the running mean of σ, without a gradient."""
        return self.confidence

    @override
    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_features": None}
