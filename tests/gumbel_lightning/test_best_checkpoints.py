"""A ModelCheckpoint that watches a metric may keep a network of before its masks were decided."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gumbel_lightning import GumbelPruning

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
RULES = [{"op_names": ["0", "2"], "sparse_ratio": 0.5}]
EPOCHS, BATCHES = 5, 3


def module(package: str, scores: list[float], pruning: GumbelPruning | None = None) -> Any:
    """Return a module that logs the given score in each epoch; with a callback, only once that is settled."""

    class Scored(importlib.import_module(package).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 8), nn.SiLU(), nn.Linear(8, 3))
            self.example_input_array = torch.zeros(2, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            score = scores[self.current_epoch] if pruning is None or pruning.settled else 0.0
            self.log("score", score)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.01)

    return Scored()


def loader() -> DataLoader[Any]:
    x = torch.randn(16 * BATCHES, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16)


def fit(
    package: str, folder: Path, scores: list[float], fixed: float = 0.4, *, late: bool = False, **options: Any
) -> tuple[list[str], GumbelPruning, Any]:
    """Fit; return the warnings of dense checkpoints, the callback and the ModelCheckpoint."""
    pl = importlib.import_module(package)
    config = {"pruning": {"config_list": RULES, "phases": {"fixed": fixed}}, "seed": 3}
    pruning = GumbelPruning(config, attribute="net")
    settings = {"monitor": "score", "mode": "max", "dirpath": folder, **options.pop("saving", {})}
    saving = pl.callbacks.ModelCheckpoint(**settings)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[saving, pruning],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module(package, scores, pruning if late else None), loader(), loader(), **options)
    found = [str(warning.message) for warning in caught if "masks were not decided" in str(warning.message)]
    return found, pruning, saving


def sparsity(path: str) -> float:
    state = torch.load(path, weights_only=True)["state_dict"]
    return float((state["net.2.weight"] == 0).all(0).float().mean())  # of what it reads


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("weights_only", [False, True])
def test_of_before_the_masks_were_decided(package: str, weights_only: bool, tmp_path: Path) -> None:
    saving_options = {"save_weights_only": weights_only}
    (warning,), _, saving = fit(package, tmp_path, [3, 9, 4, 5, 6], saving=saving_options)
    assert f"kept {saving.best_model_path}, written after step 6, " in warning
    assert "phases.fixed" in warning
    assert "GumbelPruning.settled" in warning
    assert sparsity(saving.best_model_path) <= 0.5


def test_of_the_final_masks(tmp_path: Path) -> None:
    found, _, saving = fit("lightning.pytorch", tmp_path, [3, 4, 5, 9, 6])
    assert found == []
    assert sparsity(saving.best_model_path) == 0.5


def test_monitored_once_it_is_settled(tmp_path: Path) -> None:
    found, pruning, saving = fit("lightning.pytorch", tmp_path, [9, 8, 7, 5, 6], late=True)
    assert found == []
    assert pruning.settled
    assert "epoch=2" in saving.best_model_path  # the first one of the last 40 %
    assert sparsity(saving.best_model_path) == 0.5


@pytest.mark.slow
def test_without_fixed_masks_the_budget_counts(tmp_path: Path) -> None:
    assert len(fit("lightning.pytorch", tmp_path / "early", [9, 4, 5, 6, 7], fixed=0)[0]) == 1
    assert fit("lightning.pytorch", tmp_path / "late", [3, 4, 5, 6, 9], fixed=0)[0] == []


def test_nothing_is_monitored(tmp_path: Path) -> None:
    assert fit("lightning.pytorch", tmp_path, [9, 4, 5, 6, 7], saving={"monitor": None})[0] == []


def test_a_file_that_is_written_again(tmp_path: Path) -> None:
    """The name says nothing of when the file was written."""
    options = {"filename": "best", "enable_version_counter": False}
    assert fit("lightning.pytorch", tmp_path, [3, 4, 5, 6, 9], saving=options)[0] == []


def test_a_training_that_goes_on(tmp_path: Path) -> None:
    """What was best before the interruption is known after it."""
    fit("lightning.pytorch", tmp_path, [3, 9, 4, 5, 6], saving={"save_top_k": -1, "filename": "{epoch}"})
    for epoch in (2, 3):
        resumed = {"saving": {"filename": "{epoch}"}, "ckpt_path": tmp_path / f"epoch={epoch}.ckpt"}
        (warning,), *_ = fit("lightning.pytorch", tmp_path, [3, 9, 4, 5, 6], **resumed)
        assert f"kept {tmp_path / 'epoch=1.ckpt'}, written after step 6, " in warning
