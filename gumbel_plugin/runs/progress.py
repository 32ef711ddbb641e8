"""Progress of a run: a live line at a terminal, a few plain lines in a log file, nothing with --quiet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gumbel_plugin.errors import MissingExtraError

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise MissingExtraError("lightning", "lightning") from error

Log = Callable[[str], None]


@contextmanager
def following(quiet: bool, check: Callable[[], None] | None = None) -> Iterator[tuple[Log, list[Any]]]:
    """Yield what logs a line, and the callbacks that draw progress at a terminal.

    Args:
        quiet: Whether to show nothing.
        check: Called before every line and every batch; it ends the run by an exception.
    """
    with _display(quiet) as (log, followers):
        if check is None:
            yield log, followers
        else:
            yield partial(_log_checked, check, log), [_BatchCheck(check), *followers]


@contextmanager
def _display(quiet: bool) -> Iterator[tuple[Log, list[Any]]]:
    if quiet:
        yield _ignore, []
    elif not sys.stderr.isatty():
        yield _log, []
    else:
        with _progress() as progress:
            yield lambda line: progress.console.print(line, style="dim", highlight=False), [ProgressBar(progress)]


class _BatchCheck(pl.Callback):  # type: ignore[misc]
    """Calls a function before every batch."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        """Call it."""
        self._check()

    def on_validation_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        """Call it."""
        self._check()


class ProgressBar(pl.Callback):  # type: ignore[misc]
    """One line that moves: epochs with a remaining time, loss, validation score, sparsity and MACs.

    Args:
        progress: What draws it.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: Any = None

    def on_train_start(self, trainer: Any, task: Any) -> None:
        """Show the line."""
        total = trainer.max_epochs * trainer.num_training_batches
        done = trainer.current_epoch * trainer.num_training_batches
        title = "dense" if task.session is None else "gates"
        self._task = self._progress.add_task(title, total=total, completed=done, numbers="", epochs="")

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move it."""
        epochs = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._progress.update(self._task, advance=1, numbers=_numbers(trainer.callback_metrics), epochs=epochs)

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        """Draw it now: an epoch may be shorter than the time between two drawings."""
        self._progress.refresh()

    def on_train_end(self, trainer: Any, task: Any) -> None:
        """Take it away; the lines that were logged stay."""
        self._progress.remove_task(self._task)


def _numbers(metrics: Any) -> str:
    """Return what is known of the epoch before, short."""
    parts = []
    for key, text in (
        ("loss", "loss {:.4f}"),
        ("validation_score", "validation {:.2f}"),
        ("sparsity", "sparsity {:.3f}"),
    ):
        if key in metrics:
            parts.append(text.format(float(metrics[key])))
    if "macs" in metrics:
        parts.append(f"MACs {float(metrics['macs']):,.0f}")
    return ", ".join(parts)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[epochs]}"),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _log(line: str) -> None:
    typer.secho(line, err=True, dim=True)


def _log_checked(check: Callable[[], None], log: Log, line: str) -> None:
    check()
    log(line)


def _ignore(line: str) -> None:
    pass
