"""A whole run from a configuration: train with gates, extract, shrink, prove, measure, write."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from gumbel_plugin.config import PruningConfig
from gumbel_plugin.errors import ConfigError, MissingExtraError
from gumbel_plugin.insight.profile import Profile, profile
from gumbel_plugin.learning.session import MaskingSession, Masks
from gumbel_plugin.masks.targets import ChannelGroup
from gumbel_plugin.runs.data import DataBundle
from gumbel_plugin.runs.epoch_log import EpochLog, other_rank
from gumbel_plugin.runs.models import build_model
from gumbel_plugin.runs.train import check_training, evaluate, fit, load_config_data, loaders
from gumbel_plugin.shrinking.equivalence import EquivalenceReport, verify_equivalence
from gumbel_plugin.shrinking.inputs import call_model, observing
from gumbel_plugin.shrinking.mask_file import save_masks
from gumbel_plugin.shrinking.shrink import masked_copy, remove_dead_units

_logger = logging.getLogger(__name__)
_SUMMARY, _MASKS, _SMALL, _LOG = "summary.json", "masks.safetensors", "small.safetensors", "log.csv"


@dataclass(frozen=True)
class Column:
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
        small: The small network.
        output: Where everything was written, if anywhere.
    """

    columns: dict[str, Column]
    equivalence: EquivalenceReport
    sparsity: float
    training_seconds: float
    small: nn.Module
    output: Path | None

    def summary(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "columns": {name: column.as_dict() for name, column in self.columns.items()},
            "equivalence": self.equivalence.as_dict(),
            "sparsity": self.sparsity,
            "training_seconds": self.training_seconds,
            "versions": library_versions(),
        }


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs, checked: nothing has been trained or written yet.

    Attributes:
        config: The resolved configuration.
        data: The data, loaded.
        model: The network, freshly initialised.
        session: The session that will learn the masks, not started.
        example: Two test inputs, to trace with.
    """

    config: PruningConfig
    data: DataBundle
    model: nn.Module
    groups: list[ChannelGroup]
    session: MaskingSession
    example: Tensor


def prepare(config: PruningConfig) -> Prepared:
    """Build and check everything that a run needs.

    Raises:
        GumbelPluginError: Whatever is wrong with the configuration, the data or the network.
    """
    if config.model is None:
        raise ConfigError("model: required for a run, but missing")
    data = load_config_data(config)
    check_training(config.training, data.validation is not None)
    torch.manual_seed(config.seed)
    model = build_model(config.model.name, config.model.num_classes, config.model.in_channels, **config.model.options)
    example = torch.stack([data.test[index][0] for index in range(2)])
    try:
        from gumbel_torch_pruning.groups import find_groups
    except ImportError as error:
        raise MissingExtraError("torch-pruning", "torch-pruning") from error
    groups = find_groups(model, example)  # even where no channel goes: what cannot be traced could not be shrunk later
    _check_outputs(config, data, model, example)
    session = MaskingSession(model, config.pruning, groups, config.seed)
    return Prepared(config, data, model, groups, session, example)


def run(
    config: PruningConfig,
    output: Path | None = None,
    *,
    force: bool = False,
    say: Callable[[str], None] = _logger.info,
) -> RunResult:
    """Train with learnt masks, shrink, prove and measure.

    The result depends on the configuration and its seed only; training the dense baseline too does not change it.

    Args:
        config: The whole run.
        output: Folder for the resolved configuration, the training log, masks, small network and summary; nothing is
            written without it.
        force: Whether to replace a finished run in that folder.
        say: Told what the run does, a line at a time.

    Raises:
        ConfigError: If the configuration is wrong, or the folder holds a finished run or cannot be written. Nothing was
            trained.
        GumbelPluginError: If the data or the network is wrong. Nothing was trained or written.
        NonFiniteLossError: If the loss becomes NaN or infinite.
        EquivalenceError: If the small network is not equal to the masked one; everything was written by then.
    """
    if other_rank():  # it computes along in a distributed run, and leaves writing and talking to the first process
        output, say = None, _logger.debug
    if output is not None:
        _refuse_finished(output, force)
    prepared = prepare(config)
    if output is not None:
        _claim(output, config)
    dense = copy.deepcopy(prepared.model)
    if config.training.dense_baseline:
        say("training the dense network")
        _train(dense, None, prepared, None, say)
    say("training with gates")
    began = time.perf_counter()
    _train(prepared.model, prepared.session, prepared, output, say)
    seconds = time.perf_counter() - began
    masks = prepared.session.extract()
    sparsity = prepared.session.status().sparsity
    prepared.session.detach()
    say("shrinking and measuring")
    masked = masked_copy(prepared.model, masks)
    small = remove_dead_units(masked, prepared.example)
    report = verify_equivalence(masked, small, prepared.example)
    columns = _measure(prepared, {"dense": dense, "masked": masked, "small": small})
    result = RunResult(columns, report, sparsity, seconds, small, output)
    if output is not None:
        _write(output, masks, result)
    report.raise_for_failure()
    return result


def _check_outputs(config: PruningConfig, data: DataBundle, model: nn.Module, example: Tensor) -> None:
    """Refuse a network or a loss that does not fit the data's targets."""
    regression = data.test[0][1].is_floating_point()
    if regression != (config.training.loss == "mse"):
        kind, fitting = ("numbers", "mse") if regression else ("classes", "cross_entropy")
        raise ConfigError(f"training.loss = {config.training.loss!r}: the data's targets are {kind}; use {fitting!r}")
    with observing(model):
        outputs = call_model(model, example)
    expected = (len(example), data.num_classes)
    found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if found != expected:
        raise ConfigError(f"model: its output for two inputs is {found}, the data needs {expected}: set num_classes")


