"""A whole run from a configuration: train with gates, extract, shrink, prove, measure, write."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError, DataError, MissingExtraError, OutputError
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.graph.dependency_groups import find_groups
from gumbel_plugin.insight.profile import Profile, profile
from gumbel_plugin.insight.widths import LayerWidth, layer_widths
from gumbel_plugin.layers.example_inputs import call_model, observing
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.runs import folder as files
from gumbel_plugin.runs import result_files, trackers
from gumbel_plugin.runs.checkpoint import Checkpoint, read_checkpoint
from gumbel_plugin.runs.data import DataBundle
from gumbel_plugin.runs.epoch_log import EpochLog, other_rank
from gumbel_plugin.runs.gate_log import GateLog
from gumbel_plugin.runs.lock import locked
from gumbel_plugin.runs.models import build_model
from gumbel_plugin.runs.provenance import provenance
from gumbel_plugin.runs.recalibrated import Recalibration, recalibrate_and_compare
from gumbel_plugin.runs.reporting import write_report
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.runs.train import check_training, evaluate, fit, load_config_data, loaders
from gumbel_plugin.shrinking.equivalence import EquivalenceReport, verify_equivalence
from gumbel_plugin.shrinking.mask_file import save_masks
from gumbel_plugin.shrinking.pruned_file import save_pruned
from gumbel_plugin.shrinking.shrink import masked_copy, remove_dead_units
from gumbel_plugin.sparsity.cost_model import count_cost
from gumbel_plugin.storage.mask_format import Masks
from gumbel_plugin.training.agreement import Agreement, has_sample_gates, measure_agreement, set_consensus_from
from gumbel_plugin.training.distillation import DistillationLike, distillation_of
from gumbel_plugin.training.session import MaskingSession

_logger = logging.getLogger(__name__)
_CHECKPOINTS = {"dense": "checkpoint_dense.pt", "gated": "checkpoint.pt"}


@dataclass(frozen=True)
class NetworkMetrics:
    """One network of the result's table.

    Attributes:
        profile: What it costs.
        score: Test accuracy in percent (or the negative error for regression); None if it was not trained.
    """

    profile: Profile
    score: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**self.profile.as_dict(), "score": self.score}


@dataclass(frozen=True)
class RunResult:
    """What a run found.

    Attributes:
        columns: ``dense``, ``masked`` and ``small``.
        equivalence: The proof that the small network equals the masked one.
        sparsity: The fraction of gated weights that was closed.
        training_seconds: How long the training with gates took.
        layers: How wide every layer was, and is.
        small: The small network.
        output: Where everything was written, if anywhere.
        report: The report's page, if one was written.
        agreement: How far held-out samples agreed with the decided gates, where each had gates of its own.
        recalibration: What new statistics of the batch norms changed, where there are such.
    """

    columns: dict[str, NetworkMetrics]
    equivalence: EquivalenceReport
    sparsity: float
    training_seconds: float
    layers: list[LayerWidth]
    small: nn.Module
    output: Path | None
    report: Path | None = None
    agreement: Agreement | None = None
    recalibration: Recalibration | None = None

    def summary(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "format": result_files.FORMAT,
            "columns": {name: column.as_dict() for name, column in self.columns.items()},
            "equivalence": self.equivalence.as_dict(),
            "sparsity": self.sparsity,
            "training_seconds": self.training_seconds,
            "agreement": None if self.agreement is None else self.agreement.as_dict(),
            "recalibration": None if self.recalibration is None else asdict(self.recalibration),
            "layers": [layer.as_dict() for layer in self.layers],
            **provenance(),
        }


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs, checked: nothing has been trained or written yet.

    Attributes:
        config: The resolved configuration.
        data: The data, loaded.
        model: The network, freshly initialized.
        session: The session that will learn the masks, not started.
        example: Two test inputs, to trace with.
    """

    config: RunConfig
    data: DataBundle
    model: nn.Module
    groups: list[ChannelGroup]
    session: MaskingSession
    example: Tensor


def prepare(config: RunConfig, distillation: DistillationLike = None) -> Prepared:
    """Build and check everything that a run needs.

    Args:
        config: The whole run.
        distillation: See `run`.

    Raises:
        GumbelPluginError: Whatever is wrong with the configuration, the data or the network.
    """
    if config.model is None:
        raise ConfigError("model: required for a run, but missing")
    data = load_config_data(config)
    _check_sizes(data)
    check_training(config.training, data.validation is not None)
    torch.manual_seed(config.seed)
    model = build_model(config.model.name, config.model.num_classes, config.model.in_channels, **config.model.options)
    example = torch.stack([data.test[index][0] for index in range(2)])
    groups = find_groups(model, example)  # even where no channel goes: what cannot be traced could not be shrunk later
    _check_outputs(config, data, model, example)
    learned = distillation_of(distillation, config)
    session = MaskingSession(model, config.pruning, groups, config.seed, example_inputs=example, distillation=learned)
    return Prepared(config, data, model, groups, session, example)


