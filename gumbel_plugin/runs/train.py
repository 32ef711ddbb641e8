"""The one training engine of runs from a configuration: Lightning's Trainer around a masking session."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gumbel_plugin.errors import ConfigError, DataError, MissingExtraError, NonFiniteLossError, shown
from gumbel_plugin.layers.example_inputs import observing
from gumbel_plugin.layers.weights import own_parameters
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.runs.data import DataBundle, load_data, make_loader
from gumbel_plugin.runs.run_config import RunConfig, TrainingConfig
from gumbel_plugin.training.loop import MaskingLoop
from gumbel_plugin.training.optimizers import make_optimizer
from gumbel_plugin.training.session import MaskingSession

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise MissingExtraError("lightning", "lightning") from error

_EVALUATION_BATCH = 256
_PASSED_ON = ("accelerator", "devices", "strategy", "precision")
# Before and after they are learned, gates get no gradient, which DDP takes for a mistake unless it looks for such.
_STRATEGIES = {"ddp": "ddp_find_unused_parameters_true", "ddp_spawn": "ddp_spawn_find_unused_parameters_true"}
Loader = DataLoader[Any]


class MaskedTask(pl.LightningModule):  # type: ignore[misc]
    """A network and, if it is gated, its loop, as Lightning trains them.

    Weights, gates and scales have optimizers of their own: the methods publish different ones.

    Attributes:
        steps: Optimizer steps so far; every optimizer's step on one batch together counts as one.
    """

    def __init__(self, model: nn.Module, loop: MaskingLoop | None, training: TrainingConfig, total_steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.session = None if loop is None else loop.session
        self.training_config = training
        self.criterion = make_loss(training)
        self.total_steps = total_steps
        self.steps = 0
        self._loop = loop
        self._fixed_epochs = 0

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizer of the weights (first, if they are trained), then those of the gates."""
        weights = self._weights()
        own = self._loop.optimizers if self._loop else []
        return ([make_optimizer(weights, self.training_config.optimizer)] if weights else []) + own

    def training_step(self, batch: Sequence[Tensor], index: int) -> None:
        """Step every optimizer once, and the session's schedules after them."""
        inputs, targets = batch
        loss = self._guarded(self.criterion(self.model(inputs), targets))
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        own = len(self._loop.optimizers) if self._loop else 0
        of_weights = optimizers[: len(optimizers) - own]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        if self._loop is not None:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of float16
            self._loop.before_step(scaler.scale if scaler else None, optimizers[len(of_weights) :])
        if self.training_config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self._weights(), self.training_config.gradient_clip)
        for optimizer in of_weights:
            optimizer.step()
        if self._loop is not None:
            self._loop.after_step()
        self.steps += 1
        if self.steps >= self.total_steps:
            self.trainer.should_stop = True  # Lightning's own max_steps counts the steps of every optimizer
        self.log("loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(inputs))

    def on_train_epoch_end(self) -> None:
        """Log where the masks stand, and set the learning rate of the next epoch."""
        if self.session is not None:
            self.log_dict(self.session.status().numbers())
        if self._weights():
            groups = self.trainer.optimizers[0].param_groups
            self.log("learning_rate", groups[0]["lr"])
            rate = self._next_learning_rate()
            for group in groups:
                group["lr"] = rate

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        """Score a batch with hard masks (the model is in eval mode)."""
        inputs, targets = batch
        score = _score(self.model(inputs), targets, self.training_config.loss)
        self.log("validation_score", score, on_epoch=True, batch_size=len(inputs), sync_dist=True)

    def progress_state(self) -> dict[str, int]:
        """Return how far the training is, for a checkpoint."""
        return {"steps": self.steps, "fixed_epochs": self._fixed_epochs}

    def load_progress_state(self, state: Mapping[str, int]) -> None:
        """Go on from `progress_state`."""
        self.steps, self._fixed_epochs = state["steps"], state["fixed_epochs"]

    @property
    def settled(self) -> bool:
        """Whether a state of now could be the result, see `MaskingLoop.settled`."""
        return self._loop is None or self._loop.settled()

    def _weights(self) -> list[nn.Parameter]:
        """Return what of the network itself is trained: no gates, no scales, and nothing if the weights are frozen."""
        return own_parameters(self.model)

    def _guarded(self, loss: Tensor) -> Tensor:
        if self._loop is not None:
            return self._loop.guard(loss)
        if not bool(torch.isfinite(loss.detach())):
            raise NonFiniteLossError(f"the loss became {float(loss.detach()):g} at step {self.steps}")
        return loss

    def _next_learning_rate(self) -> float:
        """Return the rate of the weights for the epoch that follows; called once an epoch."""
        config = self.training_config
        progress = min(1.0, (self.current_epoch + 1) / (self.trainer.max_epochs or config.max_epochs))
        factor = 0.5 + 0.5 * math.cos(math.pi * progress) if config.lr_schedule == "cosine" else 1.0
        if self.session is not None and self.session.phase is Phase.FIXED:
            self._fixed_epochs += 1
        return config.optimizer.lr * factor * config.lr_decay**self._fixed_epochs


class _BestState(pl.Callback):  # type: ignore[misc]
    """Stops after some epochs without a better validation score, and gives the best state back at the end.

    Only settled states count (see `MaskedTask.settled`). The masks of all of them are in the same phase, so that a
    state, which holds logits and hard gates but no phase, says everything. Without any, the last state stays.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best = -math.inf
        self.waited = 0
        self.state: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: Any, task: MaskedTask) -> None:
        """Remember the state if it is the best one; stop if none was for too long."""
        if not task.settled:
            return
        score = float(trainer.callback_metrics["validation_score"])
        if score > self.best:
            self.best, self.waited = score, 0
            self.state = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
        else:
            self.waited += 1
            trainer.should_stop = trainer.should_stop or self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the best state and how good it is, for a checkpoint."""
        return {"best": self.best, "waited": self.waited, "state": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.best, self.waited, self.state = (state_dict[key] for key in ("best", "waited", "state"))

    def on_fit_end(self, trainer: Any, task: MaskedTask) -> None:
        """Give the best state back."""
        if self.state:
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
    logger: Any = None,
) -> None:
    """Train a model, with a session's gates if there is one.

    Args:
        model: The model; it is trained in place and left in eval mode, in its own dtype and on the CPU.
        session: A planned session on this model; it is started here.
        training: How to train.
        train: Batches of (inputs, targets).
        validation: Batches to score with hard masks after each epoch.
        max_steps: Train for this many optimizer steps instead of epochs.
        hooks: Passed to `MaskingSession.start`.
        logger: What follows the training: Lightning loggers, for instance `gumbel_plugin.runs.epoch_log.EpochLog`, and
            callbacks; one, or several.

    Raises:
        ConfigError: If the training settings contradict each other or this machine; nothing was trained.
        DataError: If a loader has no batch; nothing was trained.
        NonFiniteLossError: If the loss becomes NaN or infinite. A gated model keeps its last remembered state.
    """
    check_training(training, validation is not None)
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"max_steps is {max_steps}; it must be at least 1")
    for name, loader in (("train", train), ("validation", validation)):
        if loader is not None and len(loader) == 0:
            raise DataError(f"{name}: the loader has no batch; is its data set empty, or smaller than a batch?")
    with _quiet_lightning():
        trainer = _trainer(training, logger)
        steps_per_epoch = math.ceil(len(train) / trainer.world_size)
        total = max_steps if max_steps is not None else training.max_epochs * steps_per_epoch
        trainer.fit_loop.max_epochs = math.ceil(total / steps_per_epoch)
        loop = None if session is None else MaskingLoop(session)
        if loop is not None:
            loop.start(total, hooks=hooks)
        dtype = next(model.parameters()).dtype
        with _interruptible():
            trainer.fit(MaskedTask(model, loop, training, total), train, validation)
    if training.precision.endswith("-true"):
        model.to(dtype)  # these precisions convert the model itself
    model.eval()


