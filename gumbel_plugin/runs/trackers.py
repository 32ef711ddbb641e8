"""Where else a training's numbers go: TensorBoard, MLflow."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

from gumbel_plugin.errors import MissingExtraError

Tracker = Callable[[Mapping[str, float], int], None]
"""Told the numbers of an epoch, and its number."""


def tensorboard(folder: Path, first_epoch: int = 0) -> Tracker | None:
    """Return a tracker that writes TensorBoard's event files; None where TensorBoard is not installed.

    Args:
        folder: Where they go.
        first_epoch: Epochs from this one on that an interrupted run wrote are dropped.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=first_epoch or None)

    def track(row: Mapping[str, float], epoch: int) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return track


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

    return track
