"""Repairs of NNI's evaluators on today's Lightning and Transformers."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gumbel_nni.compat.patching import replace_once


def settable_max_steps() -> bool:
    """Let LightningEvaluator limit the steps.

    Cause: NNI assigns ``trainer.fit_loop.max_steps``, a read-only property (Lightning 2.0 and later).
    """
    if "pytorch_lightning" not in sys.modules:
        return False
    from pytorch_lightning.loops import fit_loop

    loop = getattr(fit_loop, "_FitLoop", None) or fit_loop.FitLoop
    steps = inspect.getattr_static(loop, "max_steps", None)
    if not isinstance(steps, property):
        return False
    if steps.fset is None:
        loop.max_steps = steps.setter(lambda self, value: setattr(self.epoch_loop, "max_steps", value))
    return True


def loss_with_item_count() -> bool:
    """Let TransformersEvaluator patch the loss.

    Cause: Trainer calls ``compute_loss(..., num_items_in_batch=...)`` (Transformers 4.46 and later), which NNI's
    replacement does not take.
    """
    from nni.compression.utils import evaluator

    if not evaluator.TRANSFORMERS_INSTALLED:
        return False
    if "num_items_in_batch" not in inspect.signature(evaluator.HFTrainer.compute_loss).parameters:
        return False
    replace_once(evaluator.TransformersEvaluator, "patch_loss", _patch_loss)
    return True


def default_optimizer_of_trainer() -> bool:
    """Let TransformersEvaluator trace the Trainer's default optimizer.

    Cause: NNI overwrites ``Trainer.get_optimizer_cls_and_kwargs`` with a one-argument function; Trainer calls it on the
    instance with the model too (Transformers 4.39 and later), and NNI leaves a plain function where the static
    method was.
    """
    from nni.compression.utils import evaluator

    if not evaluator.TRANSFORMERS_INSTALLED:
        return False
    if "model" not in inspect.signature(evaluator.HFTrainer.get_optimizer_cls_and_kwargs).parameters:
        return False
    replace_once(evaluator.TransformersEvaluator, "_init_optimizer_helpers", _init_optimizer_helpers)
    return True


def _patch_loss(self: Any, patch: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
    compute_loss = self.trainer.compute_loss

    def patched(_: Any, model: Any, inputs: Any, return_outputs: bool = False, **extra: Any) -> Any:
        result = compute_loss(model, inputs, return_outputs, **extra)
        return (patch(result[0], inputs), result[1]) if return_outputs else patch(result, inputs)

    self.trainer.compute_loss = types.MethodType(patched, self.trainer)


def _init_optimizer_helpers(self: Any, pure_model: Any) -> None:
    import nni

    with _traced_default_optimizer(self.traced_trainer, nni):
        _init_optimizer_helpers.__wrapped__(self, pure_model)  # type: ignore[attr-defined]


@contextmanager
def _traced_default_optimizer(trainer: Any, nni: Any) -> Iterator[None]:
    """Put the Trainer's default optimizer, traced, where the user gave none that is traced."""
    if trainer.optimizer is not None and nni.common.is_traceable(trainer.optimizer):
        yield
        return
    cls, arguments = type(trainer).get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    trainer.get_optimizer_cls_and_kwargs = lambda args, model=None: (nni.trace(cls), arguments)
    trainer.optimizer = None
    try:
        trainer.optimizer = trainer.create_optimizer()
        yield
    finally:
        del trainer.get_optimizer_cls_and_kwargs
        trainer.optimizer = None
