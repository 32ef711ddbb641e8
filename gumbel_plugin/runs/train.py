"""The one training engine of runs from a configuration: Lightning's Trainer around a masking session."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gumbel_plugin.config import PruningConfig, TrainingConfig
from gumbel_plugin.errors import ConfigError, MissingExtraError, NonFiniteLossError
from gumbel_plugin.learning.session import GATES, MaskingSession, make_optimizer
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.runs.data import load_data, make_loader
from gumbel_plugin.shrinking.inputs import observing

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise MissingExtraError("lightning", "lightning") from error

_LOSSES = {"cross_entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss}
Loader = DataLoader[Any]


class MaskedTask(pl.LightningModule):  # type: ignore[misc]
    """A network and, if it is gated, its session, as Lightning trains them.

    Weights, gates and scales have optimizers of their own (the methods publish different ones) on one backward.
    """

    def __init__(self, model: nn.Module, session: MaskingSession | None, training: TrainingConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.session = session
        self.training_config = training
        self.criterion = _LOSSES[training.loss]()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        weights = [p for n, p in self.model.named_parameters() if p.requires_grad and GATES not in n]
        own = self.session.optimizers() if self.session else []
        return ([make_optimizer(weights, self.training_config.optimizer)] if weights else []) + own

    def training_step(self, batch: Sequence[Tensor], index: int) -> None:
        inputs, targets = batch
        task_loss = self.criterion(self.model(inputs), targets)
        loss = task_loss
        if self.session is not None:
            loss = self.session.guard(task_loss) + self.session.loss()
        elif not torch.isfinite(task_loss):
            raise NonFiniteLossError(f"the loss became {float(task_loss):g} at step {self.global_step}")
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        if self.training_config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.training_config.gradient_clip)
        for optimizer in optimizers:
            optimizer.step()
        if self.session is not None:
            self.session.step()
        self.log("loss", task_loss.detach(), prog_bar=True)

    def on_train_epoch_end(self) -> None:
        if self.session is not None:
            status = self.session.status()
            self.log("sparsity", status.sparsity, prog_bar=True)
            self.log("soft_sparsity", status.soft_sparsity)
        self._set_learning_rate()

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        inputs, targets = batch
        score = _score(self.model(inputs), targets, self.training_config.loss)
        self.log("validation_score", score, prog_bar=True, on_epoch=True, batch_size=len(inputs))

    def _set_learning_rate(self) -> None:
        config = self.training_config
        epoch, total = self.current_epoch + 1, self.trainer.max_epochs or config.max_epochs
        factor = 0.5 + 0.5 * math.cos(math.pi * min(1.0, epoch / total)) if config.lr_schedule == "cosine" else 1.0
        if self.session is not None and self.session.phase is Phase.FIXED:
            self._fixed_epochs = getattr(self, "_fixed_epochs", 0) + 1
            factor *= config.lr_decay**self._fixed_epochs
        if any(p.requires_grad for n, p in self.model.named_parameters() if GATES not in n):
            optimizers = self.optimizers()
            first = optimizers[0] if isinstance(optimizers, list) else optimizers
            for group in first.param_groups:
                group["lr"] = config.optimizer.lr * factor


class _BestState(pl.Callback):  # type: ignore[misc]
    """Keeps the state with the best validation score, and gives it back at the end."""

    def __init__(self) -> None:
        self.best = -math.inf
        self.state: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: Any, task: MaskedTask) -> None:
        score = float(trainer.callback_metrics["validation_score"])
        if score > self.best:
            self.best = score
            self.state = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}

    def on_fit_end(self, trainer: Any, task: MaskedTask) -> None:
        task.model.load_state_dict(self.state)


def fit(
    model: nn.Module,
    session: MaskingSession | None,
    training: TrainingConfig,
    train: Loader,
    validation: Loader | None = None,
    *,
    max_steps: int | None = None,
    hooks: bool = True,
    output: Path | None = None,
    progress: bool = False,
) -> None:
    """Train a model, with a session's gates if there is one.

    Args:
        model: The model; it is trained in place and left in eval mode.
        session: A planned session on this model; it is started here.
        training: How to train.
        train: Batches of (inputs, targets).
        validation: Batches to score with hard masks after each epoch.
        max_steps: Train for this many optimiser steps instead of epochs.
        hooks: Passed to `MaskingSession.start`.
        output: Where the training log goes; none without it.
        progress: Whether to show a progress bar.

    Raises:
        NonFiniteLossError: If the loss becomes NaN or infinite.
    """
    if training.patience is not None and validation is None:
        raise ConfigError("training.patience needs validation data: set data.validation_fraction")
    total = max_steps if max_steps is not None else training.max_epochs * len(train)
    if session is not None:
        session.start(total, hooks=hooks)
    task = MaskedTask(model, session, training)
    callbacks: list[Any] = []
    if training.patience is not None:
        callbacks = [_BestState(), pl.callbacks.EarlyStopping("validation_score", 0.0, training.patience, mode="max")]
    epochs = training.max_epochs if max_steps is None else math.ceil(max_steps / len(train))
    with _quiet_lightning():
        optimizers = len(task.configure_optimizers())
        trainer = pl.Trainer(
            max_epochs=epochs,
            # Lightning counts every optimizer's step.
            max_steps=-1 if max_steps is None else max_steps * optimizers,
            accelerator=training.accelerator,
            devices=training.devices,
            strategy=training.strategy,
            precision=training.precision,
            logger=False if output is None else pl.loggers.CSVLogger(str(output), name="log", version=""),
            enable_checkpointing=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=callbacks,
        )
        trainer.fit(task, train, validation)
    model.eval()


def loaders(config: PruningConfig) -> tuple[Loader, Loader | None, Loader]:
    """Return the loaders of a configuration's data: train, validation (if a part is set aside), test.

    Raises:
        ConfigError: If the configuration has no data section.
        DataError: If the data is not there.
    """
    if config.data is None:
        raise ConfigError("data: required to train from a configuration, but missing")
    data, bundle = config.data, load_config_data(config)
    train = make_loader(bundle.train, data.batch_size, shuffle=True, seed=config.seed)
    test = make_loader(bundle.test, 256, shuffle=False, seed=config.seed)
    held_out = bundle.validation
    validation = None if held_out is None else make_loader(held_out, 256, shuffle=False, seed=config.seed)
    return train, validation, test


def load_config_data(config: PruningConfig) -> Any:
    """Return the data bundle of a configuration."""
    data = config.data
    if data is None:
        raise ConfigError("data: required, but missing")
    return load_data(
        data.name,
        root=data.root,
        validation_fraction=data.validation_fraction,
        augment=data.augment,
        download=data.download,
        seed=config.seed,
    )


def evaluate(model: nn.Module, loader: Loader, loss: str = "cross_entropy") -> float:
    """Return the accuracy in percent on a loader's data, or the negative mean squared error for ``mse``; eval mode."""
    total = count = 0.0
    device = next(model.parameters()).device
    with observing(model):
        for inputs, targets in loader:
            total += float(_score(model(inputs.to(device)), targets.to(device), loss)) * len(inputs)
            count += len(inputs)
    return total / count


def _score(outputs: Tensor, targets: Tensor, loss: str) -> Tensor:
    if loss == "mse":
        return -nn.functional.mse_loss(outputs, targets)
    return (outputs.argmax(1) == targets).float().mean() * 100


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's greetings and hints out of the output; errors stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
