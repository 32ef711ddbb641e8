from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from gumbel_plugin import verify_equivalence
from gumbel_plugin.errors import ConfigError, DataError, LifecycleError
from gumbel_plugin.layers.weights import GATES

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from gumbel_transformers import GumbelPruningCallback  # noqa: E402

RULES = [
    {"op_names": ["bert.encoder.layer.0.attention.self"], "sparse_ratio": 0.5},
    {"op_names_re": [r".*intermediate\.dense"], "sparse_ratio": 0.5},
]
CONFIG = {"pruning": {"config_list": RULES, "phases": {"fixed": 0.4}}}


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            max_position_embeddings=16,
            num_labels=2,
        )
    )


def data(count: int = 32) -> list[dict[str, Any]]:
    ids = torch.randint(3, 30, (count, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones(6).long(), "labels": int(row[0] > 15)} for row in ids]


EXAMPLE = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6).long()}


def arguments(folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"max_steps": 10, "save_strategy": "no", **options}
    return transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        logging_steps=5,
        disable_tqdm=True,
        learning_rate=1e-3,
        **settings,
    )


@pytest.fixture(autouse=True)
def _trainer_may_warn() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train(folder: Path, callback: Any, resume: Any = None, **options: Any) -> Any:
    trainer = transformers.Trainer(bert(), arguments(folder, **options), train_dataset=data(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_heads_and_hidden_widths_go(tmp_path: Path) -> None:
    callback = GumbelPruningCallback(CONFIG, EXAMPLE)
    trainer = train(tmp_path, callback)
    small = callback.shrink()
    assert small.bert.encoder.layer[0].attention.self.num_attention_heads == 2
    assert [layer.intermediate.dense.out_features for layer in small.bert.encoder.layer] == [12, 12]
    assert verify_equivalence(trainer.model, small, EXAMPLE).passed
    assert not any(GATES in name for name, _ in trainer.model.named_modules())
    assert [entry["sparsity"] for entry in trainer.state.log_history if "loss" in entry][-1] == pytest.approx(0.5)


def test_resumed_from_the_trainers_own_checkpoint(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", GumbelPruningCallback(CONFIG, EXAMPLE))
    train(tmp_path / "parts", GumbelPruningCallback(CONFIG, EXAMPLE), save_strategy="steps", save_steps=3)
    resumed = train(tmp_path / "parts", GumbelPruningCallback(CONFIG, EXAMPLE), str(tmp_path / "parts/checkpoint-3"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Watching(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Notes what the gated model returns in eval mode, as it is saved."""

    def __init__(self) -> None:
        self.outputs: dict[int, torch.Tensor] = {}

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.eval()
        with torch.no_grad():
            self.outputs[state.global_step] = model(**EXAMPLE).logits
        model.train()


def test_checkpoints_hold_the_plain_masked_model(tmp_path: Path) -> None:
    watching = Watching()
    callbacks = [GumbelPruningCallback({**CONFIG, "seed": 1}, EXAMPLE), watching]
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer = transformers.Trainer(bert(), arguments(tmp_path, **options), train_dataset=data(), callbacks=callbacks)
    trainer.train()
    for step, outputs in watching.outputs.items():  # learning, then fixed
        folder = tmp_path / f"checkpoint-{step}"
        plain, report = transformers.BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not report["unexpected_keys"]
        assert not report["missing_keys"]
        with torch.no_grad():
            assert torch.equal(plain.eval()(**EXAMPLE).logits, outputs)
    closed = (plain.bert.encoder.layer[1].output.dense.weight == 0).all(0)
    assert int(closed.sum()) == 12
    assert not list(tmp_path.rglob("*.partial"))


def test_a_checkpoint_without_the_gates(tmp_path: Path) -> None:
    train(tmp_path, GumbelPruningCallback(CONFIG, EXAMPLE), save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "gumbel_pruning.pt").unlink()
    with pytest.raises(ConfigError, match="pass the checkpoint's folder as resume_from="):
        train(tmp_path, GumbelPruningCallback(CONFIG, EXAMPLE), str(checkpoint))


def test_a_damaged_checkpoint_leaves_the_model_plain(tmp_path: Path) -> None:
    train(tmp_path, GumbelPruningCallback(CONFIG, EXAMPLE), save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "gumbel_pruning.pt").write_bytes(b"nothing")
    model = bert()
    callback = GumbelPruningCallback(CONFIG, EXAMPLE)
    trainer = transformers.Trainer(model, arguments(tmp_path), train_dataset=data(), callbacks=[callback])
    with pytest.raises(DataError, match=r"gumbel_pruning\.pt cannot be read"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not any(GATES in name for name, _ in model.named_modules())


def test_a_training_that_failed_can_be_taken_back(tmp_path: Path) -> None:
    class Failing(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("a bug of the user's")

    model, callback = bert(), GumbelPruningCallback(CONFIG, EXAMPLE)
    callbacks = [callback, Failing()]
    trainer = transformers.Trainer(model, arguments(tmp_path), train_dataset=data(), callbacks=callbacks)
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.train()
    callback.detach()
    assert not any(GATES in name for name, _ in model.named_modules())
    transformers.Trainer(model, arguments(tmp_path), train_dataset=data(), callbacks=[callback]).train()
    with pytest.raises(LifecycleError, match="plain one already"):
        callback.detach()


def test_before_the_training() -> None:
    with pytest.raises(LifecycleError, match="there are no masks yet"):
        GumbelPruningCallback(CONFIG).shrink()


class TestBestCheckpoint:
    """A Trainer that loads the best checkpoint may load one of before the masks were decided."""

    def train(self, folder: Path, best_epoch: int, callback: GumbelPruningCallback | None = None) -> None:
        pruning = callback or GumbelPruningCallback(CONFIG, EXAMPLE)
        options = {"max_steps": -1, "num_train_epochs": 4, "eval_strategy": "epoch", "save_strategy": "epoch"}
        options |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
        epochs = iter(range(1, 5))
        trainer = transformers.Trainer(
            bert(),
            arguments(folder, **options),
            train_dataset=data(),
            eval_dataset=data(8),
            compute_metrics=lambda _: {"score": float(next(epochs) == best_epoch)},
            callbacks=[pruning],
        )
        trainer.train()

    def test_of_a_denser_network_warns(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match=r"has loaded .*checkpoint-4, written after step 4, when the masks"):
            self.train(tmp_path, best_epoch=1)

    def test_its_own_gates_are_decided(self, tmp_path: Path) -> None:
        """The best weights go with the gates of that moment, not with those that were learned later."""
        pruning = GumbelPruningCallback({"pruning": {"config_list": RULES, "budget": {"ramp": 0.2}}}, EXAMPLE)
        self.train(tmp_path, best_epoch=2, callback=pruning)
        stopped = GumbelPruningCallback({"pruning": {"config_list": RULES, "budget": {"ramp": 0.2}}}, EXAMPLE)
        resumed = transformers.Trainer(bert(), arguments(tmp_path), train_dataset=data(), callbacks=[stopped])
        resumed.args.max_steps = 8  # over where the best checkpoint was written
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        assert pruning.masks is not None
        assert stopped.masks is not None
        for name, targets in pruning.masks.items():
            assert torch.equal(targets["weight"], stopped.masks[name]["weight"])

    def test_of_the_final_masks_is_fine(self, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*masks were not decided")
            self.train(tmp_path, best_epoch=4)