def check_training(training: TrainingConfig, has_validation: bool) -> None:
    """Refuse training settings that cannot work, before anything happens.

    Raises:
        ConfigError: If there is nothing to be patient about, or Lightning cannot train like this on this machine.
    """
    if training.patience is not None and not has_validation:
        raise ConfigError(
            f"training.patience = {training.patience}: it needs validation data; set data.validation_fraction"
        )
    if training.gradient_clip is not None and training.precision in ("16", "16-mixed"):
        raise ConfigError(
            f"training.gradient_clip = {training.gradient_clip}: precision {training.precision!r} scales the gradients "
            "that it would clip; use 'bf16-mixed'"
        )
    with _quiet_lightning():
        trainer = _trainer(training, None)
    cores = os.cpu_count() or 1
    if trainer.strategy.root_device.type == "cpu" and trainer.num_devices > cores:
        raise ConfigError(
            f"training.devices = {shown(training.devices)}: that are {trainer.num_devices} processes on the CPU, which "
            f"has {cores} cores; set 1, or at most {cores}"
        )


def _trainer(training: TrainingConfig, followers: Any) -> Any:
    several = followers if isinstance(followers, Sequence) else [] if followers is None else [followers]
    best = [] if training.patience is None else [_BestState(training.patience)]
    strategy = _STRATEGIES.get(training.strategy, training.strategy)
    try:
        return pl.Trainer(
            max_epochs=training.max_epochs,
            **{key: getattr(training, key) for key in _PASSED_ON} | {"strategy": strategy},
            logger=[each for each in several if not isinstance(each, pl.Callback)] or False,
            callbacks=best + [each for each in several if isinstance(each, pl.Callback)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    except Exception as error:
        settings = ", ".join(f"{key} {getattr(training, key)!r}" for key in _PASSED_ON)
        raise ConfigError(f"training: Lightning refuses {settings}: {error}") from error


def loaders(config: RunConfig, bundle: DataBundle | None = None) -> tuple[Loader, Loader | None, Loader]:
    """Return new loaders of a configuration's data: train, validation (if a part is set aside), test.

    Args:
        config: The configuration; its seed decides the order of the training batches.
        bundle: Its data, if it is loaded already.

    Raises:
        ConfigError: If the configuration has no data section.
        DataError: If the data is not there.
    """
    bundle = bundle or load_config_data(config)
    batch_size = config.data.batch_size if config.data is not None else _EVALUATION_BATCH
    train = make_loader(bundle.train, batch_size, shuffle=True, seed=config.seed)
    test = make_loader(bundle.test, _EVALUATION_BATCH, shuffle=False, seed=config.seed)
    if bundle.validation is None:
        return train, None, test
    return train, make_loader(bundle.validation, _EVALUATION_BATCH, shuffle=False, seed=config.seed), test


def make_loss(training: TrainingConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of outputs and targets that a configuration names."""
    if training.loss == "mse":
        return nn.MSELoss()
    return nn.CrossEntropyLoss(label_smoothing=training.label_smoothing)


def load_config_data(config: RunConfig) -> DataBundle:
    """Return the data of a configuration.

    Raises:
        ConfigError: If the configuration has no data section.
        DataError: If the data is not there.
    """
    data = config.data
    if data is None:
        raise ConfigError("data: required to train from a configuration, but missing")
    return load_data(
        data.name,
        root=data.root,
        samples=data.samples,
        validation_fraction=data.validation_fraction,
        augment=data.augment,
        download=data.download,
        seed=config.seed,
    )


def evaluate(model: nn.Module, loader: Loader, loss: str = "cross_entropy") -> float:
    """Return the accuracy in percent on a loader's data, or the negative mean squared error for ``mse``; eval mode.

    Raises:
        DataError: If the loader has no data.
    """
    total = count = 0.0
    device = next(model.parameters()).device
    with observing(model):
        for inputs, targets in loader:
            total += float(_score(model(inputs.to(device)), targets.to(device), loss)) * len(inputs)
            count += len(inputs)
    if count == 0:
        raise DataError("there is no data to evaluate on: the loader is empty")
    return total / count


def _score(outputs: Tensor, targets: Tensor, loss: str) -> Tensor:
    if loss == "mse":
        return -nn.functional.mse_loss(outputs, targets)
    return (outputs.argmax(1) == targets).float().mean() * 100


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C stay a KeyboardInterrupt (Lightning turns it into an exit), and SIGTERM end in an exit code."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        if stop.code is None:  # Lightning's SIGTERMException, which the shell would take for a finished run
            raise SystemExit(128 + signal.SIGTERM) from stop
        raise
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)  # which Lightning ignores from the first one on


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


__all__ = [
    "Loader",
    "MaskedTask",
    "check_training",
    "evaluate",
    "fit",
    "load_config_data",
    "loaders",
    "make_loss",
]
