"""What is pruned, how far and by which method: from YAML, a dict or an NNI config list, checked at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from gumbel_plugin.config_errors import explain
from gumbel_plugin.config_list import LayerRule, checked_patterns
from gumbel_plugin.config_values import Section, plain
from gumbel_plugin.errors import ConfigError, shown
from gumbel_plugin.masks import method_named
from gumbel_plugin.masks.base import MaskOptions, WeightMode
from gumbel_plugin.masks.per_sample import PerSample
from gumbel_plugin.sparsity.controller import BudgetConfig
from gumbel_plugin.storage.yaml_files import read_yaml, write_yaml

ConfigLike: TypeAlias = "str | Path | Mapping[str, Any] | PruningConfig | Sequence[Mapping[str, Any]]"


class OptimizerConfig(Section):
    """An optimizer and its settings."""

    name: Literal["sgd", "adam", "adamw"] = "adam"
    lr: float = Field(default=1e-3, gt=0)
    momentum: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)


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


class GatesConfig(Section):
    """Where the latents of the gates start.

    A latent is ``strength`` times its unit's score, standardized over the units that share a budget. Weights are read
    when the mask learning begins, that is, after a dense phase.

    Attributes:
        prior: How the units are scored: ``magnitude``, the root mean square of the weights that compute a unit (|w| of
            a single weight); ``group_norm``, the norm of all weights that leave with it, compared within its group only
            (DepGraph's); ``bn_scale``, |γ| of its batch norms; ``taylor``, √Σ(∂L/∂gate)² over `warmup` steps.
            ``none``: all start alike.
        strength: The standard deviation of the latents, in units of the noise of their samples.
        warmup: For how many steps of the training ``taylor`` leaves all gates open and collects their gradients; at
            most a fifth of the time that there is to learn in. A dense phase of as many steps serves for it.
    """

    prior: Literal["none", "magnitude", "group_norm", "bn_scale", "taylor"] = "none"
    strength: float = Field(default=2.0, gt=0)
    warmup: int = Field(default=10, ge=1)


class DistillationConfig(Section):
    """How much is learned from a teacher, beside the task.

    The loss is (1 - logits)·task + logits·d(outputs) + hidden·Σ mean‖h_S - h_T‖² / mean‖h_T‖², the sum over the layers,
    where d is T²·KL(p_T‖p_S) at the temperature T (Hinton et al. 2015), or what ``loss`` names.

    Attributes:
        teacher: ``dense``, the network as it was before its gates; or the path of a file of weights for it: what
            `save_pruned` wrote, other safetensors, or a state dict that ``torch.save`` wrote.
        logits: The weight of the outputs, and what the task's loss loses.
        hidden: The weight of the layers' outputs.
        temperature: Of the softmax that ``kl`` compares.
        loss: How outputs are compared: ``kl`` for logits of classes; ``mse`` or ``cosine`` for any others.
        layers: Which layers' outputs are compared: names, or regular expressions of whole names.
    """

    teacher: str = "dense"
    logits: float = Field(default=0.5, ge=0, le=1)
    hidden: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=2.0, gt=0)
    loss: Literal["kl", "mse", "cosine"] = "kl"
    layers: tuple[str, ...] = ()

    @field_validator("layers")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return checked_patterns(patterns)

    @model_validator(mode="after")
    def _layers_and_weight_go_together(self) -> DistillationConfig:
        if bool(self.layers) != bool(self.hidden):
            missing = "names no layers" if self.hidden else "its weight, hidden, is 0"
            raise ValueError(f"hidden {self.hidden} with layers {shown(list(self.layers))}: {missing}")
        return self

    @property
    def active(self) -> bool:
        """Whether anything is learned from the teacher."""
        return self.logits > 0 or self.hidden > 0


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
    gates: GatesConfig = GatesConfig()
    per_rank_samples: bool = False

    @model_validator(mode="after")
    def _check_options(self) -> PruningSection:
        try:
            self.method_options()
        except ValidationError as error:
            raise ValueError(explain(error, method_named(self.method).Options, prefix="options.")) from error
        return self

    @model_validator(mode="after")
    def _method_can_do_it(self) -> PruningSection:
        method = method_named(self.method)
        if self.rescale != "none" and issubclass(method, PerSample):
            raise ValueError(
                f"rescale {self.rescale!r} follows gates that act on weights, but those of method {self.method!r} act "
                "on the activations of each sample; use 'none'"
            )
        if self.weights == "frozen" and method.needs_trained_weights:
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
    """What is pruned, how far and by which method; the other sections of a run's file are kept as they are.

    Attributes:
        example_shape: The shape of inputs to trace the network with.
        distillation: What is learned from a teacher beside the task; None learns from the task alone.
        seed: Seeds initial weights and the masks' noise.
        model: Of a run, as the next three (`gumbel_plugin.runs.run_config.RunConfig` reads them).
    """

    pruning: PruningSection
    distillation: DistillationConfig | None = None
    example_shape: tuple[int, ...] | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    model: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    report: dict[str, Any] | None = None

    @classmethod
    def load(cls, config: ConfigLike) -> Self:
        """Read a configuration in any of the forms it may have.

        Args:
            config: The path of a YAML file, a dict, an NNI config list, or a `PruningConfig` (returned as it is).

        Raises:
            ConfigError: If a key is unknown or a value breaks a rule; it names the key, the value and the rule.
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, PruningConfig):
            config = config.model_dump(exclude_unset=True)
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
