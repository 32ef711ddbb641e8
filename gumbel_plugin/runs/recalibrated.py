"""Batch norms of a run's network, recalibrated once the masks are decided, and what that changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from gumbel_plugin.runs.data import DataBundle
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.runs.train import evaluate, loaders
from gumbel_plugin.training.recalibration import batch_norms, recalibrate


@dataclass(frozen=True)
class Recalibration:
    """Batch norms whose running statistics were estimated anew, with the decided masks.

    Attributes:
        norms: How many there are.
        batches: From how many training batches.
        before: The test score of the masked network before.
        after: And afterwards.
    """

    norms: int
    batches: int
    before: float
    after: float


def recalibrate_and_compare(
    masked: nn.Module, config: RunConfig, data: DataBundle, log: Callable[[str], None]
) -> Recalibration | None:
    """Estimate the statistics of batch norms anew: those of the training are of sampled masks, not of the decided ones.

    Args:
        masked: The plain network, its closed weights at zero; it is changed.
        config: The run, of which ``training.recalibrate`` says from how many batches; 0 does nothing.
        data: Its data.
        log: Called with what changed, in a line.

    Returns:
        What changed; None if there is no batch norm with running statistics, or nothing was to be done.
    """
    norms = len(batch_norms(masked))
    if not norms or not config.training.recalibrate:
        return None
    train, _, test = loaders(config, data)
    before = evaluate(masked, test, config.training.loss)
    torch.manual_seed(config.seed)  # of random crops, so that a resumed run sees the same ones
    batches = recalibrate(masked, train, config.training.recalibrate)
    found = Recalibration(norms, batches, before, evaluate(masked, test, config.training.loss))
    log(f"statistics of {norms} batch norms from {batches} batches: test score {before:.2f}, now {found.after:.2f}")
    return found
