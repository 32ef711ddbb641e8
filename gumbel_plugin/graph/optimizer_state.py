"""What pruning did to each parameter, so that an optimizer's state can follow."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import LifecycleError
from gumbel_plugin.graph.record import Kept, indices_left

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Change:
    """One parameter before and after.

    Attributes:
        old: The parameter that the optimizer knows.
        new: The parameter that the model has now.
        kept: For each dimension the indices that stayed, None where all did; None if that is not known.
        name: The name of both in the model; empty if they have different ones or are not the model's own.
    """

    old: nn.Parameter
    new: nn.Parameter
    kept: tuple[Tensor | None, ...] | None
    name: str = ""


@dataclass(eq=False)
class ParameterChanges:
    """How parameters were replaced by smaller ones, and which have no successor.

    Attributes:
        changes: What was replaced.
        dropped: What has no successor.
    """

    changes: list[Change] = field(default_factory=list)
    dropped: list[nn.Parameter] = field(default_factory=list)

    def add_gates(self, old: Any, new: Any, kept: Tensor) -> None:
        """Let the gates of the units that stayed go on where they were, in the optimizer too; the others leave it.

        Args:
            old: A mask before the step.
            new: The mask that goes on with its gates, if one does.
            kept: Which of its gates stay, int64.
        """
        if new is None or new.shape != kept.shape:
            self.dropped.extend(old.parameters())
            return
        for (_, before), (_, after) in zip(old.named_parameters(), new.named_parameters(), strict=True):
            with torch.no_grad():
                after.copy_(before[kept.to(before.device)])
            self.changes.append(Change(before, after, (kept,)))

    def kept(self) -> Kept:
        """Return which rows, columns, ... of the model's parameters stayed, by name."""
        return {c.name: c.kept for c in self.changes if c.name and c.kept and any(d is not None for d in c.kept)}

    def apply_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer go on with the new parameters; momentum and the like are cut like the weights.

        Args:
            optimizer: Any torch optimizer that keeps its state per parameter, each tensor of it of the parameter's
                shape, of that shape with some dimensions reduced to 1 (Adafactor), or a scalar.

        Raises:
            LifecycleError: If something changed, but the optimizer has none of the parameters from before or after.
        """
        by_old: dict[int, list[Change]] = {id(parameter): [] for parameter in self.dropped}
        for change in self.changes:
            by_old.setdefault(id(change.old), []).append(change)
        known = {*by_old, *(id(change.new) for change in self.changes)}
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if known and not known & held:
            raise LifecycleError(
                "this optimizer has no parameter that the last step changed: it was built for another model, or "
                "update_optimizer was not called after an earlier step"
            )
        for group in optimizer.param_groups:
            group["params"][:] = [
                successor
                for parameter in group["params"]
                for successor in _move(optimizer, parameter, by_old.get(id(parameter)))
            ]


@contextmanager
def tracked(model: nn.Module) -> Iterator[ParameterChanges]:
    """Track which elements survive while Torch-Pruning replaces a model's parameters.

    Torch-Pruning cuts a parameter's ``.grad`` together with the parameter. While this context is open every gradient
    holds, bit for bit, the elements' positions instead; afterwards the real gradients are back, cut alike, and so are
    ``requires_grad`` and the train/eval flags.
    """
    before: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in before.items()}
    flags = {name: parameter.requires_grad for name, parameter in before.items()}
    training = {module: module.training for module in model.modules()}
    for parameter in before.values():
        parameter.grad = _positions(parameter)
    result = ParameterChanges()
    try:
        yield result
    finally:
        for name, old in before.items():
            old.grad = gradients[name]
        now = dict(model.named_parameters())
        for name, new in now.items():
            origin = name if name in before else _origin(name, new, {k: v for k, v in before.items() if k not in now})
            if origin is not None and new is not before[origin]:
                kept = None if new.grad is None else _kept(new.grad, before[origin].shape)
                new.grad = None if kept is None else _cut(gradients[origin], before[origin], kept)
                new.requires_grad_(flags[origin])
                result.changes.append(Change(before[origin], new, kept, name if name == origin else ""))
        for module, mode in training.items():
            module.training = mode


def _origin(name: str, new: Tensor, lost: Mapping[str, nn.Parameter]) -> str | None:
    """Return which lost parameter a new one was cut from, such as ``in_proj_weight`` for ``q_proj.weight``.

    It hangs one module higher, on the layer that was replaced, and has as many dimensions.
    """
    module, _, leaf = name.rpartition(".")
    layer, _, child = module.rpartition(".")
    prefix = f"{layer}." if layer else ""
    named = f"{prefix}{child}_{leaf}"  # k_proj_weight, where queries, keys and values have different widths
    packed = [each for each, old in lost.items() if each.rpartition(".")[0] == layer and old.dim() == new.dim()]
    return named if named in lost else next(iter(packed), None)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _positions(parameter: Tensor) -> Tensor | None:
    """Return the elements' positions as integers whose bits are stored in the parameter's own dtype."""
    integers, shape = _INTEGERS.get(parameter.element_size()), parameter.shape
    if integers is None or parameter.numel() == 0:
        return None
    if _has_room(integers, shape):  # in 16 bits positions from 32,768 on wrap around to negative numbers
        wide = torch.int32 if integers is torch.int16 else integers
        numbers = torch.arange(parameter.numel(), dtype=wide, device=parameter.device).reshape(shape)
    elif len(shape) > 1:
        numbers = _row_or_column(shape, parameter.device)
    else:
        return None
    return numbers.to(integers).view(parameter.dtype)


def _kept(marks: Tensor, shape: torch.Size) -> tuple[Tensor | None, ...] | None:
    """Return from what is left of `_positions` the indices that stayed along each dimension; None if unknown."""
    integers = _INTEGERS[marks.element_size()]
    numbers = marks.contiguous().view(integers)
    if integers is torch.int16:
        numbers = numbers.int() % 2**16
    if _has_room(integers, shape):
        return indices_left(numbers, shape)
    if marks.dim() != len(shape) or marks.shape[2:] != shape[2:]:
        return None
    numbers = numbers.reshape(*marks.shape[:2], -1)
    is_row, index = numbers % 2 == 1, numbers.long() // 2
    rows = torch.where(is_row, index, -1).flatten(1).amax(1)
    columns = torch.where(is_row, -1, index).transpose(0, 1).flatten(1).amax(1)
    found = [None if len(own) == size else own.cpu() for own, size in zip((rows, columns), shape, strict=False)]
    if any(own is not None and (size > 2**15 or int(own.min()) < 0) for own, size in zip(found, shape, strict=False)):
        return None
    return (*found, *(None for _ in shape[2:]))


def _has_room(integers: torch.dtype, shape: torch.Size) -> bool:
    bits = 16 if integers is torch.int16 else torch.iinfo(integers).bits - 1
    return bool(prod(shape) <= 2**bits)


def _row_or_column(shape: torch.Size, device: torch.device) -> Tensor:
    """Return for every element its row or its column, and in the last bit which of both it is, at random.

    For large parameters in 16 bits: a row is known as long as a few of its elements are left.
    """
    is_row = torch.arange(prod(shape), device=device).mul_(2654435761).bitwise_right_shift_(20).bitwise_and_(1)
    rows, columns = (torch.arange(size, device=device) % 2**15 for size in shape[:2])
    both = torch.where(is_row.reshape(*shape[:2], -1) == 1, rows[:, None, None], columns[:, None])
    return (2 * both).reshape(shape) + is_row.reshape(shape)


def _move(optimizer: torch.optim.Optimizer, old: nn.Parameter, changes: Sequence[Change] | None) -> list[nn.Parameter]:
    """Give a parameter's state to what took its place, cut alike, and return that: itself if it was not replaced."""
    if changes is None:
        return [old]
    state = optimizer.state.pop(old, None)
    for change in changes if state else ():
        kept = change.kept
        if kept is None:
            _logger.warning("the optimizer's state of a parameter of shape %s starts anew", tuple(change.new.shape))
            continue
        optimizer.state[change.new] = {
            key: _cut(value, old, kept) if isinstance(value, Tensor) else value for key, value in state.items()
        }
    return [change.new for change in changes]


def _cut(value: Tensor | None, old: Tensor, kept: Sequence[Tensor | None]) -> Tensor | None:
    """Cut a tensor that belongs to a parameter like the parameter; dimensions of size 1 stand for all positions."""
    if value is None or value.dim() != old.dim():
        return value
    if any(size not in (1, full) for size, full in zip(value.shape, old.shape, strict=True)):
        return value
    for dim, indices in enumerate(kept):
        if indices is not None and value.shape[dim] == old.shape[dim]:
            value = value.index_select(dim, indices.to(value.device))
    return value.clone() if all(indices is None for indices in kept) else value
