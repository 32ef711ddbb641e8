"""NNI's three evaluators on today's torch, Lightning and Transformers: each trains, and the masks are learned."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nni
import pytest
import pytorch_lightning as pl
import torch
from nni.compression import LightningEvaluator, TorchEvaluator, TransformersEvaluator
from nni.compression.pruning import SlimPruner
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from gumbel_nni import evaluator_from_config
from gumbel_plugin import GumbelPruner
from gumbel_plugin.errors import LifecycleError
from gumbel_plugin.layers.example_inputs import observing
from tests.gumbel_nni.helpers import without

STEPS = 60
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(128, 8, generator=GENERATOR)
LABELS = INPUTS[:, :4].argmax(1)
TOKENS = torch.randint(2, 20, (128, 6), generator=GENERATOR)
RULES = [{"op_names": ["0"], "sparse_ratio": 0.5}]
BERT_RULES = [{"op_names_re": [r".*intermediate\.dense"], "sparse_ratio": 0.5}]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))


class Lit(pl.LightningModule):
    """The same network as a LightningModule."""

    def __init__(self, form: str = "one") -> None:
        super().__init__()
        self.net, self.form = mlp(), form

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = nni.trace(torch.optim.Adam)(self.parameters(), lr=1e-2)
        if self.form == "one":
            return optimizer
        scheduler = nni.trace(torch.optim.lr_scheduler.StepLR)(optimizer, 1000)
        if self.form == "lists":
            return [optimizer], [scheduler]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=32)


class Sentences(Dataset[dict[str, Tensor]]):
    """Tokens whose first one is the label."""

    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = TOKENS[index]
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[0] % 2}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Lightning and Transformers warn of things that do not matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        yield


def torch_pruner(config: Any) -> tuple[GumbelPruner, Callable[[], float]]:
    model = mlp()

    def train(model: nn.Module, optimizer: Any, step: Any, lr: Any, steps: int | None, epochs: int | None) -> None:
        model.train()
        for batch in itertools.islice(itertools.cycle(range(0, 128, 32)), steps or 4 * (epochs or 0)):
            optimizer.zero_grad()
            step((INPUTS[batch : batch + 32], LABELS[batch : batch + 32]), model).backward()
            optimizer.step()

    evaluator = TorchEvaluator(
        train,
        nni.trace(torch.optim.Adam)(model.parameters(), lr=1e-2),
        lambda batch, model: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        dummy_input=INPUTS[:2],
    )
    return GumbelPruner(model, config(RULES), evaluator), lambda: _loss(model)


def lightning_evaluator(epochs: int = 100) -> LightningEvaluator:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = nni.trace(pl.Trainer)(max_epochs=epochs, accelerator="cpu", **quiet)
    return LightningEvaluator(trainer, nni.trace(Data)(), dummy_input=INPUTS[:2])


def lightning_pruner(config: Any, form: str = "one") -> tuple[GumbelPruner, Callable[[], float]]:
    model = Lit(form)
    rules = [{"op_names": ["net.0"], "sparse_ratio": 0.5}]
    return GumbelPruner(model, config(rules), lightning_evaluator()), lambda: _loss(model)


def _loss(model: nn.Module) -> float:
    with observing(model):
        return float(nn.functional.cross_entropy(model(INPUTS), LABELS))


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def transformers_evaluator(model: nn.Module, folder: Path, optimizer: bool = True) -> TransformersEvaluator:
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=32, num_train_epochs=3, learning_rate=5e-3, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    made = {"optimizers": (nni.trace(torch.optim.Adam)(model.parameters(), lr=5e-3), None)} if optimizer else {}
    trainer = nni.trace(Trainer)(model=model, args=arguments, train_dataset=Sentences(), **made)
    example = {"input_ids": TOKENS[:2], "attention_mask": torch.ones_like(TOKENS[:2])}
    return TransformersEvaluator(trainer, example)


def transformers_pruner(config: Any, folder: Path, optimizer: bool = True) -> tuple[GumbelPruner, Callable[[], float]]:
    model = bert()
    pruner = GumbelPruner(model, config(BERT_RULES), transformers_evaluator(model, folder, optimizer))

    def loss() -> float:
        with observing(model):
            return float(model(input_ids=TOKENS, labels=TOKENS[:, 0] % 2).loss)

    return pruner, loss


EVALUATORS = ("torch", "lightning", "transformers")


def pruner_with(name: str, folder: Path, config: Any = list) -> tuple[GumbelPruner, Callable[[], float]]:
    makers = {"torch": torch_pruner, "lightning": lightning_pruner}
    return makers[name](config) if name in makers else transformers_pruner(config, folder)


def with_phases(rules: list[dict[str, Any]]) -> dict[str, Any]:
    return {"pruning": {"config_list": rules, "phases": {"dense": 0.25, "fixed": 0.25}}}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATORS)
def test_the_loss_falls_and_masks_are_learned(name: str, tmp_path: Path) -> None:
    pruner, loss = pruner_with(name, tmp_path)
    before = loss()
    pruner.compress(max_steps=STEPS)
    logits = torch.cat([parameter.detach() for parameter in pruner.session.gate_parameters()])
    assert pruner.session.steps == STEPS
    assert len(logits.unique()) == len(logits), "every gate has learned for itself"
    assert all(float(targets["weight"].mean()) == 0.5 for targets in pruner.get_masks().values())
    assert loss() < 0.6 * before
    small = pruner.speedup()
    widths = {m.out_features for m in small.modules() if isinstance(m, nn.Linear)}
    assert 12 in widths
    assert 24 not in widths


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATORS)
def test_phases_follow_the_steps(name: str, tmp_path: Path) -> None:
    """Also where only epochs are given, if the trainer turns them into steps: 10 epochs are 40 steps here."""
    pruner, _ = pruner_with(name, tmp_path, with_phases)
    phases: list[str] = []
    step = pruner.session.step
    pruner.session.step = lambda: (phases.append(pruner.session.phase.value), step())
    pruner.compress(**({"max_steps": 40} if name == "torch" else {"max_epochs": 10}))
    assert phases == ["open"] * 10 + ["learning"] * 20 + ["fixed"] * 10


def test_epochs_of_a_training_function_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pruner, _ = torch_pruner(list)
    pruner.compress(max_epochs=2)
    assert [record.getMessage() for record in caplog.records if "pass max_steps" in record.getMessage()]
    assert pruner.session.steps == 8


@pytest.mark.parametrize("form", ["one", "lists", "dicts"])
def test_lightning_steps_gates_with_their_own_gradients(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_ratio(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """No budget: what moves the gates is the task's gradient."""
        return [{key: value for key, value in rule.items() if key != "sparse_ratio"} for rule in rules]

    def moved() -> bool:
        pruner, _ = lightning_pruner(without_ratio, form)
        before = [parameter.detach().clone() for parameter in pruner.session.gate_parameters()]
        pruner.compress(max_steps=1)
        return not all(map(torch.equal, before, [p.detach() for p in pruner.session.gate_parameters()]))

    with monkeypatch.context() as undo:
        without(undo, LightningEvaluator, "patch_optimizer_step")
        assert not moved(), "the first step came before the first gradient"
    assert moved()


