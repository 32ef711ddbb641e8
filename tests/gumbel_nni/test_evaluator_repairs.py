"""Repairs of NNI's evaluators: each breakage is shown first, with the repair undone, and then repaired."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace

import nni
import pytest
import pytorch_lightning as pl
import torch
from nni.compression.utils import evaluator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gumbel_nni.compat import evaluator_repairs as evaluators


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_lightning_steps_can_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning.loops import fit_loop

    loop = fit_loop._FitLoop
    monkeypatch.setattr(loop, "max_steps", property(loop.max_steps.fget))
    instance = object.__new__(loop)
    instance.epoch_loop = SimpleNamespace(max_steps=-1)
    with pytest.raises(AttributeError, match=r"setter|can't set"):
        instance.max_steps = 3
    assert evaluators.settable_max_steps()
    instance.max_steps = 3
    assert instance.epoch_loop.max_steps == instance.max_steps == 3


def test_lightning_evaluator_trains_a_number_of_steps() -> None:
    class Regression(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.steps = nn.Linear(4, 2), 0

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            self.steps += 1
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return nni.trace(torch.optim.SGD)(self.parameters(), lr=0.1)

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
            return DataLoader(TensorDataset(torch.ones(32, 4)), batch_size=2)

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    model, patched = Regression(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = nni.trace(pl.Trainer)(max_epochs=1, accelerator="cpu", **dict.fromkeys(quiet, False))
        lightning = evaluator.LightningEvaluator(trainer, nni.trace(Data)())
        lightning._init_optimizer_helpers(model)
        lightning.bind_model(model)
        lightning.patch_loss(lambda loss, batch: patched.append(batch) or loss)
        lightning.train(max_steps=3)
        lightning.unbind_model()
    assert model.steps == len(patched) == 3


class FakeTrainer:
    """The part of a Trainer that patch_loss touches (a real one needs accelerate)."""

    def compute_loss(
        self, model: None, inputs: Tensor, return_outputs: bool = False, num_items_in_batch: int | None = None
    ) -> Tensor | tuple[Tensor, str]:
        loss = inputs.sum() / (num_items_in_batch or 1)
        return (loss, "outputs") if return_outputs else loss


def test_transformers_loss_takes_the_item_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = evaluator.TransformersEvaluator
    instance = object.__new__(cls)
    instance.trainer = FakeTrainer()
    with monkeypatch.context() as undo:
        undo.setattr(cls, "patch_loss", cls.patch_loss.__wrapped__)
        instance.patch_loss(lambda loss, batch: loss + 1)
        with pytest.raises(TypeError, match="num_items_in_batch"):
            instance.trainer.compute_loss(None, torch.ones(4), num_items_in_batch=2)
    instance.trainer = FakeTrainer()
    instance.patch_loss(lambda loss, batch: loss + 1)
    assert instance.trainer.compute_loss(None, torch.ones(4), num_items_in_batch=2).item() == 3.0
    assert instance.trainer.compute_loss(None, torch.ones(4), True) == (torch.tensor(5.0), "outputs")


def trainer_without_init(model: nn.Module) -> evaluator.HFTrainer:
    """Return a real Trainer with the attributes that creating its optimizer needs."""
    trainer = object.__new__(evaluator.HFTrainer)
    trainer.args = SimpleNamespace(
        learning_rate=0.25, adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-8, optim_args=None, optim="sgd"
    )
    trainer.args.weight_decay = 0.0
    trainer.model, trainer.optimizer, trainer.lr_scheduler = model, None, None
    trainer.optimizer_cls_and_kwargs = None
    return trainer


def test_transformers_default_optimizer_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = evaluator.TransformersEvaluator
    static = inspect.getattr_static(evaluator.HFTrainer, "get_optimizer_cls_and_kwargs")
    model = two_layers()
    instance = object.__new__(cls)
    instance.traced_trainer, instance._initialization_complete = trainer_without_init(model), False
    instance._ori_trainer_attr = {"get_optimizer_cls_and_kwargs": evaluator.HFTrainer.get_optimizer_cls_and_kwargs}
    with monkeypatch.context() as undo:
        undo.setattr(evaluator.HFTrainer, "get_optimizer_cls_and_kwargs", static)  # NNI forgets to put it back
        with pytest.raises(TypeError, match="positional argument"):
            cls._init_optimizer_helpers.__wrapped__(instance, model)
    instance.traced_trainer = trainer_without_init(model)
    instance._init_optimizer_helpers(model)
    assert inspect.getattr_static(evaluator.HFTrainer, "get_optimizer_cls_and_kwargs") is static
    assert instance.traced_trainer.optimizer is None
    optimizer = instance._optimizer_helper.call(two_layers(), {name: name for name, _ in model.named_parameters()})
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
