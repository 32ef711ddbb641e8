"""Where else a training's numbers go: TensorBoard, MLflow."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gumbel_plugin.errors import MissingExtraError, shown

_logger = logging.getLogger(__name__)

Tracker = Callable[[Mapping[str, float], int], None]
"""Called with the numbers of an epoch, and its number."""


def tensorboard(folder: Path, first_epoch: int = 0) -> Tracker | None:
    """Return a tracker that writes TensorBoard's event files; None where TensorBoard is not installed.

    Args:
        folder: Where they go.
        first_epoch: Epochs from this one on that an interrupted run wrote are dropped.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
    from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
    from torch.utils.tensorboard.summary import scalar

    path = folder / f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"

    def write(*events: Any) -> None:
        # SummaryWriter writes in a thread, which ends in a traceback of its own when the disk is full.
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            for event in events:
                RecordWriter(file).write(event.SerializeToString())

    def track(row: Mapping[str, float], epoch: int) -> None:
        if not path.exists():
            heading = [Event(wall_time=time.time(), step=first_epoch, file_version="brain.Event:2")]
            if first_epoch:
                restart = SessionLog(status=SessionLog.START)
                heading.append(Event(wall_time=time.time(), step=first_epoch, session_log=restart))
            write(*heading)
        for name, value in row.items():
            summary = scalar(name, value)  # type: ignore[no-untyped-call]
            write(Event(wall_time=time.time(), step=epoch, summary=summary))

    return _expendable(track, f"TensorBoard ({folder})")


def _expendable(track: Tracker, name: str) -> Tracker:
    """Let a tracker fail without the training, which goes on without it after one warning."""
    failed = False

    def track_if_it_can(row: Mapping[str, float], epoch: int) -> None:
        nonlocal failed
        if failed:
            return
        try:
            track(row, epoch)
        except Exception as error:  # a full disk, a server that is down: the log has the numbers too
            failed = True
            _logger.warning(
                "%s gets no epochs from %d on, the training goes on without it: %s", name, epoch, shown(error)
            )

    return track_if_it_can


def check_mlflow(uri: str | None) -> None:
    """Refuse a tracking URI where MLflow is not installed, before anything is trained.

    Raises:
        MissingExtraError: If so.
    """
    if uri is not None and importlib.util.find_spec("mlflow") is None:
        raise MissingExtraError("mlflow", "mlflow")


def mlflow(uri: str, run_name: str) -> Tracker:
    """Return a tracker that logs to an MLflow server or folder.

    Args:
        uri: MLflow's tracking URI.
        run_name: What the run is called there; a resumed run goes on under the same name.

    Raises:
        MissingExtraError: If MLflow is not installed.
    """
    check_mlflow(uri)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("gumbel-plugin")
    experiment = found.experiment_id if found else client.create_experiment("gumbel-plugin")
    run = client.create_run(experiment, run_name=run_name)

    def track(row: Mapping[str, float], epoch: int) -> None:
        for name, value in row.items():
            client.log_metric(run.info.run_id, name, value, step=epoch)

    return _expendable(track, f"MLflow ({uri})")
