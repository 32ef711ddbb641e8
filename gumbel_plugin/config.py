"""A run's configuration: from a YAML file, a dict or an NNI config list, checked before anything happens."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field, ValidationError, field_validator, model_validator

from gumbel_plugin.config_errors import explain
from gumbel_plugin.config_values import Section, plain
from gumbel_plugin.errors import ConfigError, shown
from gumbel_plugin.masks import method_named
from gumbel_plugin.masks.base import MaskOptions, WeightMode
from gumbel_plugin.nni_entries import flatten_entry, settings_without_effect
from gumbel_plugin.sparsity.types import granularity_of
from gumbel_plugin.storage.yaml_files import read_yaml, write_yaml

ConfigLike: TypeAlias = "str | Path | Mapping[str, Any] | PruningConfig | Sequence[Mapping[str, Any]]"


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


class OptimizerConfig(Section):
    """An optimizer and its settings."""

    name: Literal["sgd", "adam", "adamw"] = "adam"
    lr: float = Field(default=1e-3, gt=0)
    momentum: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)


class TrainingConfig(Section):
    """How a run trains; the Lightning Trainer takes accelerator, devices, strategy and precision as they are.

    Attributes:
        label_smoothing: Of the cross entropy: the probability that is spread over all classes.
        lr_decay: What the learning rate of the weights is multiplied by each epoch once the masks are fixed.
        dense_baseline: Also train the same network without gates for as many epochs, to compare with.
        patience: Stop after this many epochs without a better validation accuracy (needs validation data).
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


