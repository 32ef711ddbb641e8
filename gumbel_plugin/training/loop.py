"""A masking session as a guest in a training loop that belongs to somebody else: four moments, and it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from gumbel_plugin.config import ConfigLike, PruningConfig
from gumbel_plugin.errors import ConfigError, LifecycleError, TargetError
from gumbel_plugin.graph.dependency_groups import find_groups
from gumbel_plugin.layers.example_inputs import checked_inputs, inputs_on_device_of, observing
from gumbel_plugin.layers.model_check import refuse_unusable
from gumbel_plugin.layers.weights import own_state
from gumbel_plugin.storage.mask_format import Masks
from gumbel_plugin.training.planner import needs_groups
from gumbel_plugin.training.session import MaskingSession
from gumbel_plugin.training.state_check import check_optimizer_state, require_keys


class MaskingLoop:
    """A session with its own optimizers, for loops whose loss and optimizers are out of reach.

    The host's optimizers do not know the gates. Their gradient from the task comes with the host's backward;
    `before_step` adds that of the session's own loss and steps them; `after_step` advances the schedules.

    Attributes:
        session: The session.
        optimizers: The optimizers of gates and scales, once it was started.
    """

    def __init__(self, model: nn.Module, config: ConfigLike, example_inputs: Any = None) -> None:
        """Plan the session; the model is not touched before `start`.

        Args:
            model: The plain model.
            config: What is pruned: a YAML path, a dict, an NNI config list or a `PruningConfig`; of its sections
                ``pruning`` and the seed are used.
            example_inputs: What to trace the model with, where whole channels are to go.

        Raises:
            ConfigError: If the configuration breaks a rule, channels are to go and there is nothing to trace with, or
                the model or the inputs cannot be used.
            TargetError: If a rule matches nothing.
        """
        refuse_unusable(model, "a masking session")
        resolved = PruningConfig.load(config)
        groups = []
        if needs_groups(resolved.pruning):
            if example_inputs is None and resolved.example_shape is None:
                raise ConfigError(
                    "removing whole channels needs inputs to trace the model with: pass example_inputs=, or set "
                    "example_shape in the configuration"
                )
            inputs = torch.zeros(resolved.example_shape or ()) if example_inputs is None else example_inputs
            groups = find_groups(model, inputs_on_device_of(model, checked_inputs(inputs)))
        self.session = MaskingSession(model, resolved.pruning, groups, resolved.seed)
        self.optimizers: list[torch.optim.Optimizer] = []

    def start(self, total_steps: int | None) -> None:
        """Attach the gates; see `MaskingSession.start`."""
        self.session.start(total_steps)
        self.optimizers = self.session.optimizers()

    def before_step(self) -> None:
        """Step the gates; to be called after the host's backward, before its optimizers step or clear gradients."""
        loss = self.session.loss()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        _average_gradients(self.optimizers)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def after_step(self) -> None:
        """Advance the schedules; to be called after the host's optimizers have stepped."""
        self.session.step()

    def plain_state(self) -> dict[str, Tensor]:
        """Return the state dict of the plain model that computes what the gated one does now in eval mode."""
        plan, model = self.session.plan, self.session.model
        state = own_state(model)
        with observing(*plan.masks.values()):
            for name, gated in plan.gated_layers.items():
                state[f"{name}.weight"] = gated.apply(gated.weight).detach().clone()
                if gated.block is not None and gated.mask is not None and gated.bias is not None:
                    state[f"{name}.bias"] = gated.bias * gated.mask.gates().all()
        return state

    def finish(self) -> Masks:
        """Decide the masks, write them into the weights, and take gates and hooks off the model; return the masks."""
        masks = self.session.extract()
        self.session.detach()
        return masks

    def remove_from(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gates out of a host's optimizer that was built from all parameters of the model."""
        own = {id(p) for p in (*self.session.gate_parameters(), *self.session.scale_parameters())}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Return gates, schedules and optimizers, for a checkpoint."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"session": self.session.state_dict(), "optimizers": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; the session was started before.

        Raises:
            LifecycleError: If it was not.
            TargetError: If the state is of another session or damaged; nothing was taken over.
        """
        if not self.optimizers:
            raise LifecycleError("start the session before a state is put into it")
        state = require_keys(state, ("session", "optimizers"), "the state")
        count = len(state["optimizers"]) if isinstance(state["optimizers"], Sequence) else 0
        if count != len(self.optimizers):
            raise TargetError(f"the state has {count} optimizers, the session {len(self.optimizers)}")
        for number, (optimizer, own) in enumerate(zip(self.optimizers, state["optimizers"], strict=True)):
            check_optimizer_state(optimizer, own, f"optimizers[{number}]")
        self.session.load_state_dict(state["session"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)


def refuse_scaled_gradients(precision: str, argument: str) -> None:
    """Refuse float16, whose gradients are scaled by the host's scaler, which does not know the gates.

    Raises:
        ConfigError: If so.
    """
    if precision in ("16", "16-mixed", "fp16"):
        raise ConfigError(f"{argument}: float16 scales the gradients of the gates; use bfloat16")


def _average_gradients(optimizers: list[torch.optim.Optimizer]) -> None:
    """Let all processes of a distributed training step the gates alike; a host may not have wrapped them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    world = torch.distributed.get_world_size()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient: Tensor = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.distributed.all_reduce(gradient)
                parameter.grad = gradient / world
