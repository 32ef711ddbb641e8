"""Distillation with the Hugging Face Trainer: whoever computes the loss, however it is divided, in mixed precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from gumbel_transformers import GumbelPruningCallback  # noqa: E402

pytestmark = pytest.mark.slow

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)


class Network(nn.Module):
    """Returns its loss, a mean over its batch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.head = nn.Linear(8, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.first(x)))
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


class Summing(Network):
    """Divides the loss by the samples of all accumulated batches, as language models do."""

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = super().forward(x)["logits"]
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels, reduction="sum")
        if loss is not None:
            loss = loss / kwargs.get("num_items_in_batch", len(x))
        return {"loss": loss, "logits": logits}


class InOrder(transformers.Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def outside(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    count = len(labels) if num_items_in_batch is None else num_items_in_batch
    return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / count


def trained(folder: Path, accumulated: int, kind: str, distill: bool = True, **more: Any) -> list[Tensor]:
    """Train with open gates, which draw no samples, so that batches can be divided without a difference."""
    model, teacher = (Summing(seed) if kind == "summing" else Network(seed) for seed in (0, 7))
    pruning = {"config_list": [{"op_names": ["first"], "sparse_ratio": 0.5}], "phases": {"dense": 0.9}}
    callback = GumbelPruningCallback(
        {"pruning": pruning}, X[:2],
        distillation={"teacher": teacher, "logits": 0.6} if distill else None,
    )  # fmt: skip
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=16 // accumulated, max_grad_norm=0.0, use_cpu=True,
        gradient_accumulation_steps=accumulated, report_to=[], disable_tqdm=True, save_strategy="no",
        logging_strategy="no", remove_unused_columns=False, **more,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    seen: list[Tensor] = []

    class Keep(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                seen.extend(p.detach().clone() for p in (model.first.weight, model.head.weight))

    function = outside if kind == "outside" else None
    InOrder(
        model, arguments, train_dataset=data, callbacks=[callback, Keep()], optimizers=(optimizer, constant),
        compute_loss_func=function,
    ).train()  # fmt: skip
    return seen


@pytest.mark.parametrize("kind", ["own", "summing", "outside"])
def test_accumulated_batches(kind: str, tmp_path: Path) -> None:
    whole, divided = trained(tmp_path, 1, kind), trained(tmp_path, 4, kind)
    without, own = trained(tmp_path, 1, kind, distill=False), trained(tmp_path, 1, "own")
    for a, b, c, d in zip(whole, divided, without, own, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, d)
        assert not torch.allclose(a, c, atol=0.01)


@pytest.mark.parametrize("kind", ["own", "outside"])
def test_mixed_precision(kind: str, tmp_path: Path) -> None:
    """The Trainer casts what the network returns; the loss was computed from what it was before."""
    full, mixed = trained(tmp_path, 1, kind), trained(tmp_path, 1, kind, bf16=True)
    for a, b in zip(full, mixed, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.005)
