"""Learned masks as a Lightning callback."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.config import ConfigLike
from gumbel_plugin.errors import ConfigError, MissingExtraError
from gumbel_plugin.training.distillation import DistillationLike
from gumbel_plugin.training.loop import refuse_scaled_gradients
from gumbel_plugin.training.pruning_callback import PruningCallback


def _callback_classes() -> tuple[type, ...]:
    """Return the base class of callbacks in every Lightning that is installed; they are different classes."""
    found = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(importlib.import_module(package).Callback)
        except ImportError:
            continue
    if not found:
        raise MissingExtraError("lightning", "lightning")
    return tuple(found)


class GumbelPruning(PruningCallback, *_callback_classes()):  # type: ignore[misc]
    """Learns masks while any Trainer trains any module; the module itself does not change.

    Example::

        pruning = GumbelPruning([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], example_inputs=x)
        Trainer(max_epochs=10, callbacks=[pruning]).fit(module, loader)
        small = pruning.shrink()

    Gates and their optimizers live in the callback, and in the Trainer's checkpoints. Gates are taken out of the
    module's own optimizers, should it have put all its parameters there.

    Attributes:
        masks: NNI's masks format, once the training is over.
    """

    def __init__(
        self,
        config: ConfigLike,
        example_inputs: Any = None,
        attribute: str | None = None,
        distillation: DistillationLike = None,
    ) -> None:
        """Note what to do.

        Args:
            config: What is pruned: a YAML path, a dict, an NNI config list or a `PruningConfig`; of its sections
                ``pruning``, ``distillation`` and the seed are used.
            example_inputs: What to trace the network with, where whole channels are to go, and to count
                multiply-accumulates with; by default the module's ``example_input_array``.
            attribute: The attribute of the module that holds the network; by default the module is the network.
            distillation: What is learned from a teacher: settings, a teacher, or a `Distillation`; by default what the
                configuration says.
        """
        super().__init__(config, example_inputs, distillation)
        self._attribute = attribute
        self._restored = False
        self._best_steps: dict[str, int] = {}  # by the path of a best checkpoint: how many steps it had seen

    # Lightning's hooks --------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach the gates, before Lightning wraps the module or restores a checkpoint into it."""
        if stage != "fit":
            return
        refuse_scaled_gradients(str(trainer.precision), f"Trainer(precision={trainer.precision!r})")
        self._refuse_averages(trainer)
        if self._example_inputs is None:
            self._example_inputs = pl_module.example_input_array
        self._begin(self._network_of(pl_module), None)
        self._restored, self._best_steps = False, {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the gates out of the module's optimizers; plan the phases, now that the module has its data."""
        for optimizer in trainer.optimizers:
            self._running.remove_from(optimizer)
        steps = trainer.estimated_stepping_batches
        if not self._restored and math.isfinite(steps) and steps > 0:
            self._running.session.expect(int(steps))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note best checkpoints that were written after the batch before; that callback comes after all others."""
        self._note_best(trainer)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Stop at a loss that is no number; it is one of several whose gradients are summed."""
        self._running.session.distillation.loss_share = 1 / trainer.accumulate_grad_batches
        self._running.guard(loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Step the gates, once a batch."""
        self._running.before_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Advance the schedules, unless gradients were only accumulated."""
        self._running.after_step()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log where the masks stand."""
        pl_module.log_dict(self._running.session.status().numbers())

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Decide the masks and leave the plain module, its closed weights at zero."""
        self._note_best(trainer)
        self.masks = self._running.finish()
        for saving in _monitoring(trainer):
            self._warn_if_dense(
                self._best_steps[_best_of(saving)],
                f"ModelCheckpoint(monitor={saving.monitor!r}) kept {saving.best_model_path}",
                "Take the module as fit left it",
            )

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the plain module as it is now; the callback may train again."""
        self._leave()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the plain module where a fit ends before its end, as that of a tuner does."""
        self._leave()

    def state_dict(self) -> dict[str, Any]:
        """Return what a training needs to go on, for Lightning's checkpoints, whose network is the plain masked one."""
        return {**self._running.state_dict(), "best_steps": self._best_steps} if self._attached else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if state_dict and self._attached:
            self._running.load_state_dict(state_dict)
            self._best_steps = dict(state_dict.get("best_steps", {}))
            self._restored = True

    # --------------------------------------------------------------------------------------------------------------

    def _network_of(self, pl_module: Any) -> nn.Module:
        if self._attribute is None:
            return pl_module  # type: ignore[no-any-return]
        if not isinstance(getattr(pl_module, self._attribute, None), nn.Module):
            pl_module.configure_model()  # Lightning calls it later, and demands that it may be called twice
        network = getattr(pl_module, self._attribute, None)
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"attribute {self._attribute!r}: the module has no network of that name; build it in __init__ or in "
                "configure_model"
            )
        return network

    def _refuse_averages(self, trainer: Any) -> None:
        """Refuse callbacks that average a copy of the network which lacks the gates, or the gates' decisions."""
        place = trainer.callbacks.index(self)
        for number, callback in enumerate(trainer.callbacks):
            name, kinds = type(callback).__name__, {kind.__name__ for kind in type(callback).__mro__}
            if not kinds & {"WeightAveraging", "StochasticWeightAveraging"}:
                continue
            if number < place:
                raise ConfigError(
                    f"callbacks: GumbelPruning goes before {name}, which copies the network with its gates"
                )
            if getattr(callback, "_use_buffers", False):
                raise ConfigError(f"{name}(use_buffers=True) averages the gates' decisions; pass use_buffers=False")

    def _note_best(self, trainer: Any) -> None:
        for saving in _monitoring(trainer):
            self._best_steps.setdefault(_best_of(saving), self._running.session.steps)


def _monitoring(trainer: Any) -> list[Any]:
    """Return the ModelCheckpoints that have kept a best checkpoint by a metric."""
    return [saving for saving in trainer.checkpoint_callbacks if saving.best_model_path and saving.monitor is not None]


def _best_of(saving: Any) -> str:
    """Return what tells a best checkpoint from those before; a file of a fixed name is written again."""
    return f"{saving.best_model_path} {saving.best_model_score}"
