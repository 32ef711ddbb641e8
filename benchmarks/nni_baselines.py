"""NNI's own pruners on the tasks of `methods.py`, with the epochs, learning rates and phases of the learned masks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gumbel_nni  # noqa: F401  (repairs NNI on today's torch)
from gumbel_plugin.runs.models import build_model
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.runs.train import evaluate, load_config_data, loaders, make_loss
from gumbel_plugin.shrinking.shrink import shrink
from gumbel_plugin.sparsity.counting import count_nonzero

import nni  # isort: skip
from nni.compression import TorchEvaluator  # isort: skip
from nni.compression.pruning import AGPPruner, LevelPruner, MovementPruner  # isort: skip

TIMES = 100
"""How often the AGP schedule tightens the masks."""

BASELINES = ("NNI Level, AGP, global", "NNI Level, AGP, per layer", "NNI Movement, per layer")


class Baseline:
    """One run: dense epochs, a pruning schedule, and epochs with fixed masks."""

    def __init__(self, config: RunConfig) -> None:
        """Load the data and build the network.

        Args:
            config: Model, data, training and phases; its method is not used.
        """
        assert config.model is not None
        self.config = config
        self.criterion = make_loss(config.training)
        data = load_config_data(config)
        self.train, _, self.test = loaders(config, data)
        self.example = torch.stack([data.test[index][0] for index in range(2)])
        torch.manual_seed(config.seed)
        self.model = build_model(config.model.name, config.model.num_classes, **config.model.options)
        self.weights = [m.weight for m in self.model.modules() if isinstance(m, nn.Linear)]
        phases, epochs = config.pruning.phases, config.training.max_epochs
        self.steps = epochs * len(self.train)
        self.dense = round(phases.dense * self.steps)
        self.fixed = round(phases.fixed * self.steps)
        self._done = self._decays = 0

    def run(self, name: str, sparsity: float) -> dict[str, float]:
        """Train, prune and measure one of `BASELINES`."""
        began = time.perf_counter()
        dense = torch.optim.Adam(self.model.parameters(), self.config.training.optimizer.lr)
        self._fit(self.model, dense, self._loss, None, self.dense, None)
        pruner = self._pruner(name, sparsity)
        pruner.compress(self.steps - self.dense, None)
        seconds = time.perf_counter() - began
        masks = pruner.get_masks()
        pruner.unwrap_model()
        small = shrink(self.model, masks, self.example)
        kept = sum(int((masks[n]["weight"] * m.weight != 0).sum()) for n, m in self._layers())
        return {
            "density": kept / sum(weight.numel() for weight in self.weights),
            "small": evaluate(small, self.test),
            "parameters": count_nonzero(small),
            "seconds_an_epoch": seconds / self.config.training.max_epochs,
        }

    def _layers(self) -> list[tuple[str, nn.Linear]]:
        return [(name, module) for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]

    def _pruner(self, name: str, sparsity: float) -> Any:
        entry: dict[str, Any] = {"op_types": ["Linear"], "sparse_ratio": sparsity, "granularity": [1]}
        optimizer = nni.trace(torch.optim.Adam)(self.model.parameters(), lr=self.config.training.optimizer.lr)
        evaluator = TorchEvaluator(self._fit, optimizer, self._loss)
        learning = self.steps - self.dense - self.fixed
        if "Movement" in name:
            return MovementPruner(self.model, [entry], evaluator, 1, learning)
        if "global" in name:
            entry["global_group_id"] = "network"
        return AGPPruner(LevelPruner(self.model, [entry]), learning // TIMES, TIMES, evaluator)

    def _loss(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return self.criterion(model(batch[0]), batch[1])

    def _fit(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_step: Callable[..., Tensor],
        lr_scheduler: Any,
        max_steps: int | None,
        max_epochs: int | None,
    ) -> None:
        """Train as the runs of the learned masks do: the rate falls once an epoch while the masks are fixed."""
        assert max_steps is not None
        training = self.config.training
        for _ in range(max_steps):
            if self._done % len(self.train) == 0:
                self._batches = iter(self.train)
                self._decays += self._done > self.steps - self.fixed
            for group in optimizer.param_groups:
                group["lr"] = training.optimizer.lr * training.lr_decay**self._decays
            model.train()
            optimizer.zero_grad()
            training_step(next(self._batches), model).backward()
            optimizer.step()
            self._done += 1


logging.getLogger("nni").setLevel(logging.ERROR)
