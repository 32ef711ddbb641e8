"""How far the samples agree with the consensus: each is asked for its own gates before the gating modules go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gumbel_plugin.errors import ConfigError, DataError
from gumbel_plugin.layers.example_inputs import ExampleInputs, batch_size_of, call_model, inputs_on_device_of, observing
from gumbel_plugin.masks.base import LearnedMask, Phase
from gumbel_plugin.training.session import MaskingSession


@dataclass(frozen=True)
class Agreement:
    """How far samples agree with the gates that were decided.

    Attributes:
        samples: How many were asked.
        unanimous: The fraction of them all of whose own gates are the decided ones.
        gates: By mask name, for every gate the fraction of the samples whose own gate is the decided one.
    """

    samples: int
    unanimous: float
    gates: dict[str, list[float]]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


def votes_per_sample(session: MaskingSession) -> bool:
    """Return whether the gates of a session belong to samples, so that there is something to agree on."""
    return any(mask.per_sample for mask in session.plan.masks.values())


@torch.no_grad()
def set_consensus_from(session: MaskingSession, batches: Iterable[ExampleInputs]) -> None:
    """Set every gate's consensus to what most samples of some data vote for, instead of those of the last batches.

    Args:
        session: A started session whose gates belong to samples and are not decided yet.
        batches: Inputs of the model, a batch at a time; the training data.

    Raises:
        ConfigError: If the session's method has no gates of samples.
        DataError: If there is no batch.
    """
    sums: dict[str, list[Tensor]] = {}
    voters: dict[str, int] = {}  # more than samples where a network puts several rows of a sample through a layer
    for _, votes in _votes(session, batches):
        for name, (hard, soft) in votes.items():
            own = [hard.double().sum(0), soft.double().sum(0)]
            sums[name] = [a + b for a, b in zip(sums[name], own, strict=True)] if name in sums else own
            voters[name] = voters.get(name, 0) + len(hard)
    for name, (hard, soft) in sums.items():
        session.plan.masks[name].set_consensus(hard / voters[name], soft / voters[name])


@torch.no_grad()
def measure_agreement(session: MaskingSession, batches: Iterable[ExampleInputs]) -> Agreement:
    """Ask samples for their own gates and compare them with the decided ones; decides them if that is to be done.

    Each sample runs through the network with its own gates in eval mode. To be called before `MaskingSession.detach`
    takes the gating modules away.

    Args:
        session: A started session whose gates belong to samples.
        batches: Inputs of the model, a batch at a time; data that was not trained on.

    Raises:
        ConfigError: If the session's method has no gates of samples.
        DataError: If there is no batch.
    """
    if session.phase is not Phase.FIXED:
        session.decide()
    equal: dict[str, Tensor] = {}
    count, unanimous = 0, 0
    for samples, votes in _votes(session, batches):
        together = torch.ones(samples, dtype=torch.bool)
        for name, (hard, _) in votes.items():
            same = ((hard != 0) == session.plan.masks[name].hard.flatten()).cpu()
            same = same.reshape(samples, -1, same.shape[1]).all(1)  # all rows of a sample
            equal[name] = same.sum(0) + equal.get(name, 0)
            together &= same.all(1)
        count += samples
        unanimous += int(together.sum())
    gates = {name: (same / count).tolist() for name, same in equal.items()}
    return Agreement(count, unanimous / count, gates)


Votes = dict[str, tuple[Tensor, Tensor]]
"""By mask name: each sample's hard gates, and their σ, (samples, units)."""


def _votes(session: MaskingSession, batches: Iterable[ExampleInputs]) -> Iterator[tuple[int, Votes]]:
    """Yield the size of every batch, and its samples' votes."""
    if not votes_per_sample(session):
        raise ConfigError(f"method {session.config.method!r} has no gates that belong to samples")
    empty = True
    with _evaluated_per_sample(list(session.plan.masks.values())), observing(session.model):
        for batch in batches:
            empty = False
            call_model(session.model, inputs_on_device_of(session.model, batch))
            found = {name: mask.last_votes() for name, mask in session.plan.masks.items()}
            yield batch_size_of(batch), {name: votes for name, votes in found.items() if votes is not None}
    if empty:
        raise DataError("there is no batch whose samples could be asked for their gates")


@contextmanager
def _evaluated_per_sample(masks: list[LearnedMask]) -> Iterator[None]:
    """Let every sample's own gates act meanwhile."""
    try:
        for mask in masks:
            mask.evaluated_per_sample = True
        yield
    finally:
        for mask in masks:
            mask.evaluated_per_sample = False
            mask.forget_sample()