def run(
    config: RunConfig,
    output: Path | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    log: Callable[[str], None] = _logger.info,
    followers: Sequence[Any] = (),
    distillation: DistillationLike = None,
) -> RunResult:
    """Train with learned masks, shrink, prove and measure.

    The result depends on the configuration and its seed only; training the dense baseline too does not change it, nor
    does being killed and resumed.

    Args:
        config: The whole run.
        output: Folder for the resolved configuration, logs, checkpoints, masks, small network, summary and report;
            nothing is written without it.
        force: Whether to replace a finished run in that folder.
        resume: Whether to go on with the run in that folder that was interrupted.
        log: Called with what the run does, a line at a time.
        followers: Lightning callbacks and loggers that follow the trainings, for instance a progress bar.
        distillation: What is learned from a teacher, instead of what the configuration says; a resumed run must get the
            same. A ``dense`` teacher is the dense network that was trained, with ``training.dense_baseline``.

    Raises:
        ConfigError: If the configuration is wrong, or the folder holds a finished run, cannot be written, is in use by
            another process or belongs to another configuration than the resumed one. Nothing was trained.
        GumbelPluginError: If the data or the network is wrong. Nothing was trained or written.
        NonFiniteLossError: If the loss becomes NaN or infinite.
        OutputError: If the folder cannot be written any more. The run can be resumed once it can.
        EquivalenceError: If the small network is not equal to the masked one; everything was written by then.
    """
    if other_rank():  # it computes along in a distributed run, and leaves writing and talking to the first process
        output, log = None, _logger.debug
    if output is not None:
        files.check_state(output, config, force=force, resume=resume)
    prepared = prepare(config, distillation)
    trackers.check_mlflow(config.report.mlflow)
    if output is None:
        return _run(prepared, None, log, followers)
    with _opened(output, prepared, force=force, resume=resume):
        return _run(prepared, output, log, followers)


@contextmanager
def _opened(output: Path, prepared: Prepared, *, force: bool, resume: bool) -> Iterator[None]:
    """Hold a folder that can take the results, and clear it of older ones; a resumed run keeps its own."""
    files.check_space(output, 8 * sum(p.numel() * p.element_size() for p in prepared.model.parameters()))
    files.make_dir(output)
    with locked(output):
        files.check_state(output, prepared.config, force=force, resume=resume)  # it may have changed meanwhile
        kept = (files.LOG, files.GATES, *_CHECKPOINTS.values()) if resume else ()
        files.create_run_dir(output, prepared.config, kept, _CHECKPOINTS.values())
        try:
            yield
        except OutputError as error:
            raise OutputError(f"{error}; when that is mended, gumbel-prune run --resume {output} goes on") from error


def _run(prepared: Prepared, output: Path | None, log: Callable[[str], None], followers: Sequence[Any]) -> RunResult:
    """Do what `run` describes, once everything is checked."""
    config = prepared.config
    trainer = _Trainer(prepared, output, log, followers)
    dense = copy.deepcopy(prepared.model)
    if config.training.dense_baseline:
        log("training the dense network")
        trainer.train(dense, None)
        prepared.session.distillation.replace_dense(dense)
    elif prepared.session.distillation.learns_from_dense and not config.pruning.phases.dense:
        log(
            "the teacher is the network as it was built: if its weights are fresh it has nothing to teach; set "
            "training.dense_baseline, pruning.phases.dense or distillation.teacher"
        )
    log("training with gates")
    seconds = trainer.train(prepared.model, prepared.session)
    agreement = _agreement(prepared)
    masks = prepared.session.extract()
    sparsity = prepared.session.status().sparsity
    prepared.session.detach()
    recalibration = recalibrate_and_compare(prepared.model, config, prepared.data, log)
    log("shrinking and measuring")
    masked = masked_copy(prepared.model, masks)
    small = remove_dead_units(masked, prepared.example)
    report = verify_equivalence(masked, small, prepared.example)
    columns = _measure(prepared, {"dense": dense, "masked": masked, "small": small})
    result = RunResult(
        columns,
        report,
        sparsity,
        seconds,
        layer_widths(dense, small),
        small,
        output,
        agreement=agreement,
        recalibration=recalibration,
    )
    if output is not None:
        result = _write(output, masks, result, prepared, log)
    report.raise_for_failure()
    return result


def _check_sizes(data: DataBundle) -> None:
    """Refuse data with a part that is too small to train with, or to trace the network with."""
    for name, part, least in (("train", data.train, 1), ("validation", data.validation, 1), ("test", data.test, 2)):
        size = least if part is None else len(part)  # type: ignore[arg-type]  # torch's Dataset does not declare it
        if size < least:
            raise DataError(f"data: the {name} part has {size} samples; it needs at least {least}")


