"""States of a session: the last good one of a model, to fall back to, and the session's own, to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import NonFiniteLossError
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.sparsity.controller import BudgetController
from gumbel_plugin.training.plan import Plan
from gumbel_plugin.training.state_check import check_session_state

_EVERY = 50
"""After how many steps a model's state is remembered anew."""


class Snapshot:
    """The last remembered state of a model whose training may fail."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._taken: tuple[int, dict[str, Tensor]] | None = None

    def take(self, step: int) -> None:
        """Remember the model's state at this step."""
        self._taken = (step, {name: tensor.detach().clone() for name, tensor in self._state().items()})

    def guard(self, loss: Tensor, step: int) -> Tensor:
        """Return a finite loss as it is; remember the model's state now and then.

        Raises:
            NonFiniteLossError: If the loss is NaN or infinite. The model gets its last remembered state back.
        """
        if bool(torch.isfinite(loss.detach()).all()):
            if self._taken is None or step - self._taken[0] >= _EVERY:
                self.take(step)
            return loss
        taken, state = self._taken or (step, {})
        with torch.no_grad():
            for name, tensor in self._state().items():
                if name in state:
                    tensor.copy_(state[name])
        raise NonFiniteLossError(
            f"the loss became {float(loss.detach().sum()):g} at step {step}; the model keeps its state at step "
            f"{taken}. A lower learning rate of the weights or the gates is the usual cure"
        )

    def _state(self) -> dict[str, Tensor]:
        tensors = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        return {name: tensor for name, tensor in tensors.items() if tensor.is_leaf}


def save_state(plan: Plan, controller: BudgetController, steps: int, total_steps: int | None) -> dict[str, Any]:
    """Return what is needed to go on later on the same model: masks, scales, multipliers, steps, noise."""
    return {
        "masks": {name: mask.state_dict() for name, mask in plan.masks.items()},
        "phases": {name: mask.phase.value for name, mask in plan.masks.items()},
        "folded": [name for name, gated in plan.gated_layers.items() if gated.folded],
        "scales": [scale.detach().clone() for scale in plan.scales()],
        "multipliers": controller.multipliers.clone(),
        "steps": steps,
        "total_steps": total_steps,
        "forward": plan.noise.forward,
    }


def load_state(plan: Plan, controller: BudgetController, state: Mapping[str, Any]) -> None:
    """Take over masks, scales, multipliers and noise that `save_state` returned, for a plan made alike.

    Raises:
        TargetError: If the state is of another plan or damaged; nothing was taken over.
    """
    check_session_state(plan, controller, state)
    for name, mask in plan.masks.items():
        mask.load_state_dict(state["masks"][name])
        mask.phase = Phase(state["phases"][name])
    for name, gated in plan.gated_layers.items():
        gated.folded = name in state["folded"]
    with torch.no_grad():
        for scale, value in zip(plan.scales(), state["scales"], strict=True):
            scale.copy_(value)
    controller.multipliers = state["multipliers"].clone()
    plan.noise.forward = state["forward"]
