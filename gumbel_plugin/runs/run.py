"""A whole run from a configuration: train with gates, extract, shrink, prove, measure, write."""

from __future__ import annotations

import copy
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gumbel_plugin.config import PruningConfig
from gumbel_plugin.errors import ConfigError, MissingExtraError
from gumbel_plugin.insight.profile import Profile, profile
from gumbel_plugin.learning.plan import needs_groups
from gumbel_plugin.learning.session import MaskingSession
from gumbel_plugin.runs.models import build_model
from gumbel_plugin.runs.train import evaluate, fit, loaders
from gumbel_plugin.shrinking.equivalence import EquivalenceReport, verify_equivalence
from gumbel_plugin.shrinking.mask_file import save_masks
from gumbel_plugin.shrinking.shrink import masked_copy, remove_dead_units

_logger = logging.getLogger(__name__)
_SUMMARY = "summary.json"


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
    """Everything a run needs, checked: nothing has been trained or written yet."""

    config: PruningConfig
    model: nn.Module
    session: MaskingSession
    example: Tensor


def prepare(config: PruningConfig) -> Prepared:
    """Build and check everything that a run needs.

    Raises:
        GumbelPluginError: Whatever is wrong with the configuration, the data or the network.
    """
    if config.model is None:
        raise ConfigError("model: required for a run, but missing")
    torch.manual_seed(config.seed)
    model = build_model(
        config.model.name, config.model.num_classes, config.model.in_channels, **config.model.options
    )
    train, _, test = loaders(config)
    example = torch.stack([test.dataset[index][0] for index in range(2)])
    groups = []
    if needs_groups(config.pruning):
        try:
            from gumbel_torch_pruning.groups import find_groups
        except ImportError as error:
            raise MissingExtraError("torch-pruning", "torch-pruning") from error
        groups = find_groups(model, example)
    return Prepared(config, model, MaskingSession(model, config.pruning, groups, config.seed), example)


def run(
    config: PruningConfig,
    output: Path | None = None,
    *,
    force: bool = False,
    progress: bool = False,
    say: Callable[[str], None] = _logger.info,
) -> RunResult:
    """Train with learnt masks, shrink, prove and measure.

    Args:
        config: The whole run.
        output: Folder for the resolved configuration, masks, small network and summary; nothing is written without it.
        force: Whether to overwrite a finished run in that folder.
        progress: Whether to show progress bars.
        say: Told what the run does, a line at a time.

    Raises:
        ConfigError: If the configuration is wrong, or the folder holds a finished run.
        NonFiniteLossError: If the loss becomes NaN or infinite.
        EquivalenceError: If the small network is not equal to the masked one; everything was written by then.
    """
    if output is not None and (output / _SUMMARY).exists() and not force:
        raise ConfigError(f"output {str(output)!r} holds a finished run; pass --force to overwrite it")
    prepared = prepare(config)
    if output is not None:
        _claim(output, config)
    training = config.training
    train, validation, test = loaders(config)
    dense = copy.deepcopy(prepared.model)
    if training.dense_baseline:
        say(f"training the dense network for {training.max_epochs} epochs")
        fit(dense, None, training, train, progress=progress)
    say(f"training with gates for {training.max_epochs} epochs")
    began = time.perf_counter()
    train, _, _ = loaders(config)
    fit(prepared.model, prepared.session, training, train, validation, output=output, progress=progress)
    seconds = time.perf_counter() - began
    masks = prepared.session.extract()
    sparsity = prepared.session.status().sparsity
    prepared.session.detach()
    say("shrinking")
    masked = masked_copy(prepared.model, masks)
    small = remove_dead_units(masked, prepared.example)
    report = verify_equivalence(masked, small, prepared.example)
    columns = {}
    for name, network in (("dense", dense), ("masked", masked), ("small", small)):
        trained = name != "dense" or training.dense_baseline
        score = evaluate(network, test, training.loss) if trained else None
        columns[name] = Column(profile(network, prepared.example), score)
    result = RunResult(columns, report, sparsity, seconds, small, output)
    if output is not None:
        _write(output, masks, result)
    report.raise_for_failure()
    return result


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("gumbel-plugin", "torch", "torchvision", "torch-pruning", "nni", "lightning"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _claim(output: Path, config: PruningConfig) -> None:
    """Create the output folder and note the resolved configuration in it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / _SUMMARY).unlink(missing_ok=True)
        write_text(output / "config.yaml", config.to_yaml())
    except OSError as error:
        raise ConfigError(f"output {str(output)!r} cannot be written: {error}") from error


def _write(output: Path, masks: dict[str, dict[str, Tensor]], result: RunResult) -> None:
    save_masks(output / "masks.safetensors", masks)
    temporary = output / "small.safetensors.partial"
    save_file({name: t.contiguous().clone() for name, t in result.small.state_dict().items()}, temporary)
    os.replace(temporary, output / "small.safetensors")
    write_text(output / _SUMMARY, json.dumps(result.summary(), indent=2))  # last: it marks the run as finished


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
