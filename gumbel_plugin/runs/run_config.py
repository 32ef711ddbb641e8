"""A run's configuration: what is pruned, and the network, the data, the training and the report around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gumbel_plugin.config import OptimizerConfig, PruningConfig
from gumbel_plugin.config_values import Section


class ModelConfig(Section):
    """Which network: a name known to `gumbel_plugin.runs.models`, or ``package.module:factory``."""

    name: str
    num_classes: int | None = None
    in_channels: int | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _are_no_keys_of_the_section(cls, options: dict[str, Any]) -> dict[str, Any]:
        twice = sorted({"name", "num_classes", "in_channels"} & options.keys())
        if twice:
            raise ValueError(f"{', '.join(twice)} stand beside options, not among them")
        return options


class DataConfig(Section):
    """Which data set, known to `gumbel_plugin.runs.data` or ``package.module:factory``, and how it is fed.

    Attributes:
        samples: How many training images to use, drawn at random with the run's seed; None takes all.
    """

    name: str
    root: Path | None = None
    samples: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=64, ge=1)
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    augment: bool = False
    download: bool = False


class TrainingConfig(Section):
    """How a run trains; the Lightning Trainer takes accelerator, devices, strategy and precision as they are.

    Attributes:
        label_smoothing: Of the cross entropy: the probability that is spread over all classes.
        lr_decay: What the learning rate of the weights is multiplied by each epoch once the masks are fixed.
        dense_baseline: Also train the same network without gates for as many epochs, to compare with.
        patience: Stop after this many epochs without a better validation accuracy (needs validation data).
        recalibrate: From how many training batches the statistics of batch norms are estimated anew once the masks are
            decided; 0 leaves them.
    """

    max_epochs: int = Field(default=10, ge=1)
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_schedule: Literal["constant", "cosine"] = "constant"
    lr_decay: float = Field(default=1.0, gt=0, le=1)
    gradient_clip: float | None = Field(default=None, gt=0)
    accelerator: str = "auto"
    devices: int | str = 1
    strategy: str = "auto"
    precision: str = "32-true"
    dense_baseline: bool = False
    patience: int | None = Field(default=None, ge=1)
    recalibrate: int = Field(default=200, ge=0)

    @model_validator(mode="after")
    def _smooths_classes_only(self) -> TrainingConfig:
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(
                f"label_smoothing {self.label_smoothing} is for the loss 'cross_entropy', not {self.loss!r}"
            )
        return self


class ReportConfig(Section):
    """What a run measures and writes beside its result.

    Attributes:
        html: Write ``report.html`` (needs the extra ``report``).
        latency_batches: Batch sizes at which the networks are timed; none, no timing.
        latency_seconds: How long each is timed, at least.
        tensorboard: Write TensorBoard's event files, where TensorBoard is installed.
        mlflow: MLflow's tracking URI, to log there too (needs the extra ``mlflow``).
    """

    html: bool = True
    latency_batches: tuple[int, ...] = (1, 8, 64)
    latency_seconds: float = Field(default=0.2, gt=0)
    tensorboard: bool = True
    mlflow: str | None = None

    @field_validator("latency_batches")
    @classmethod
    def _are_sizes(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if any(size < 1 for size in sizes):
            raise ValueError("a batch has at least one sample")
        return sizes


class RunConfig(PruningConfig):
    """A whole run: what is pruned, and what is trained on which data, and reported.

    The sections that `PruningConfig` keeps unread are read here, which is why their types change.
    """

    model: ModelConfig | None = None  # type: ignore[assignment]
    data: DataConfig | None = None  # type: ignore[assignment]
    training: TrainingConfig = TrainingConfig()  # type: ignore[assignment]
    report: ReportConfig = ReportConfig()  # type: ignore[assignment]
