"""Data sets of the user's own, by the name of a factory, as splits that a run trains on.

The factory takes no arguments and returns one map-style data set, a fifth of which is then held out for the test, or a
pair of them: to train with, and to test on. An item is a pair of an input tensor and a target.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from gumbel_plugin.errors import ConfigError, DataError, shorten, shown
from gumbel_plugin.runs.factories import import_factory

_TEST_FRACTION = 0.2


def own_data_sets(name: str) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return what a factory makes as a data set to train with and one to test on.

    Args:
        name: ``package.module:factory``.

    Raises:
        ConfigError: If there is no such factory, it fails, or it returns something else.
        DataError: If a data set is empty.
    """
    factory = import_factory(name, "data set")
    try:
        made = factory()
    except Exception as error:  # the user's own code
        raise ConfigError(f"data set {name!r}: its factory raises {shorten(repr(error), 800)}") from error
    pair = made if isinstance(made, tuple | list) and len(made) == 2 else (made,)
    for part in pair:
        if not isinstance(part, Dataset) or isinstance(part, IterableDataset) or not hasattr(part, "__len__"):
            raise ConfigError(
                f"data set {name!r} returned {shown(made)}; it must be a torch.utils.data.Dataset with a length, or a "
                "pair of them: to train with, and to test on"
            )
        if len(part) < 2:
            raise DataError(f"data set {name!r} holds {len(part)} samples; at least two are needed")
    if len(pair) == 2:
        return pair[0], pair[1]
    kept, held_out = random_split(len(pair[0]), _TEST_FRACTION, seed=0)
    return Subset(pair[0], kept), Subset(pair[0], held_out)


def random_split(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices to keep and to hold out, each in rising order; at least one of both.

    Args:
        count: How many samples there are.
        fraction: Which part of them is held out.
        seed: Of the choice.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    size = min(max(round(fraction * count), 1), count - 1)
    return sorted(order[size:]), sorted(order[:size])


def describe(name: str, *parts: Dataset[Any]) -> tuple[int, tuple[int, ...]]:
    """Return the number of classes (for numbers as targets: of outputs) and the shape of one input.

    Every target is read once, from the data set's ``targets`` where it has them, as torchvision's do.

    Raises:
        DataError: If an item is no pair of a tensor and a target, or inputs or targets do not fit together.
    """
    inputs, target = _item(name, parts[0])
    if target.is_floating_point():
        return max(1, target.numel()), tuple(inputs.shape)
    highest = -1
    for part in parts:
        labels = _labels(name, part)
        if int(labels.min()) < 0:
            raise DataError(f"data set {name!r} holds the label {int(labels.min())}; classes are numbered from 0 on")
        highest = max(highest, int(labels.max()))
    return highest + 1, tuple(inputs.shape)


def _item(name: str, part: Dataset[Any], index: int = 0) -> tuple[Tensor, Tensor]:
    item = part[index]
    if not isinstance(item, Sequence) or len(item) != 2 or not isinstance(item[0], Tensor):
        raise DataError(f"data set {name!r}: item {index} is {shown(item)}; it must be a pair of a tensor and a target")
    try:
        return item[0], torch.as_tensor(item[1])
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"data set {name!r}: the target of item {index} is {shown(item[1])}: {error}") from error


def _labels(name: str, part: Dataset[Any]) -> Tensor:
    if isinstance(part, Subset):
        return _labels(name, part.dataset)[torch.as_tensor(part.indices)]
    targets = getattr(part, "targets", None)
    if targets is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about lists of arrays
            return torch.as_tensor(targets)
    return torch.stack([_item(name, part, index)[1] for index in range(len(part))])  # type: ignore[arg-type]
