"""Gradients of gates, brought to one size, so that the optimizer of the weights can move them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SIZE = 0.1
"""The root mean square that every gate's gradient gets."""

_MEMORY = 0.99
_NOTHING = 1e-12  # a gradient of this size is none


class EvenGradients:
    """Divides every gate's gradient by its own running root mean square (as RMSprop does), times a constant.

    A gate is one of many that share a budget and a task: its gradient was between 1e-5 and 1e-3 where those of weights
    are near 1. With SGD at a learning rate of 0.05 the logits, which start at 3, would take thousands of steps to 0;
    after this they move by about 0.05 a step with momentum 0.9. Adam does the same division itself and notices next to
    nothing.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._squares = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self._parameters]
        self._shares = [torch.zeros_like(square) for square in self._squares]

    @torch.no_grad()
    def apply(self) -> None:
        """Change the gradients in place; to be called once a step, when they are complete."""
        for place, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            finite = gradient.nan_to_num(0.0, 0.0, 0.0)  # a step that a gradient scaler will skip is not remembered
            square = self._squares[place] = self._squares[place].to(gradient.device)
            share = self._shares[place] = self._shares[place].to(gradient.device)
            square.lerp_(finite.square(), 1 - _MEMORY)
            share.lerp_((finite != 0).float(), 1 - _MEMORY)  # what is 0 before the gates act says nothing
            size = (square / share.clamp_min(_NOTHING)).sqrt_()
            parameter.grad.copy_(_SIZE * gradient / size.add_(_NOTHING))

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on later."""
        return {name: [tensor.clone() for tensor in tensors] for name, tensors in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name, tensors in self._tensors().items():
            tensors[:] = [tensor.clone() for tensor in state[name]]

    def _tensors(self) -> dict[str, list[Tensor]]:
        return {"squares": self._squares, "shares": self._shares}