def _check_outputs(config: RunConfig, data: DataBundle, model: nn.Module, example: Tensor) -> None:
    """Refuse a network or a loss that does not fit the data's targets."""
    if data.is_regression != (config.training.loss == "mse"):
        kind, fitting = ("numbers", "mse") if data.is_regression else ("classes", "cross_entropy")
        raise ConfigError(f"training.loss = {config.training.loss!r}: the data's targets are {kind}; use {fitting!r}")
    with observing(model):
        outputs = call_model(model, example)
    expected = (len(example), data.num_classes)
    found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if found != expected:
        raise ConfigError(f"model: its output for two inputs is {found}, the data needs {expected}: set num_classes")


@dataclass(frozen=True)
class _Trainer:
    """Trains the networks of one run, each from the same random numbers, whatever was trained before."""

    prepared: Prepared
    output: Path | None
    log: Callable[[str], None]
    followers: Sequence[Any]

    def train(self, model: nn.Module, session: MaskingSession | None) -> float:
        """Train a network, from its checkpoint if there is one; return how many seconds that took, all in all."""
        config = self.prepared.config
        train, validation, _ = loaders(config, self.prepared.data)
        log, callbacks, before = self._followers(session)
        torch.manual_seed(config.seed)
        began = time.perf_counter()
        fit(model, session, config.training, train, validation, logger=[log, *callbacks, *self.followers])
        return before + time.perf_counter() - began

    def _followers(self, session: MaskingSession | None) -> tuple[EpochLog, list[Any], float]:
        """Return the log, the callbacks, and how many seconds the training took before it was interrupted."""
        epochs = self.prepared.config.training.max_epochs
        if self.output is None:
            return (
                EpochLog(epochs, None, self.log),
                [GateLog(session, None, self._macs(session))] if session else [],
                0.0,
            )
        path = self.output / _CHECKPOINTS["gated" if session else "dense"]
        checkpoint = Checkpoint(path, read_checkpoint(path))
        if checkpoint.epochs:
            self.log(f"going on after epoch {checkpoint.epochs}")
        if session is None:
            return EpochLog(epochs, None, self.log), [checkpoint], checkpoint.seconds
        log = EpochLog(
            epochs,
            self.output / files.LOG,
            self.log,
            trackers=self._trackers(self.output, checkpoint.epochs),
            finished=checkpoint.epochs,
        )
        files.truncate_gate_log(self.output / files.GATES, checkpoint.epochs)
        gates = GateLog(session, self.output / files.GATES, self._macs(session))
        return log, [gates, checkpoint], checkpoint.seconds

    def _trackers(self, output: Path, epochs: int) -> list[trackers.Tracker]:
        report, found = self.prepared.config.report, []
        if report.tensorboard and (tracker := trackers.tensorboard(output / "tensorboard", epochs)):
            found.append(tracker)
        if report.mlflow is not None:
            found.append(trackers.mlflow(report.mlflow, output.resolve().name))
        return found

    def _macs(self, session: MaskingSession) -> Callable[[dict[str, Tensor]], Tensor] | None:
        """Return what computes the MACs that channel gates leave; None where no channel goes."""
        groups = session.plan.groups
        if not groups:
            return None
        model, example = self.prepared.model, self.prepared.example
        cost = count_cost(model, groups, example, "macs")
        return lambda gates: cost({name: gates[name] for name in groups})


def _agreement(prepared: Prepared) -> Agreement | None:
    """Fix gates that belong to samples at their consensus over the training data, and ask held-out samples."""
    session = prepared.session
    if not has_sample_gates(session):
        return None
    train, validation, test = loaders(prepared.config, prepared.data)
    if session.phase is not Phase.FIXED:
        set_consensus_from(session, (inputs for inputs, _ in train))
    return measure_agreement(session, (inputs for inputs, _ in validation or test))


def _measure(prepared: Prepared, networks: dict[str, nn.Module]) -> dict[str, NetworkMetrics]:
    config = prepared.config
    test = loaders(config, prepared.data)[2]
    columns = {}
    measure = partial(profile, batch_sizes=config.report.latency_batches, min_run_time=config.report.latency_seconds)
    for name, network in networks.items():
        trained = name != "dense" or config.training.dense_baseline
        score = evaluate(network, test, config.training.loss) if trained else None
        columns[name] = NetworkMetrics(measure(network, prepared.example), score)
    return columns


def _write(output: Path, masks: Masks, result: RunResult, prepared: Prepared, log: Callable[[str], None]) -> RunResult:
    """Write the result and its report; return it with the report's place."""
    model = prepared.config.model
    save_masks(output / files.MASKS, masks, model.name if model is not None else "")
    save_pruned(output / files.SMALL, result.small, input_shape=list(prepared.example.shape[1:]))
    result_files.write_summary(output / files.SUMMARY, result.summary())  # last: it marks the run as finished
    for name in _CHECKPOINTS.values():
        (output / name).unlink(missing_ok=True)
    if not prepared.config.report.html:
        return result
    try:
        return replace(result, report=write_report(output))
    except MissingExtraError as error:
        log(f"no report.html: {error}")
        return result
