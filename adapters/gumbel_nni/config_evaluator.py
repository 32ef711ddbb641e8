"""What trains as a YAML file describes: the one place of the adapter that imports the application, where it is used."""

from __future__ import annotations

import itertools
from typing import Any

import nni
from nni.compression import TorchEvaluator
from torch import Tensor, nn

from gumbel_plugin.config import ConfigLike, PruningConfig
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.training.optimizers import family_and_arguments
from gumbel_plugin.training.session import MaskingSession


def evaluator_from_config(model: nn.Module, config: ConfigLike) -> TorchEvaluator:
    """Return an evaluator that trains and scores a plain model as a configuration says.

    It knows data, loss, optimizer and (for quantizers that calibrate) test data; learning rate schedules, precision and
    several devices are for runs of our own (`gumbel-prune run`), or for an evaluator of your own.

    Args:
        model: The plain model, before any compressor wraps it.
        config: A configuration with a ``data`` section.

    Raises:
        ConfigError: If the configuration has no data section.
        DataError: If the data is not there.
    """
    from gumbel_plugin.runs.train import evaluate, loaders, make_loss

    resolved = RunConfig.load(config)
    train, _, test = loaders(resolved)
    loss = make_loss(resolved.training)

    def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return loss(model(batch[0]), batch[1])

    def training_func(
        model: nn.Module, optimizer: Any, step: Any, scheduler: Any, max_steps: int | None, max_epochs: int | None
    ) -> None:
        model.train()
        epochs = range(max_epochs or resolved.training.max_epochs) if max_steps is None else itertools.count()
        for batch in itertools.islice((batch for _ in epochs for batch in train), max_steps):
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()

    family, arguments = family_and_arguments(resolved.training.optimizer)
    return TorchEvaluator(
        training_func,
        nni.trace(family)(model.parameters(), **arguments),
        training_step,
        dummy_input=next(iter(train))[0][:2],
        evaluating_func=lambda model: evaluate(model, test, resolved.training.loss),
    )


def epochs_of(config: PruningConfig) -> int:
    """Return for how many epochs a configuration trains."""
    return RunConfig.load(config).training.max_epochs


def first_inputs(config: PruningConfig) -> Tensor:
    """Return two inputs of a configuration's training data."""
    from gumbel_plugin.runs.train import loaders

    batch: Tensor = next(iter(loaders(RunConfig.load(config))[0]))[0]
    return batch[:2]


def train_from_config(
    model: nn.Module, session: MaskingSession, config: PruningConfig, max_steps: int | None, max_epochs: int | None
) -> None:
    """Train a wrapped model and its gates on a configuration's data.

    Args:
        model: The model, whose wrappers call the gated layers.
        session: Its session.
        config: A configuration with a ``data`` section.
        max_steps: Optimizer steps, instead of epochs.
        max_epochs: Epochs.
    """
    from gumbel_plugin.runs.train import fit, loaders

    resolved = RunConfig.load(config)
    training = resolved.training.model_copy(update={} if max_epochs is None else {"max_epochs": max_epochs})
    train, validation, _ = loaders(resolved)
    fit(model, session, training, train, validation, max_steps=max_steps, hooks=False)