def _train(
    model: nn.Module,
    session: MaskingSession | None,
    prepared: Prepared,
    output: Path | None,
    say: Callable[[str], None],
) -> None:
    """Train one network; the random numbers do not depend on what was trained before."""
    config = prepared.config
    train, validation, _ = loaders(config, prepared.data)
    torch.manual_seed(config.seed)
    log = EpochLog(config.training.max_epochs, None if output is None else output / _LOG, say)
    fit(model, session, config.training, train, validation, logger=log)


def _measure(prepared: Prepared, networks: dict[str, nn.Module]) -> dict[str, Column]:
    config = prepared.config
    test = loaders(config, prepared.data)[2]
    columns = {}
    for name, network in networks.items():
        trained = name != "dense" or config.training.dense_baseline
        score = evaluate(network, test, config.training.loss) if trained else None
        columns[name] = Column(profile(network, prepared.example), score)
    return columns


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("gumbel-plugin", "torch", "torchvision", "torch-pruning", "nni", "lightning"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _refuse_finished(output: Path, force: bool) -> None:
    try:
        finished = (output / _SUMMARY).exists()
    except OSError as error:
        raise ConfigError(f"output {str(output)!r} cannot be read: {error}") from error
    if finished and not force:
        raise ConfigError(f"output {str(output)!r} holds a finished run; pass --force to replace it")


def _claim(output: Path, config: PruningConfig) -> None:
    """Create the output folder without an older run's results, and note the resolved configuration in it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in (_SUMMARY, _MASKS, _SMALL, _LOG):  # the summary first: without it no run counts as finished
            (output / name).unlink(missing_ok=True)
        write_bytes(output / "config.yaml", config.to_yaml().encode())
    except OSError as error:
        raise ConfigError(f"output {str(output)!r} cannot be written: {error}") from error


def _write(output: Path, masks: Masks, result: RunResult) -> None:
    save_masks(output / _MASKS, masks)
    write_bytes(output / _SMALL, save({name: t.contiguous().clone() for name, t in result.small.state_dict().items()}))
    summary = json.dumps(_json_ready(result.summary()), indent=2, allow_nan=False)
    write_bytes(output / _SUMMARY, summary.encode())  # last: it marks the run as finished


def _json_ready(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: _json_ready(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)