class LayerRule(Section):
    """One entry of an NNI config list: which layers, and how much of them may go.

    Attributes:
        sparse_ratio: The fraction to remove; None leaves it to the gates themselves.
        sparse_threshold: Without a ratio: keep a unit while P(keep) is at least this (default ½).
        granularity: NNI's words, and ``element`` and ``kernel``; ``default`` is out_channel, as in NNI.
        global_group_id: Rules with the same id share one budget.
        dependency_group_id: Layers with the same id share their gates, beyond what the graph ties anyway.
        max_sparse_ratio: No layer loses more than this fraction.
        min_sparse_ratio: No layer loses less than this fraction.
        internal_metric_block: NNI's number of blocks that lose equally many channels. Where whole channels go, the
            traced network says which leave together; else it has no meaning here (`without_effect`).
        apply_method: NNI's; learned gates multiply the weight, whatever it says (`without_effect`).
    """

    op_types: tuple[str, ...] | None = None
    op_names: tuple[str, ...] | None = None
    op_names_re: tuple[str, ...] | None = None
    exclude_op_types: tuple[str, ...] = ()
    exclude_op_names: tuple[str, ...] = ()
    exclude_op_names_re: tuple[str, ...] = ()
    target_names: tuple[str, ...] | None = None
    target_settings: dict[str, dict[str, Any]] | None = None
    sparse_ratio: float | None = Field(default=None, ge=0, lt=1)
    sparse_threshold: float | None = Field(default=None, gt=0, lt=1)
    max_sparse_ratio: float | None = Field(default=None, gt=0, le=1)
    min_sparse_ratio: float | None = Field(default=None, ge=0, lt=1)
    granularity: str | tuple[int, ...] = "default"
    global_group_id: int | str | None = None
    dependency_group_id: int | str | None = None
    internal_metric_block: int | None = Field(default=None, ge=1)
    apply_method: Literal["bypass", "mul", "add"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _merge_weight_settings(cls, values: Any) -> Any:
        """Read NNI's nested settings; ours has one maskable target, the weight."""
        return flatten_entry(values) if isinstance(values, Mapping) else values

    @field_validator("target_names")
    @classmethod
    def _only_weights(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and not (set(names) <= {"weight", "bias"} and "weight" in names):
            raise ValueError(f"target_names {shown(list(names))}: learned masks cover 'weight' and follow on 'bias'")
        return names

    @field_validator("op_names_re", "exclude_op_names_re")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for pattern in patterns or ():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # "[[a]" will mean something else one day
                    re.compile(pattern)
            except (re.error, OverflowError, RecursionError, Warning) as error:
                raise ValueError(f"{shown(pattern)} is no regular expression: {error}") from error
        return patterns

    @field_validator("granularity")
    @classmethod
    def _known(cls, word: str | tuple[int, ...]) -> str | tuple[int, ...]:
        granularity_of(word)
        return word

    @model_validator(mode="after")
    def _selects_something(self) -> LayerRule:
        if not (self.op_types or self.op_names or self.op_names_re):
            raise ValueError("an entry names its layers by op_types, op_names or op_names_re; it has none of them")
        if self.sparse_ratio is not None and self.sparse_threshold is not None:
            raise ValueError("sparse_ratio and sparse_threshold exclude each other")
        return self

    @model_validator(mode="after")
    def _limits_leave_room(self) -> LayerRule:
        low, high = self.min_sparse_ratio, self.max_sparse_ratio
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_sparse_ratio {low} is above max_sparse_ratio {high}")
        return self

    @property
    def structured(self) -> bool:
        """Whether whole output channels go, so that the dependency graph decides what goes with them."""
        return self.granularity in ("default", "out_channel")

    def without_effect(self) -> list[str]:
        """Return why settings of this entry that NNI's pruners take mean nothing here, one sentence each."""
        given = self.model_dump(exclude_none=True, include={"apply_method", "target_settings"})
        if self.internal_metric_block and not self.structured:
            given["internal_metric_block"] = self.internal_metric_block
        return settings_without_effect(given)

    def as_nni(self) -> dict[str, Any]:
        """Return the entry in words that NNI's schema accepts."""
        ours = {"target_settings", "granularity", "apply_method"}
        entry = self.model_dump(exclude_defaults=True, exclude=ours)
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in entry.items()}
        words: dict[str, Any] = {"element": [1], "kernel": [[1, 1], "back", -1]}
        granularity = self.granularity if isinstance(self.granularity, str) else list(self.granularity)
        return {**lists, "granularity": words.get(str(granularity), granularity)}


class BudgetConfig(Section):
    """How the masks are steered towards their `sparse_ratio` while they are learned.

    Attributes:
        ramp: The part of the mask learning over which the target falls from whole to its final value.
        strength: Weight of the quadratic term of the budget loss.
        multiplier_rate: How fast the Lagrange multiplier follows the violation, per step; None (the default) lets it
            come equally far however many steps the mask learning has.
    """

    ramp: float = Field(default=0.8, ge=0, le=1)
    strength: float = Field(default=1.0, gt=0)
    multiplier_rate: float | None = Field(default=None, ge=0)


class PhaseConfig(Section):
    """How the training time is divided: dense training first, then mask learning, then training with fixed masks.

    Attributes:
        dense: The fraction of the steps before the gates start to act.
        fixed: The fraction of the steps after the gates were decided.
    """

    dense: float = Field(default=0.0, ge=0, lt=1)
    fixed: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _leave_time_to_learn(self) -> PhaseConfig:
        if self.dense + self.fixed >= 1:
            raise ValueError(f"dense + fixed must stay below 1, got {self.dense} + {self.fixed}")
        return self


class PruningSection(Section):
    """What is masked, by which method, and how far.

    Attributes:
        gate_optimizer: Optimizer of the gates; None takes the method's published one where it has one, else SGD 50 with
            momentum 0.9 for frozen weights (Dupont et al. 2022), Adam 0.05 for trained ones.
        config_list: NNI's config list.
        per_rank_samples: In a distributed run, whether every process draws gates of its own; by default all draw the
            same ones.
    """

    method: str = "gumbel_softmax"
    options: dict[str, Any] = Field(default_factory=dict)
    config_list: tuple[LayerRule, ...] = ()
    weights: WeightMode = "trained"
    weight_init: Literal["keep", "kaiming_normal", "signed_constant"] = "keep"
    rescale: Literal["none", "learned", "dynamic"] = "none"
    gate_optimizer: OptimizerConfig | None = None
    scale_optimizer: OptimizerConfig = OptimizerConfig(name="sgd", lr=1e-3, momentum=0.9)
    budget: BudgetConfig = BudgetConfig()
    phases: PhaseConfig = PhaseConfig()
    per_rank_samples: bool = False

    @model_validator(mode="after")
    def _check_options(self) -> PruningSection:
        try:
            self.method_options()
        except ValidationError as error:
            raise ValueError(explain(error, method_named(self.method).Options, prefix="options.")) from error
        return self

    @model_validator(mode="after")
    def _gate_weights_or_samples(self) -> PruningSection:
        if self.rescale != "none" and method_named(self.method).per_sample:
            raise ValueError(
                f"rescale {self.rescale!r} follows gates that act on weights, but those of method {self.method!r} act "
                "on the activations of each sample; use 'none'"
            )
        return self

    @model_validator(mode="after")
    def _train_something_in_every_phase(self) -> PruningSection:
        if self.weights == "frozen" and method_named(self.method).needs_trained_weights:
            raise ValueError(
                f"weights 'frozen' leave method {self.method!r} nothing to learn: its gates are not learned apart from "
                "the weights; use 'trained'"
            )
        if self.weights == "frozen" and (self.phases.dense or self.phases.fixed):
            raise ValueError(
                f"weights 'frozen' go with phases.dense = phases.fixed = 0 (got {self.phases.dense} and "
                f"{self.phases.fixed}): without gates to learn there is nothing to train"
            )
        return self

    def method_options(self) -> MaskOptions:
        """Return the method's own options, with the defaults that go with the weight mode."""
        return method_named(self.method).Options.model_validate(self.options).for_weights(self.weights)

    def gate_optimizer_config(self) -> OptimizerConfig:
        """Return the gates' optimizer settings, the published ones where none are given."""
        if self.gate_optimizer is not None:
            return self.gate_optimizer
        published = method_named(self.method).published_optimizer
        if published is not None:
            return OptimizerConfig.model_validate(published)
        if self.weights == "frozen":
            return OptimizerConfig(name="sgd", lr=50.0, momentum=0.9)
        return OptimizerConfig(name="adam", lr=0.05)


class PruningConfig(Section):
    """A whole run: network, data, training, pruning and report."""

    pruning: PruningSection
    model: ModelConfig | None = None
    data: DataConfig | None = None
    training: TrainingConfig = TrainingConfig()
    report: ReportConfig = ReportConfig()
    example_shape: tuple[int, ...] | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)

    @classmethod
    def load(cls, config: ConfigLike) -> PruningConfig:
        """Read a configuration in any of the forms it may have.

        Args:
            config: The path of a YAML file, a dict, an NNI config list, or a `PruningConfig` (returned as it is).

        Raises:
            ConfigError: If a key is unknown or a value breaks a rule; it names the key, the value and the rule.
        """
        if isinstance(config, PruningConfig):
            return config
        if isinstance(config, str | Path):
            return cls.load(read_yaml(Path(config)))
        if isinstance(config, bytes | bytearray | memoryview) or not isinstance(config, Mapping | Sequence):
            raise ConfigError(
                f"config is a {type(config).__name__}; it must be a YAML file's path, a dict, an NNI config list or a "
                "PruningConfig"
            )
        values = plain({"pruning": {"config_list": config}} if isinstance(config, Sequence) else config)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from error

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML that `load` reads back to an equal one."""
        return write_yaml(self.model_dump(mode="json", exclude_none=True))
