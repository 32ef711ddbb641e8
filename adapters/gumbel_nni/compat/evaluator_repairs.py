"""Repairs of NNI's evaluators on today's Lightning and Transformers."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import nni
import torch
from nni.compression.utils import evaluator

from gumbel_nni.compat.patching import repair, replaces

Tasks = Sequence[Callable[[], Any]]
_STEP_PATCHES = "_step_patches"


@repair
def settable_max_steps() -> bool:
    """Let LightningEvaluator limit the steps.

    Cause: NNI assigns ``trainer.fit_loop.max_steps``, a read-only property (Lightning 2.0 and later).
    """
    if not evaluator.LIGHTNING_INSTALLED:
        return False
    from pytorch_lightning.loops.fit_loop import _FitLoop

    if _FitLoop.max_steps.fset is None:
        _FitLoop.max_steps = _FitLoop.max_steps.setter(lambda self, value: setattr(self.epoch_loop, "max_steps", value))
    return True


@replaces(evaluator.LightningEvaluator, "patch_optimizer_step", where=evaluator.LIGHTNING_INSTALLED)
def steps_after_backward(original: Any, self: Any, before_step_tasks: Tasks, after_step_tasks: Tasks) -> None:
    """Let what LightningEvaluator runs before the optimizer's step see this step's gradients.

    Cause: Lightning computes loss and gradients inside ``optimizer.step(closure)`` (1.5 and later), so that tasks
    "before the step" ran before the backward: a pruner's own optimizer used the gradients of the step before, and never
    the last ones. Remedy: the closure runs first.
    """
    original(self, [], after_step_tasks)
    if not before_step_tasks:
        return
    configure = self.model.configure_optimizers

    def with_tasks(_: Any) -> Any:
        configured = configure()
        _run_around_step(_first_optimizer(configured), before_step_tasks)
        return configured

    self.model.configure_optimizers = types.MethodType(with_tasks, self.model)


def _run_around_step(optimizer: Any, before: Tasks, after: Tasks = ()) -> None:
    step = optimizer.step

    def patched(_: Any, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:
        loss = closure() if closure is not None else None
        for task in before:
            task()
        output = step(**({} if closure is None else {"closure": lambda: loss}), **extra)
        for task in after:
            task()
        return output

    optimizer.step = types.MethodType(patched, optimizer)


def _first_optimizer(configured: Any) -> Any:
    """Return the first optimizer of what configure_optimizers returned, in any of NNI's three forms."""
    first = configured[0]
    if isinstance(first, dict):
        return first["optimizer"]
    return first[0] if isinstance(first, list | tuple) else first


@replaces(evaluator.TransformersEvaluator, "patch_optimizer_step", where=evaluator.TRANSFORMERS_INSTALLED)
def steps_of_trainer(original: Any, self: Any, before_step_tasks: Tasks, after_step_tasks: Tasks) -> None:
    """Let TransformersEvaluator patch the optimizer's step, and several compressors patch it.

    Cause: NNI takes ``trainer.deepspeed`` for the optimizer if there is such an attribute, and there is, None
    (Transformers 4.9 and later); and it keeps one patch in a class attribute, which a second patch replaces, in the
    whole process.
    """
    patches = getattr(self.trainer, _STEP_PATCHES, None)
    if patches is None:
        patches = []
        setattr(self.trainer, _STEP_PATCHES, patches)
        self.trainer.add_callback(_step_patcher(self.trainer, patches))
    patches.append((before_step_tasks, after_step_tasks))


def _step_patcher(trainer: Any, patches: Sequence[tuple[Tasks, Tasks]]) -> Any:
    from transformers import TrainerCallback

    class StepPatcher(TrainerCallback):
        """Patches the optimizer's step when the training begins and the optimizer exists."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = getattr(trainer, "deepspeed", None) or kwargs["optimizer"]
            for before, after in patches:
                _run_around_step(optimizer, before, after)

    return StepPatcher()


@replaces(evaluator.TransformersEvaluator, "patch_loss", where=evaluator.TRANSFORMERS_INSTALLED)
def loss_with_item_count(original: Any, self: Any, patch: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
    """Let TransformersEvaluator patch the loss.

    Cause: Trainer calls ``compute_loss(..., num_items_in_batch=...)`` (Transformers 4.46 and later), which NNI's
    replacement does not take.
    """
    compute_loss = self.trainer.compute_loss

    def patched(_: Any, model: Any, inputs: Any, return_outputs: bool = False, **extra: Any) -> Any:
        result = compute_loss(model, inputs, return_outputs, **extra)
        return (patch(result[0], inputs), result[1]) if return_outputs else patch(result, inputs)

    self.trainer.compute_loss = types.MethodType(patched, self.trainer)


@replaces(evaluator.TransformersEvaluator, "_init_optimizer_helpers", where=evaluator.TRANSFORMERS_INSTALLED)
def default_optimizer_of_trainer(original: Any, self: Any, pure_model: Any) -> None:
    """Let TransformersEvaluator trace the Trainer's default optimizer.

    Cause: NNI overwrites ``Trainer.get_optimizer_cls_and_kwargs`` with a one-argument function; Trainer calls it on the
    instance with the model too (Transformers 4.39 and later), and NNI leaves a plain function where the static
    method was.
    """
    trainer = self.traced_trainer
    if trainer.optimizer is not None and nni.common.is_traceable(trainer.optimizer):
        original(self, pure_model)
        return
    cls, arguments = type(trainer).get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    trainer.get_optimizer_cls_and_kwargs = lambda args, model=None: (nni.trace(cls), arguments)
    trainer.optimizer = None
    try:
        trainer.optimizer = trainer.create_optimizer()
        original(self, pure_model)
    finally:
        del trainer.get_optimizer_cls_and_kwargs
        trainer.optimizer = None
