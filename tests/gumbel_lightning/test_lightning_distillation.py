"""Distillation while Lightning trains: accumulated batches, checkpoints, modules that call a part of themselves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gumbel_lightning import GumbelPruning
from gumbel_plugin import Distillation
from gumbel_plugin.errors import LifecycleError

pytestmark = pytest.mark.slow

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 3))


class Task(pl.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = network(seed)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


@pytest.fixture(autouse=True)
def _trainers_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fit(
    task: Task, callbacks: list[Any], epochs: int, size: int = 16, ckpt_path: Path | None = None, **more: Any
) -> None:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, accelerator="cpu", **{**quiet, **more})
    trainer.fit(task, DataLoader(TensorDataset(X, Y), batch_size=size), ckpt_path=ckpt_path)


def config(dense: float) -> dict[str, Any]:
    return {"pruning": {"config_list": [{"op_names": ["0"], "sparse_ratio": 0.5}], "phases": {"dense": dense}}}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_accumulated_batches(precision: str) -> None:
    """The gates are open to the last step and draw no samples, so that batches can be divided without a difference."""
    found: list[Tensor] = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if trainer.global_step == 11 and index % trainer.accumulate_grad_batches == 0:
                found.append(module.net[0].weight.detach().clone())

    for accumulated in (1, 4):
        task = Task()
        callback = GumbelPruning(
            config(0.99), X[:2], attribute="net", distillation={"teacher": network(7), "logits": 0.6}
        )
        fit(task, [callback, Keep()], 3, 16 // accumulated, accumulate_grad_batches=accumulated, precision=precision)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == "32-true" else {"rtol": 0.1, "atol": 0.01}
    torch.testing.assert_close(*found, **tolerance)


def test_goes_on_from_a_checkpoint_of_another_process(tmp_path: Path) -> None:
    whole, callback = Task(), GumbelPruning(config(0), X[:2], attribute="net", distillation={"logits": 0.5})

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "second.ckpt")

    fit(whole, [callback, Save()], 4)
    other = Task(5)  # where the teacher is read from, there are other weights by now
    callback = GumbelPruning(config(0), X[:2], attribute="net", distillation={"logits": 0.5})
    fit(other, [callback], 4, ckpt_path=tmp_path / "second.ckpt")
    assert torch.equal(other.net[0].weight, whole.net[0].weight)
    assert torch.equal(other.net[2].weight, whole.net[2].weight)


def test_a_network_that_is_not_called_itself() -> None:
    class Around(Task):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    rules = [{"op_names": ["net.0"], "sparse_ratio": 0.5}]
    callback = GumbelPruning(rules, X[:2], distillation={"logits": 0.5})  # and no attribute="net"
    with pytest.raises(LifecycleError, match="attribute="):
        fit(Around(), [callback], 1)


def test_the_small_network_goes_on_with_the_same_teacher() -> None:
    task, dense = Task(), network()
    callback = GumbelPruning(config(0), X[:2], attribute="net", distillation={"logits": 0.5})
    fit(task, [callback], 2)
    small = callback.shrink()
    distillation = Distillation(dense, {"logits": 1.0, "hidden": 0.1, "layers": ["0"]})
    distillation.attach(small)
    small.train()
    optimizer, losses = torch.optim.Adam(small.parameters(), 0.01), []
    for _ in range(40):
        loss = distillation.loss(nn.functional.cross_entropy(small(X), Y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
