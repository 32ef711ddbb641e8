"""Batch-norm recalibration: running statistics of the network with its hard masks, instead of those of samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gumbel_plugin.errors import DataError
from gumbel_plugin.layers.example_inputs import call_model, inputs_on_device_of, observing
from gumbel_plugin.training.training_check import checked_length


def recalibrate(model: nn.Module, loader: Iterable[Any], batches: int | None = 200) -> int:
    """Estimate the running statistics of all batch norms anew, as the network is now.

    While masks are learned, running statistics follow networks with sampled masks; once masks are decided, and after
    channels have left, they are those of another network. Here they become the cumulative average of the statistics of
    every batch (as torch's ``momentum=None`` has it), with only the batch norms in train mode: dropout is off, and
    gates that are still being learned are hard, as in every evaluation. No weight changes, and train/eval flags,
    ``momentum``, ``num_batches_tracked`` and torch's random state are afterwards what they were.

    Norms without running statistics (``track_running_stats=False``), and those that the forward does not reach, are
    left alone.

    In a distributed run each process computes from the batches of its own loader, and nothing is averaged here: let all
    processes read the same data, or recalibrate on one and broadcast. (``DistributedDataParallel`` itself broadcasts
    the buffers of the first process at the next forward; `torch.nn.SyncBatchNorm` shares the statistics of each batch.)

    Args:
        model: The network, plain, gated, or small.
        loader: Batches: a tensor; a tuple or list whose first entry is the input (a tensor, or a tuple or dict of
            arguments); or a dict of keyword arguments. Labels are not needed.
        batches: After how many batches to stop, should the loader have more; None uses all.

    Returns:
        How many batches were used; 0 if the network has no batch norm with running statistics.

    Raises:
        ConfigError: If ``batches`` is no whole number of at least 1, or None.
        DataError: If the loader has no batch. Then, and if a forward fails, the statistics are as they were.
    """
    count = checked_length("batches", batches)
    norms = batch_norms(model)
    if not norms:
        return 0
    used = 0
    with observing(model), _estimating(norms):
        for batch in islice(loader, count):
            inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            call_model(model, inputs_on_device_of(model, inputs))
            used += 1
        if not used:
            raise DataError("recalibrate: the loader has no batch, from which statistics could be estimated")
    return used


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a model (1d, 2d, 3d, synchronized) that have running statistics."""
    return [each for each in model.modules() if isinstance(each, _BatchNorm) and each.running_mean is not None]


@contextmanager
def _estimating(norms: list[_BatchNorm]) -> Iterator[None]:
    """Let norms in train mode average what they see; put back what they had where that is nothing, or all fails."""
    before = [(norm, norm.momentum, dict(norm._buffers), _copies(norm._buffers)) for norm in norms]
    try:
        for norm in norms:
            norm.training, norm.momentum = True, None
            norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=norm.running_mean.device)  # type: ignore[union-attr]
            norm.running_mean.zero_()  # type: ignore[union-attr]
            norm.running_var.fill_(1)  # type: ignore[union-attr]
        yield
    except BaseException:
        for norm, *_, copies in before:
            _write(norm, copies)
        raise
    finally:
        for norm, momentum, buffers, copies in before:
            if not norm.num_batches_tracked:
                _write(norm, copies)
            norm.momentum = momentum
            norm._buffers["num_batches_tracked"] = buffers["num_batches_tracked"]


def _copies(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in buffers.items() if buffer is not None}


def _write(norm: nn.Module, copies: Mapping[str, Tensor]) -> None:
    for name in ("running_mean", "running_var"):
        norm._buffers[name].copy_(copies[name])  # type: ignore[union-attr]
