"""Gradients of gates, brought to one size, so that the optimizer of the weights can move them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

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
        self._steps = 0

    @torch.no_grad()
    def apply(self) -> None:
        """Change the gradients in place; to be called once a step, when they are complete."""
        self._steps += 1
        for place, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            exact = gradient.float()
            square = self._squares[place] = self._squares[place].to(exact)
            square.mul_(_MEMORY).addcmul_(exact, exact, value=1 - _MEMORY)
            unbiased = square / (1 - _MEMORY**self._steps)
            gradient.copy_(_SIZE * exact / unbiased.sqrt_().add_(_NOTHING))

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on later."""
        return {"squares": [square.clone() for square in self._squares], "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._squares = [square.clone() for square in state["squares"]]
        self._steps = state["steps"]