@pytest.mark.slow
def test_transformers_run_every_patch_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tasks_that_ran() -> list[str]:
        ran: list[str] = []
        model = bert()
        evaluator = transformers_evaluator(model, tmp_path)
        evaluator._init_optimizer_helpers(model)
        evaluator.bind_model(model)
        for name in ("first", "second"):
            evaluator.patch_optimizer_step(
                [lambda name=name: ran.append(f"before {name}")], [lambda name=name: ran.append(f"after {name}")]
            )
        evaluator.train(max_steps=1)
        evaluator.unbind_model()
        return ran

    with monkeypatch.context() as undo:
        without(undo, TransformersEvaluator, "patch_optimizer_step")
        with pytest.raises(AssertionError):
            tasks_that_ran()
    expected = ["before second", "before first", "after first", "after second"]
    assert tasks_that_ran() == tasks_that_ran() == expected


@pytest.mark.slow
def test_transformers_default_optimizer(tmp_path: Path) -> None:
    pruner, loss = transformers_pruner(list, tmp_path, optimizer=False)
    before = loss()
    pruner.compress(max_steps=STEPS)
    assert loss() < 0.6 * before


@pytest.mark.slow
def test_two_compressors_on_a_trainer(tmp_path: Path) -> None:
    model = bert()
    evaluator = transformers_evaluator(model, tmp_path)
    slim = SlimPruner(model, [{"op_names": ["bert.pooler.dense"], "sparse_ratio": 0.5}], evaluator, training_steps=3)
    pruner = GumbelPruner.from_compressor(slim, BERT_RULES)
    pruner.compress(max_steps=6)
    assert {float(targets["weight"].mean()) for targets in pruner.get_masks().values()} == {0.5}
    assert len(pruner.get_masks()) == 3


def test_training_in_eval_mode_is_refused() -> None:
    """Lightning does not switch to train mode by itself any more."""
    pruner, _ = lightning_pruner(list)
    pruner.bound_model.eval()
    with pytest.raises(LifecycleError, match=r"eval mode.*call its train\(\)"):
        pruner.compress(max_steps=2)


@pytest.mark.parametrize(
    ("length", "steps"),
    [({"max_steps": 3}, 3), ({"max_epochs": 1}, 6), ({}, 12), ({"max_steps": 8, "max_epochs": 1}, 8)],
)
def test_an_evaluator_from_a_configuration_trains_as_long_as_asked(length: dict[str, int], steps: int) -> None:
    config = {
        "data": {"name": "digits", "batch_size": 64, "samples": 360},
        "training": {"max_epochs": 2, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}},
        "pruning": {"config_list": [{"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 0.5}]},
    }
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    evaluator = evaluator_from_config(model, config)
    evaluator._init_optimizer_helpers(model)
    evaluator.bind_model(model)
    seen: list[int] = []
    model.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    evaluator.train(**length)
    assert len(seen) == steps
