"""What pruning did to each parameter, so that an optimizer's state can follow."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import LifecycleError
from gumbel_plugin.graph.kept import Kept, indices_left

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Change:
    """One parameter before and after.

    Attributes:
        old: The parameter that the optimizer knows.
        new: The parameter that the model has now.
        kept: Where each element of the new one stood in the flattened old one, int64; None if that is not known.
        name: The name of both in the model; empty if they have different ones or are not the model's own.
    """

    old: nn.Parameter
    new: nn.Parameter
    kept: Tensor | None
    name: str = ""


@dataclass(eq=False)
class ParameterChanges:
    """How parameters were replaced by smaller ones, and which are gone.

    Attributes:
        changes: What was replaced.
        gone: What has no successor.
    """

    changes: list[Change] = field(default_factory=list)
    gone: list[nn.Parameter] = field(default_factory=list)

    def add(self, old: nn.Parameter, new: nn.Parameter, kept: Tensor | None) -> None:
        """Note one replacement."""
        self.changes.append(Change(old, new, kept))

    def drop(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note parameters that are gone."""
        self.gone.extend(parameters)

    def add_gates(self, old: Any, new: Any, kept: Tensor) -> None:
        """Let the gates of the units that stayed go on where they were, in the optimizer too; the others leave it.

        Args:
            old: A mask before the step.
            new: The mask that goes on with its gates, if one does.
            kept: Which of its gates stay, int64.
        """
        if new is None or new.shape != kept.shape:
            self.drop(old.parameters())
            return
        for (_, before), (_, after) in zip(old.named_parameters(), new.named_parameters(), strict=True):
            with torch.no_grad():
                after.copy_(before[kept.to(before.device)])
            self.add(before, after, kept)

    def kept(self) -> Kept:
        """Return which rows, columns, ... of the model's parameters stayed, by name."""
        found = {
            c.name: indices_left(c.kept, tuple(c.old.shape)) for c in self.changes if c.name and c.kept is not None
        }
        return {name: dims for name, dims in found.items() if dims is not None and any(d is not None for d in dims)}

    def apply_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer go on with the new parameters; momentum and the like are cut like the weights.

        Args:
            optimizer: Any torch optimizer that keeps its state per parameter, each tensor of it of the parameter's
                shape, of that shape with some dimensions reduced to 1 (Adafactor), or a scalar.

        Raises:
            LifecycleError: If something changed, but the optimizer has none of the parameters from before or after.
        """
        by_old: dict[int, list[Change]] = {}
        for change in self.changes:
            by_old.setdefault(id(change.old), []).append(change)
        gone = {id(parameter) for parameter in self.gone}
        known = {*by_old, *gone, *(id(change.new) for change in self.changes)}
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if known and not known & held:
            raise LifecycleError(
                "this optimizer has no parameter that the last step changed: it was built for another model, or "
                "update_optimizer was not called after an earlier step"
            )
        for group in optimizer.param_groups:
            parameters = [parameter for parameter in group["params"] if id(parameter) not in gone]
            for parameter in self.gone:
                optimizer.state.pop(parameter, None)
            group["params"][:] = [
                successor
                for parameter in parameters
                for successor in _move(optimizer, parameter, by_old.get(id(parameter), ()))
            ]


@contextmanager
def tracked(model: nn.Module) -> Iterator[ParameterChanges]:
    """Track which elements survive while Torch-Pruning replaces a model's parameters.

    Torch-Pruning cuts a parameter's ``.grad`` together with the parameter. While this context is open every gradient
    holds, bit for bit, the elements' positions instead; afterwards the real gradients are back, cut alike, and so are
    ``requires_grad`` and the train/eval flags. In half precision there is room for 65,536 positions; of larger
    parameters the gradient is dropped and the optimizer's state starts anew.
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
                kept = None if new.grad is None else _read(new.grad)
                new.grad = None if kept is None else _cut(gradients[origin], before[origin], new, kept)
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
    integers = _INTEGERS.get(parameter.element_size())
    if integers is None or parameter.numel() > 2 ** (8 * parameter.element_size()):
        return None
    # In 16 bits the positions from 32,768 on wrap around to negative numbers; `_read` turns them back.
    positions = torch.arange(parameter.numel(), device=parameter.device).to(integers)
    return positions.view(parameter.dtype).reshape(parameter.shape)


def _read(marks: Tensor) -> Tensor:
    bits = 8 * marks.element_size()
    positions = marks.contiguous().view(_INTEGERS[marks.element_size()]).flatten().long()
    return positions % 2**bits if bits < 64 else positions


def _move(optimizer: torch.optim.Optimizer, old: nn.Parameter, changes: Sequence[Change]) -> list[nn.Parameter]:
    """Give a parameter's state to what took its place, cut alike, and return that: itself if nothing did."""
    if not changes:
        return [old]
    state = optimizer.state.pop(old, None)
    for change in changes if state else ():
        kept = change.kept
        if kept is None:
            _logger.warning("the optimizer's state of a parameter of shape %s starts anew", tuple(change.new.shape))
            continue
        optimizer.state[change.new] = {
            key: _cut(value, old, change.new, kept) if isinstance(value, Tensor) else value
            for key, value in state.items()
        }
    return [change.new for change in changes]


def _cut(value: Tensor | None, old: Tensor, new: Tensor, kept: Tensor) -> Tensor | None:
    """Cut a tensor that belongs to a parameter like the parameter; dimensions of size 1 stand for all positions."""
    if value is None or value.dim() != old.dim():
        return value
    if any(size not in (1, full) for size, full in zip(value.shape, old.shape, strict=True)):
        return value
    whole = value.expand(old.shape).flatten()[kept.to(value.device)].reshape(new.shape)
    for dim, (size, full) in enumerate(zip(value.shape, old.shape, strict=True)):
        if size == 1 < full:
            whole = whole.narrow(dim, 0, 1)
    return whole.clone()
