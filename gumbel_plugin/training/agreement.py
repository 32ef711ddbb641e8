"""How far the gates of samples agree with the consensus: each sample is evaluated before the gating modules go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gumbel_plugin.errors import ConfigError, DataError
from gumbel_plugin.layers.example_inputs import ExampleInputs, batch_size_of, call_model, inputs_on_device_of, observing
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.masks.per_sample import PerSample
from gumbel_plugin.training.session import MaskingSession


@dataclass(frozen=True)
class Agreement:
    """How far samples agree with the gates that were decided.

    Attributes:
        samples: How many were evaluated.
        unanimous: The fraction of them all of whose own gates are the decided ones.
        gates: By mask name, for every gate the fraction of the samples whose own gate is the decided one.
    """

    samples: int
    unanimous: float
    gates: dict[str, list[float]]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


def has_sample_gates(session: MaskingSession) -> bool:
    """Return whether the gates of a session belong to samples, so that there is something to agree on."""
    return bool(_masks_of_samples(session))


@torch.no_grad()
def set_consensus_from(session: MaskingSession, batches: Iterable[ExampleInputs]) -> None:
    """Set every gate's consensus to what most samples of some data have, instead of those of the last batches.

    Args:
        session: A started session whose gates belong to samples and are not decided yet.
        batches: Inputs of the model, a batch at a time; the training data.

    Raises:
        ConfigError: If the session's method has no gates of samples.
        DataError: If there is no batch.
    """
    masks = _masks_of_samples(session)
    sums: dict[str, list[Tensor]] = {}
    rows: dict[str, int] = {}  # more than samples where a network puts several rows of a sample through a layer
    for _, gates in _sample_gates(session, batches):
        for name, (hard, soft) in gates.items():
            own = [hard.double().sum(0), soft.double().sum(0)]
            sums[name] = [a + b for a, b in zip(sums[name], own, strict=True)] if name in sums else own
            rows[name] = rows.get(name, 0) + len(hard)
    for name, (hard, soft) in sums.items():
        masks[name].set_consensus(hard / rows[name], soft / rows[name])


@torch.no_grad()
def measure_agreement(session: MaskingSession, batches: Iterable[ExampleInputs]) -> Agreement:
    """Compare the own gates of samples with the decided ones; decides them if that is to be done.

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
    for samples, sample_gates in _sample_gates(session, batches):
        together = torch.ones(samples, dtype=torch.bool)
        for name, (hard, _) in sample_gates.items():
            same = ((hard != 0) == session.plan.masks[name].hard.flatten()).cpu()
            same = same.reshape(samples, -1, same.shape[1]).all(1)  # all rows of a sample
            equal[name] = same.sum(0) + equal.get(name, 0)
            together &= same.all(1)
        count += samples
        unanimous += int(together.sum())
    gates = {name: (same / count).tolist() for name, same in equal.items()}
    return Agreement(count, unanimous / count, gates)


SampleGates = dict[str, tuple[Tensor, Tensor]]
"""By mask name: each sample's hard gates, and their σ, (samples, units)."""


def _masks_of_samples(session: MaskingSession) -> dict[str, PerSample]:
    return {name: mask for name, mask in session.plan.masks.items() if isinstance(mask, PerSample)}


def _sample_gates(session: MaskingSession, batches: Iterable[ExampleInputs]) -> Iterator[tuple[int, SampleGates]]:
    """Yield the size of every batch, and its samples' gates."""
    masks = _masks_of_samples(session)
    if not masks:
        raise ConfigError(f"method {session.config.method!r} has no gates that belong to samples")
    empty = True
    with _evaluated_per_sample(list(masks.values())), observing(session.model):
        for batch in batches:
            empty = False
            call_model(session.model, inputs_on_device_of(session.model, batch))
            found = {name: mask.last_sample_gates() for name, mask in masks.items()}
            yield batch_size_of(batch), {name: gates for name, gates in found.items() if gates is not None}
    if empty:
        raise DataError("there is no batch whose samples' gates could be evaluated")


@contextmanager
def _evaluated_per_sample(masks: list[PerSample]) -> Iterator[None]:
    """Let every sample's own gates act meanwhile."""
    try:
        for mask in masks:
            mask.evaluated_per_sample = True
        yield
    finally:
        for mask in masks:
            mask.evaluated_per_sample = False
            mask.forget_sample()
