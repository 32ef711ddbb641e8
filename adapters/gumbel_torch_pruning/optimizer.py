"""What pruning did to each parameter, so that an optimizer's state can follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Change:
    """One parameter before and after.

    Attributes:
        old: The parameter that the optimizer knows.
        new: The parameter that the model has now.
        kept: Where each element of the new one stood in the flattened old one, int64.
    """

    old: nn.Parameter
    new: nn.Parameter
    kept: Tensor


@dataclass(eq=False)
class ParameterChanges:
    """How parameters were replaced by smaller ones, by name."""

    changes: list[Change] = field(default_factory=list)

    def apply_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer go on with the new parameters; momentum and the like are cut like the weights.

        Args:
            optimizer: Any torch optimizer whose per-parameter state has the parameter's shape (or is a scalar).
        """
        by_old = {id(change.old): change for change in self.changes}
        for group in optimizer.param_groups:
            for place, parameter in enumerate(group["params"]):
                change = by_old.get(id(parameter))
                if change is None:
                    continue
                group["params"][place] = change.new
                state = optimizer.state.pop(parameter, None)
                if state is not None:
                    optimizer.state[change.new] = {key: _cut(value, change) for key, value in state.items()}

    def add(self, old: nn.Parameter, new: nn.Parameter, kept: Tensor) -> None:
        """Note one replacement."""
        self.changes.append(Change(old, new, kept))


@contextmanager
def tracked(model: nn.Module) -> Iterator[ParameterChanges]:
    """Track which elements survive while Torch-Pruning replaces a model's parameters.

    Torch-Pruning cuts a parameter's ``.grad`` together with the parameter. While this context is open every gradient
    holds, bit for bit, the elements' positions instead; afterwards the real gradients are back, cut alike.
    """
    before: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in before.items()}
    flags = {name: parameter.requires_grad for name, parameter in before.items()}
    for parameter in before.values():
        parameter.grad = _positions(parameter)
    result = ParameterChanges()
    try:
        yield result
    finally:
        for name, parameter in model.named_parameters():
            old = before.get(name)
            if old is None:
                continue
            marks, gradient = parameter.grad, gradients[name]
            parameter.grad = gradient if parameter is old else None
            parameter.requires_grad_(flags[name])
            if parameter is not old and marks is not None:
                kept = _read(marks)
                result.add(old, parameter, kept)
                if gradient is not None:
                    parameter.grad = gradient.flatten()[kept].reshape(parameter.shape)
        for name, old in before.items():
            old.grad = gradients[name]


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _positions(parameter: Tensor) -> Tensor | None:
    """Return the elements' positions as integers whose bits are stored in the parameter's own dtype."""
    integers = _INTEGERS[parameter.element_size()]
    if parameter.numel() > torch.iinfo(integers).max:
        return None
    positions = torch.arange(parameter.numel(), dtype=integers, device=parameter.device)
    return positions.view(parameter.dtype).reshape(parameter.shape)


def _read(marks: Tensor) -> Tensor:
    return marks.contiguous().view(_INTEGERS[marks.element_size()]).flatten().long()


def _cut(value: object, change: Change) -> object:
    if isinstance(value, Tensor) and value.shape == change.old.shape:
        return value.flatten()[change.kept.to(value.device)].reshape(change.new.shape)
    return value
