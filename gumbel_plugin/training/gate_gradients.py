"""Gradients of gates, brought to one size, so that the optimizer of the weights can move them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

_SIZE = 0.1
"""The root mean square that every gate's gradient gets."""

_MEMORY = 0.99
_NOTHING = 1e-12  # a gradient of this size is none


class GateGradNormalizer:
    """Divides every gate's gradient by its own running root mean square (as RMSprop does), times a constant.

    A gate is one of many that share a budget and a task: its gradient was between 1e-5 and 1e-3 where those of weights
    are near 1. With SGD at a learning rate of 0.05 the logits, which start at 3, would take thousands of steps to 0;
    after this they move by about 0.05 a step with momentum 0.9. Adam does the same division itself and notices next to
    nothing.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], steered: Sequence[nn.Parameter] = ()) -> None:
        """Start with no memory.

        Args:
            parameters: Those of all gates.
            steered: Those of them that a budget steers, whose gradients it prices (`SteeredGates.priced`).
        """
        others = {id(parameter) for parameter in steered}
        self._parameters = [parameter for parameter in parameters if id(parameter) not in others]
        # All gates in one vector: a few operations a step, not ten for each of the groups.
        self._squares = torch.zeros(sum(parameter.numel() for parameter in self._parameters))
        self._shares = torch.zeros_like(self._squares)

    @torch.no_grad()
    def apply(self) -> None:
        """Change the gradients in place; to be called once a step, when they are complete."""
        if all(parameter.grad is None for parameter in self._parameters):
            return
        device = self._parameters[0].device
        self._squares, self._shares = self._squares.to(device), self._shares.to(device)
        gradient = torch.cat([_gradient(parameter).to(device).flatten() for parameter in self._parameters])
        finite = gradient.nan_to_num(0.0, 0.0, 0.0)  # a step that a gradient scaler will skip is not remembered
        self._squares.lerp_(finite.square(), 1 - _MEMORY)
        self._shares.lerp_((finite != 0).float(), 1 - _MEMORY)  # what is 0 before the gates act says nothing
        size = (self._squares / self._shares.clamp_min(_NOTHING)).sqrt_()
        even = _SIZE * gradient / size.add_(_NOTHING)
        parts = torch.split(even, [parameter.numel() for parameter in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(part.view_as(parameter))

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is needed to go on later."""
        return {"squares": self._squares.clone(), "shares": self._shares.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        self._squares, self._shares = state["squares"].clone(), state["shares"].clone()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter).float() if parameter.grad is None else parameter.grad.float()
