"""The one driver of a training with gates: every front end maps the events of its trainer to these few verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gumbel_plugin.errors import ConfigError, LifecycleError, TargetError
from gumbel_plugin.layers.example_inputs import observing
from gumbel_plugin.layers.weights import Attached, is_gate
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.storage.mask_format import Masks
from gumbel_plugin.training.session import MaskingSession
from gumbel_plugin.training.state_check import check_optimizer_state, check_tensors, require_keys


class MaskingLoop(Attached):
    """A session and the optimizers of its gates, in the order that all front ends share.

    The trainer's optimizers do not know the gates::

        loop = MaskingLoop(session)
        loop.start(total_steps)
        for x, y in loader:
            optimizer.zero_grad()
            loop.guard(criterion(model(x), y)).backward()
            loop.before_step()       # the session's own loss, in a backward of its own; then the gates' step
            optimizer.step()
            loop.after_step()        # schedules, budgets, phases
        masks = loop.finish()        # hard masks; the model is a plain one, its closed weights exactly zero

    Attributes:
        session: The session.
        optimizers: The optimizers of gates and scales, once it was started.
    """

    def __init__(self, session: MaskingSession, *, steps_gates: bool = True) -> None:
        """Wrap a session, which is started here.

        Args:
            session: A planned session.
            steps_gates: Whether `before_step` steps the gates; False leaves that to an optimizer of the trainer's.
        """
        self.session = session
        self.optimizers: list[torch.optim.Optimizer] = []
        self._steps_gates = steps_gates
        self._stepping = False
        self._handles: list[RemovableHandle] = []

    # The training's events ----------------------------------------------------------------------------------------

    def start(self, total_steps: int | None, *, hooks: bool = True) -> None:
        """Attach the gates; see `MaskingSession.start`."""
        self.session.start(total_steps, hooks=hooks)
        if self._steps_gates:
            self.optimizers = self.session.optimizers()

    def guard(self, loss: Tensor) -> Tensor:
        """Return the task's loss as it is; see `MaskingSession.guard`."""
        return self.session.guard(loss)

    def before_step(
        self,
        scale: Callable[[Tensor], Tensor] | None = None,
        optimizers: Iterable[Any] | None = None,
    ) -> Tensor:
        """Step the gates: after the backward of the task's loss, before the trainer's optimizers step.

        Only the first call before `after_step` counts, so that a trainer with several optimizers may call it for each.

        Args:
            scale: Scales the session's own loss as the trainer has scaled the task's.
            optimizers: What steps the gates instead of `optimizers`, for trainers that wrap optimizers.

        Returns:
            The session's own loss.
        """
        if self._stepping:
            return torch.zeros(())
        self._stepping = True
        penalty = self.session.loss()
        if penalty.requires_grad:
            self._add_gradients(penalty if scale is None else scale(penalty))
        if self.session.phase is Phase.LEARNING or self.session.plan.learned()[0].is_probed:
            _average_gradients([*self.session.gate_parameters(), *self.session.scale_parameters()])
        for optimizer in self.optimizers if optimizers is None else optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return penalty.detach()

    def after_step(self) -> None:
        """Advance the schedules after the trainer's optimizers have stepped; nothing without a `before_step`."""
        if self._stepping:
            self._stepping = False
            self.session.step()

    def complete_at_forward(self) -> None:
        """Let the next training forward call `after_step`, for trainers without an event after the step."""
        hook = self.session.model.register_forward_pre_hook(self._complete, prepend=True)  # before the next sample
        self._handles.append(hook)

    def detach(self) -> None:
        """Take gates and hooks off the model, its weights as they are now."""
        self.session.detach()
        for handle in self._handles:
            handle.remove()
        self._handles, self._stepping = [], False

    def finish(self) -> Masks:
        """Decide the masks, write them into the weights, and take gates and hooks off the model; return the masks."""
        masks = self.session.extract()
        self.detach()
        return masks

    def settled(self, steps: int | None = None) -> bool:
        """Return whether a state of the training could be its result.

        That is: the masks are fixed, or are to be learned to the end and have no budget that is still falling. Before,
        the network is denser than it will be, and scores better than it will.

        Args:
            steps: After how many optimizer steps the state was taken; now by default.
        """
        session, phases = self.session, self.session.config.phases
        if steps is None and session.phase is Phase.FIXED:
            return True
        at = session.steps if steps is None else steps
        begin, end = session.mask_learning_span()
        if phases.fixed > 0:
            return session.total_steps is not None and at >= end
        ramp = session.config.budget.ramp if session.controller.budgets else 0.0
        return at >= begin and (at - begin) / max(1, end - begin) >= ramp

    def remove_from(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gates out of a trainer's optimizer that was built from all parameters of the model."""
        own = {id(p) for p in (*self.session.gate_parameters(), *self.session.scale_parameters())}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]

    # Checkpoints: the plain masked network, and beside it what the training needs to go on ------------------------

    def keep_checkpoints_plain(self) -> None:
        """Let the model's state dict be the plain masked network's until `detach`, and let a plain one be loaded."""
        model = self.session.model
        self._handles.append(model.register_state_dict_post_hook(_PlainStateDict(self)))  # type: ignore[no-untyped-call]
        self._handles.append(model.register_load_state_dict_pre_hook(_keep_gates))  # type: ignore[no-untyped-call]

    def state_dict(self) -> dict[str, Any]:
        """Return gates, schedules, optimizers, and the gated layers' weights under the masks."""
        masked, under = self._masked_tensors(), {}
        for name, gated in self.session.plan.gated_layers.items():
            for kind, tensor in masked[gated.module].items():
                own = gated.weight if kind == "weight" else gated.bias
                if own is not None and not torch.equal(own, tensor):
                    under[f"{name}.{kind}"] = own.detach().clone()
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return {"session": self.session.state_dict(), "optimizers": states, "weights": under}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; the session was started before, and the model has the checkpoint's plain weights.

        Raises:
            LifecycleError: If it was not started.
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
        weights = require_keys(state.get("weights", {}), (), "weights")
        tensors = dict(self.session.model.named_parameters())
        tensors = {name: tensors[name] for name in weights if name in tensors}
        check_tensors(tensors, weights, "weights")
        self.session.load_state_dict(state["session"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(weights[name])
        self._stepping = False

    def _masked_tensors(self) -> dict[nn.Module, dict[str, Tensor]]:
        """Return weights and biases of the gated layers as they act in eval mode now."""
        tensors: dict[nn.Module, dict[str, Tensor]] = {}
        with torch.no_grad(), observing(*self.session.plan.masks.values()):
            for gated in self.session.plan.gated_layers.values():
                own = tensors[gated.module] = {"weight": gated.apply(gated.weight).clone()}
                if gated.block is not None and gated.mask is not None and gated.bias is not None:
                    own["bias"] = gated.bias * gated.mask.gates().all()
        return tensors

    def _add_gradients(self, penalty: Tensor) -> None:
        """Add a loss to the gradients; not by a backward, which the hooks of DDP would take for that of a new step."""
        parameters = [parameter for parameter in self.session.model.parameters() if parameter.requires_grad]
        for parameter, own in zip(parameters, torch.autograd.grad(penalty, parameters, allow_unused=True), strict=True):
            if own is not None:
                parameter.grad = own if parameter.grad is None else parameter.grad.add_(own)

    def _complete(self, module: nn.Module, args: Any) -> None:
        if module.training:
            self.after_step()


class _PlainStateDict:
    """A hook that makes the gated model's state dict the plain masked network's; a copy of the model keeps its own."""

    def __init__(self, loop: MaskingLoop | None = None) -> None:
        self._loop = loop

    def __call__(self, model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if self._loop is None:
            return
        for name in [name for name in state if name.startswith(prefix) and is_gate(name)]:
            del state[name]
        masked = self._loop._masked_tensors()
        for name, module in model.named_modules(prefix=prefix.rstrip("."), remove_duplicate=False):
            for kind, tensor in masked.get(module, {}).items():
                state[f"{name}.{kind}".lstrip(".")] = tensor

    def __reduce__(self) -> tuple[type[_PlainStateDict], tuple[()]]:
        return type(self), ()


def _keep_gates(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a plain state be loaded into a gated network: the gates stay as they are."""
    for tensors in (module.named_parameters, module.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            if is_gate(name):
                state.setdefault(prefix + name, tensor.detach())


def refuse_scaled_gradients(precision: str, argument: str) -> None:
    """Refuse float16, whose gradients are scaled by the trainer's scaler, which does not know the gates.

    Raises:
        ConfigError: If so.
    """
    if precision in ("16", "16-mixed", "fp16"):
        raise ConfigError(f"{argument}: float16 scales the gradients of the gates; use bfloat16")


def _average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Let all processes of a distributed training step the gates alike; a trainer may not have wrapped them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    world = torch.distributed.get_world_size()
    for parameter in parameters:
        gradient: Tensor = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.distributed.all_reduce(gradient)
        parameter.grad = gradient / world
