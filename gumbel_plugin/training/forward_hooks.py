"""All hooks of a session on its model."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from gumbel_plugin.layers.weights import Attached
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.masks.per_sample import PerSample
from gumbel_plugin.sparsity.controller import BudgetController
from gumbel_plugin.sparsity.types import CHANNEL
from gumbel_plugin.training.distillation import Distillation
from gumbel_plugin.training.gated_layer import GatedLayerHooks
from gumbel_plugin.training.plan import Plan
from gumbel_plugin.training.prior import Prior
from gumbel_plugin.training.sample_gates import SampleHooks
from gumbel_plugin.training.training_check import TrainingCheck


class SessionHooks(Attached):
    """The hooks by which a plan acts in a model: the one on the model draws the samples."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        check: TrainingCheck,
        distillation: Distillation,
        *,
        on_layers: bool,
    ) -> None:
        """Start acting.

        Args:
            model: The model.
            plan: What acts where.
            check: What counts the training's forwards.
            distillation: What compares the model with a teacher as long as these hooks act.
            on_layers: Whether the layers get hooks; False where wrappers call each gated layer's `apply`.
        """
        self._plan = plan
        self._check = check
        self._distillation = distillation
        self._root: RemovableHandle = model.register_forward_pre_hook(self._begin_forward)
        distillation.attach(model)
        # A layer whose parent reads its weight without calling it is out of a wrapper's reach: it needs hooks anyway.
        gated_layers = plan.gated_layers.values()
        self._of_layers: list[GatedLayerHooks | SampleHooks] = [
            GatedLayerHooks(gated) for gated in gated_layers if on_layers or gated.read_by_parent
        ]
        # Nor can a wrapper that masks weights act on activations.
        self._of_layers += [
            SampleHooks(gated) for gated in gated_layers if any(isinstance(mask, PerSample) for mask in gated.masks)
        ]
        for hook in self._of_layers:
            hook.attach()

    def remove(self) -> None:
        """Stop acting, and leave the layers as they were."""
        self._root.remove()
        self._distillation.detach()
        for hook in self._of_layers:
            hook.detach()

    def _begin_forward(self, module: nn.Module, args: Any) -> None:
        for gated in self._plan.gated_layers.values():
            gated.unhide()
        masks = self._plan.learned()
        if module.training and masks[0].phase is not Phase.OPEN:
            self._distillation.take(module, final=True)  # dense training is over: it is the teacher's from here on
        if not (module.training or any(isinstance(mask, PerSample) and mask.evaluated_per_sample for mask in masks)):
            return
        if torch._C._current_graph_task_id() == -1:
            self._plan.noise.forward += 1
            if module.training and any(mask.phase is Phase.LEARNING for mask in masks):
                self._check.forward()
        # Otherwise a backward is running: activation checkpointing recomputes the model, and needs the same sample.
        for mask in masks:
            # Drawn here, not where they are first used: a checkpointed layer must not own what others use too.
            mask.forget_sample()
        if self._plan.bank is not None:
            self._plan.bank.forget_sample()
            self._plan.bank.parts()
        for mask in masks:
            if mask.sparsity_type == CHANNEL and not isinstance(mask, PerSample):
                mask.gates()


def act_before_steps(controller: BudgetController, prior: Prior) -> RemovableHandle:
    """Let the gates' gradients be priced, or collected, before any optimizer that holds gates makes its step."""
    # A session that is forgotten attached must not live on in torch.
    steering, collecting = weakref.ref(controller), weakref.ref(prior)

    def act(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        controller, prior = steering(), collecting()
        if controller is None or prior is None:
            return
        own = {id(parameter) for parameter in controller.parameters()}
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            prior.before_step()
            controller.before_step()

    handle: RemovableHandle = register_optimizer_step_pre_hook(act)
    return handle
