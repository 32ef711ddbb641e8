"""What a killed training needs to go on as if nothing had happened."""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gumbel_plugin.errors import DataError, MissingExtraError, shown
from gumbel_plugin.layers.weights import own_state
from gumbel_plugin.storage.files import check_readable, write_bytes
from gumbel_plugin.storage.tensor_file import require_digest, torch_content
from gumbel_plugin.training.bank import joined_state

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise MissingExtraError("lightning", "lightning") from error

FORMAT = 3
_OLD_FORMAT = 2
"""Of files without a digest."""
_KIND = "checkpoint"
_KEYS = {"format", "torch", "epoch", "seconds", "model", "session", "optimizers", "task", "callbacks"}
_KEYS |= {"random", "loaders"}


class Checkpoint(pl.Callback):  # type: ignore[misc]
    """Writes the state of a training at the start of every epoch but the first, and puts one back.

    The start of an epoch is a moment at which nothing is under way: the epoch before is logged, and the loaders have
    not drawn the next order. A training that is killed repeats the epoch that it was in. On one CPU the result is the
    same to the last bit; on several processes every one gets the random state of the first.

    Args:
        path: The file.
        state: What `read_checkpoint` returned, to go on from; None to start anew.

    Attributes:
        epochs: How many epochs were finished in the state.
        seconds: How long the training had taken then.
    """

    def __init__(self, path: Path, state: Mapping[str, Any] | None = None) -> None:
        self._path = path
        self._state = state
        self.epochs: int = state["epoch"] if state else 0
        self.seconds: float = state["seconds"] if state else 0.0
        self._began = time.perf_counter()

    def setup(self, trainer: Any, task: Any, stage: str) -> None:
        """Let Lightning count on from the epochs that are done."""
        if self._state is not None and self.epochs >= trainer.max_epochs > 0:
            raise self._unfit(f"it was made after {self.epochs} epochs, the training has {trainer.max_epochs}")
        current = trainer.fit_loop.epoch_progress.current
        current.ready = current.started = current.processed = current.completed = self.epochs

    def on_train_epoch_start(self, trainer: Any, task: Any) -> None:
        """Put the state back, if there is one; then write one."""
        if self._state is not None:
            try:
                self._restore(trainer, task, self._state)
            except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                raise self._unfit(str(error).partition("\n")[0]) from error
            self._state = None
        elif trainer.current_epoch > 0 and trainer.is_global_zero:
            write_checkpoint(self._path, self._collect(trainer, task))

    def _collect(self, trainer: Any, task: Any) -> dict[str, Any]:
        weights = own_state(task.model)
        return {
            "format": FORMAT,
            "torch": str(torch.__version__),
            "epoch": trainer.current_epoch,
            "seconds": self.seconds + time.perf_counter() - self._began,
            "model": weights,
            "session": None if task.session is None else task.session.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "task": task.progress_state(),
            "callbacks": {callback.state_key: callback.state_dict() for callback in trainer.callbacks},
            "random": _random_state(),
            "loaders": [generator.get_state() for generator in _generators(trainer)],
        }

    def _restore(self, trainer: Any, task: Any, state: Mapping[str, Any]) -> None:
        own = set(own_state(task.model))
        if own != set(state["model"]):
            raise ValueError(f"{shown(min(own ^ set(state['model'])))} is a weight of only one of them")
        if (task.session is None) != (state["session"] is None):
            raise ValueError("one of them is of the training with gates, the other one of the dense training")
        task.model.load_state_dict(state["model"], strict=False)  # the gates' part is the session's
        if task.session is not None:
            task.session.load_state_dict(state["session"])
        for optimizer, own in zip(trainer.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(joined_state(optimizer, own))
        task.load_progress_state(state["task"])
        for callback in trainer.callbacks:  # a run at a terminal has a progress bar, its resumption perhaps not
            if state["callbacks"].get(callback.state_key):
                callback.load_state_dict(state["callbacks"][callback.state_key])
        for generator, own in zip(_generators(trainer), state["loaders"], strict=True):
            generator.set_state(own)
        _set_random_state(state["random"])

    def _unfit(self, reason: str) -> DataError:
        return DataError(f"checkpoint {self._path} is not of this training: {reason}; delete it to start anew")


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state behind a line that holds its digest; the file appears whole or not at all.

    Raises:
        ConfigError: If the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    write_bytes(path, _first_line(content) + content)


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint without unpickling objects; None if there is no file, so that a training starts anew.

    Raises:
        DataError: If the file is damaged, no checkpoint, or another version wrote it.
    """
    if not os.path.lexists(path):
        return None
    check_readable(path, _KIND)
    try:
        file = path.read_bytes()
    except OSError as error:
        raise DataError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    first, _, content = file.partition(b"\n")
    old = file.startswith(b"PK")  # the archive itself, as torch.save writes it
    if not old and first + b"\n" != _first_line(content):
        raise DataError(
            f"checkpoint {path} cannot be read: its digest does not fit its content, it was damaged; without it the "
            "run starts anew"
        )
    state = torch_content(file if old else content, path, _KIND)
    if not isinstance(state, dict) or state.get("format") != (_OLD_FORMAT if old else FORMAT):
        raise DataError(f"checkpoint {path} was written by another version of gumbel-plugin; delete it to start anew")
    if set(state) != _KEYS or type(state["epoch"]) is not int or type(state["seconds"]) is not float:
        raise DataError(f"checkpoint {path} lacks a part of a training's state; delete it to start anew")
    require_digest(path, _KIND, not old, old=old)
    return state


def _first_line(content: bytes) -> bytes:
    return f"gumbel-plugin checkpoint {FORMAT}, sha256 {sha256(content).hexdigest()}\n".encode()


def _generators(trainer: Any) -> Iterator[torch.Generator]:
    loaders = [trainer.train_dataloader, *_as_list(trainer.val_dataloaders)]
    return (loader.generator for loader in loaders if getattr(loader, "generator", None) is not None)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
