"""States of a session: the last good one of a model, to fall back to, and the session's own, to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import NonFiniteLossError
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.training.plan import Plan
from gumbel_plugin.training.state_check import check_session_state

_WAITING = 10
"""How many losses on an accelerator are looked at together: each look waits until the device has computed them."""


class Snapshot:
    """The last remembered state of a model whose training may fail, and the losses that were not looked at yet.

    Args:
        model: The model.
        every: After how many steps its state is remembered anew; None never remembers one.
        waiting: How many losses are looked at together; by default every one on a CPU, `_WAITING` elsewhere.
    """

    def __init__(self, model: nn.Module, every: int | None, waiting: int | None = None) -> None:
        self._model = model
        self._every = every
        self._waiting = waiting
        self._losses: list[tuple[int, Tensor]] = []
        self._taken: tuple[int, dict[str, Tensor]] | None = None

    def forget(self) -> None:
        """Drop state and losses, which are of another training now."""
        self._losses, self._taken = [], None

    def take(self, step: int) -> None:
        """Remember the model's state at this step, if that was asked for."""
        if self._every is not None:
            self._taken = (step, {name: tensor.detach().clone() for name, tensor in self._state().items()})

    def guard(self, loss: Tensor, step: int) -> Tensor:
        """Return the loss as it is; look at it now or a few steps later, and remember the model's state now and then.

        Raises:
            NonFiniteLossError: If this loss, or one before it, is NaN or infinite (see `check`).
        """
        self._losses.append((step, loss.detach()))
        due = self._every is not None and (self._taken is None or step - self._taken[0] >= self._every)
        if due or len(self._losses) >= (self._waiting or (1 if loss.device.type == "cpu" else _WAITING)):
            self.check()
        if due:
            self.take(step)
        return loss

    def check(self) -> None:
        """Look at all losses so far.

        Raises:
            NonFiniteLossError: If one is NaN or infinite. The model gets its last remembered state back.
        """
        losses, self._losses = self._losses, []
        if not losses or bool(torch.stack([torch.isfinite(loss).all() for _, loss in losses]).all()):
            return
        step, bad = next((step, loss) for step, loss in losses if not bool(torch.isfinite(loss).all()))
        taken, state = self._taken or (step, {})
        with torch.no_grad():
            for name, tensor in self._state().items():
                if name in state:
                    tensor.copy_(state[name])
        kept = f"the model keeps its state at step {taken}"
        raise NonFiniteLossError(
            f"the loss became {float(bad.sum()):g} at step {step}; "
            f"{kept if self._every else 'no state was remembered (snapshot_every=None)'}. A lower learning rate of the "
            "weights or the gates is the usual cure"
        )

    def _state(self) -> dict[str, Tensor]:
        tensors = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        return {name: tensor for name, tensor in tensors.items() if tensor.is_leaf}


def save_state(plan: Plan, steps: int, total_steps: int | None) -> dict[str, Any]:
    """Return what is needed to go on later on the same model: masks, scales, steps, noise."""
    return {
        "masks": {name: mask.state_dict() for name, mask in plan.masks.items()},
        "phases": {name: mask.phase.value for name, mask in plan.masks.items()},
        "folded": [name for name, gated in plan.gated_layers.items() if gated.folded],
        "scales": [scale.detach().clone() for scale in plan.scales()],
        "steps": steps,
        "total_steps": total_steps,
        "forward": plan.noise.forward,
    }


def load_state(plan: Plan, state: Mapping[str, Any]) -> None:
    """Take over masks, scales and noise that `save_state` returned, for a plan made alike.

    Raises:
        TargetError: If the state is of another plan or damaged; nothing was taken over.
    """
    check_session_state(plan, state)
    for name, mask in plan.masks.items():
        mask.load_state_dict(state["masks"][name])
        mask.phase = Phase(state["phases"][name])
    for name, gated in plan.gated_layers.items():
        gated.folded = name in state["folded"]
    with torch.no_grad():
        for scale, value in zip(plan.scales(), state["scales"], strict=True):
            scale.copy_(value)
    plan.noise.forward = state["forward"]
