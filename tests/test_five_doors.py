"""The same configuration, data and seed give the same masks, bit for bit, whoever trains: one loop, many doors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from gumbel_lightning import GumbelPruning
from gumbel_plugin import GumbelGroupPruner, MaskingSession
from gumbel_plugin.layers.geometry import is_matrix, layer_channels
from gumbel_plugin.runs.run_config import TrainingConfig
from gumbel_plugin.runs.train import fit
from gumbel_plugin.sparsity.latency import LatencyTable, LayerGrid
from gumbel_plugin.storage.mask_format import Masks
from gumbel_plugin.training import metric_budgets
from gumbel_plugin.training.loop import MaskingLoop

BATCH, EPOCHS = 16, 6
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)
EXAMPLE = X[:2]
STEPS = EPOCHS * len(X) // BATCH
METRICS: list[str | None] = [None, "weights", "channels", "macs", "parameters", "latency"]
"""What `pruning.budget` counts; None: each entry's own `sparse_ratio`."""


class Network(nn.Module):
    """Two hidden layers; with labels it returns its loss, as networks of Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return logits if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def configuration(metric: str | None, **rule: Any) -> dict[str, Any]:
    rule = {"op_names": ["first", "second"], **rule}
    budget = {"budget": {"metric": metric, "ratio": 0.5}} if metric else {}
    pruning = {
        "config_list": [rule if metric else {**rule, "sparse_ratio": 0.5}],
        "gate_optimizer": {"name": "adam", "lr": 0.3},
        "phases": {"dense": 0.2, "fixed": 0.2},
        **budget,
    }
    return {"pruning": pruning, "seed": 5}


@dataclass
class Result:
    """What a door gave: the masks, the latents behind them, and the trained weights with the masks applied."""

    masks: Masks
    latents: list[Tensor]
    model: nn.Module


def result(masks: Masks, session: MaskingSession, model: nn.Module) -> Result:
    return Result(masks, [parameter.detach().clone() for parameter in session.gate_parameters()], model)


def assert_same(found: Result, expected: Result) -> None:
    """Assert that two doors gave the same, bit for bit."""
    for layer, targets in expected.masks.items():
        assert torch.equal(found.masks[layer]["weight"], targets["weight"]), layer
    for ours, theirs in zip(found.latents, expected.latents, strict=True):
        assert torch.equal(ours, theirs)
    for layer in ("first", "second", "head"):
        assert torch.equal(found.model.get_submodule(layer).weight, expected.model.get_submodule(layer).weight), layer


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=BATCH)


def sgd(model: nn.Module, make: Callable[..., Any] = torch.optim.SGD) -> Any:
    return make(model.parameters(), lr=0.05, momentum=0.9)


def by_a_run(config: dict[str, Any], folder: Path) -> Result:
    model = Network()
    session = MaskingSession(model, config, example_inputs=EXAMPLE)
    optimizer = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
    training = TrainingConfig(max_epochs=EPOCHS, optimizer=optimizer, accelerator="cpu")
    fit(model, session, training, loader())
    masks = session.extract()
    session.detach()
    return result(masks, session, model)


def by_nni(config: dict[str, Any], folder: Path) -> Result:
    pytest.importorskip("nni")
    import nni
    from nni.compression import TorchEvaluator

    from gumbel_plugin import GumbelPruner

    model = Network()

    def train(model: nn.Module, optimizer: Any, step: Any, lr: Any, steps: int | None, epochs: int | None) -> None:
        model.train()
        for _ in range(EPOCHS):
            for batch in loader():
                optimizer.zero_grad()
                step(batch, model).backward()
                optimizer.step()

    def loss(batch: Any, model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    pruner = GumbelPruner(
        model, config, TorchEvaluator(train, sgd(model, nni.trace(torch.optim.SGD)), loss), example_inputs=EXAMPLE
    )
    _, masks = pruner.compress(max_steps=STEPS)
    pruner.unwrap_model()
    return result(masks, pruner.session, model)


def by_torch_pruning(config: dict[str, Any], folder: Path) -> Result:
    model = Network()
    pruner = GumbelGroupPruner(model, EXAMPLE, pruning=config, total_steps=STEPS)
    optimizer = sgd(model)  # holds the gates too, which the pruner steps: it finds no gradient there
    for _ in range(EPOCHS):
        for x, y in loader():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            pruner.regularize(model, loss)
            optimizer.step()
    masks = pruner.masks()
    found = result(masks, pruner.session, model)
    pruner.session.extract()
    found.model = copy.deepcopy(model)
    pruner.step()
    assert model.first.out_features + model.second.out_features < 40
    return found


def by_lightning(config: dict[str, Any], folder: Path) -> Result:
    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return sgd(self)

    task, callback = Task(), GumbelPruning(config, EXAMPLE, attribute="net")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(max_epochs=EPOCHS, callbacks=[callback], accelerator="cpu", **quiet).fit(task, loader())
    assert callback.masks is not None
    return result(callback.masks, callback._running.session, task.net)


def by_transformers(config: dict[str, Any], folder: Path) -> Result:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from gumbel_transformers import GumbelPruningCallback

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, max_grad_norm=0.0, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    model, callback = Network(), GumbelPruningCallback(config, EXAMPLE)
    optimizer = sgd(model)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    InOrder(model, arguments, train_dataset=data, callbacks=[callback], optimizers=(optimizer, constant)).train()
    assert callback.masks is not None
    return result(callback.masks, callback._running.session, model)


def by_the_loop(config: dict[str, Any], folder: Path) -> Result:
    model = Network()
    loop = MaskingLoop(MaskingSession(model, config, example_inputs=EXAMPLE))
    optimizer = sgd(model)
    loop.start(STEPS)
    for _ in range(EPOCHS):
        for x, y in loader():
            optimizer.zero_grad()
            loop.guard(nn.functional.cross_entropy(model(x), y)).backward()
            loop.before_step()
            optimizer.step()
            loop.after_step()
    return result(loop.finish(), loop.session, model)


def by_hand(config: dict[str, Any], folder: Path) -> Result:
    """As docs/training_loops.md has it: a session's verbs, one loss, one backward."""
    model = Network()
    session = MaskingSession(model, config, example_inputs=EXAMPLE)
    session.start(STEPS)
    optimizers = [torch.optim.SGD(session.weight_parameters(), lr=0.05, momentum=0.9), *session.optimizers()]
    for _ in range(EPOCHS):
        for x, y in loader():
            loss = session.guard(nn.functional.cross_entropy(model(x), y)) + session.loss()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            session.step()
    masks = session.extract()
    session.detach()
    return result(masks, session, model)


DOORS = {
    "run": by_a_run,
    "GumbelPruner": by_nni,
    "GumbelGroupPruner": by_torch_pruning,
    "Lightning": by_lightning,
    "Transformers": by_transformers,
    "by hand": by_hand,
}


@pytest.fixture(autouse=True)
def _trainers_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(autouse=True)
def _every_door_reads_one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each door find the same latencies: measured anew, they would differ by noise, and so would the masks."""

    def steady(model: nn.Module, inputs: Any) -> LatencyTable:
        layers = {name: layer_channels(layer) for name, layer in model.named_modules() if is_matrix(layer)}
        grids = {name: LayerGrid((1, n), (1, m), ((0.1, 0.3), (0.3, 1.0))) for name, (n, m) in layers.items()}
        return LatencyTable("steady", grids, 0.1)

    monkeypatch.setattr(metric_budgets, "measure_table", steady)


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("granularity", ["out_channel", "element"])
@pytest.mark.parametrize("metric", METRICS)
def test_every_door_leads_to_the_same_masks(metric: str | None, granularity: str, door: str, tmp_path: Path) -> None:
    if granularity == "element" and (metric is not None or door == "GumbelGroupPruner"):
        pytest.skip("there are only channels here")
    config = configuration(metric, granularity=granularity)
    expected = by_the_loop(copy.deepcopy(config), tmp_path)
    kept = torch.cat([mask["weight"].flatten() for mask in expected.masks.values()])
    assert 0.2 < float(kept.mean()) < 0.8
    assert all(float(latent.std()) > 0.1 for latent in expected.latents)  # something was learned
    assert_same(DOORS[door](copy.deepcopy(config), tmp_path), expected)


DISTILLATIONS = {
    "kl": {"logits": 0.6, "temperature": 3.0},
    "hidden": {"logits": 0.3, "loss": "mse", "hidden": 0.2, "layers": ["fir.*", "second"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", DISTILLATIONS)
def test_every_door_distills_alike(kind: str, door: str, tmp_path: Path) -> None:
    config = configuration(None, granularity="out_channel")
    alone = by_the_loop(copy.deepcopy(config), tmp_path)
    config["distillation"] = DISTILLATIONS[kind]
    expected = by_the_loop(copy.deepcopy(config), tmp_path)
    assert not any(torch.equal(a, b) for a, b in zip(alone.latents, expected.latents, strict=True))
    assert_same(DOORS[door](copy.deepcopy(config), tmp_path), expected)


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("prior", ["taylor", "group_norm"])
def test_every_door_starts_from_the_same_prior(prior: str, door: str, tmp_path: Path) -> None:
    config = configuration(None, granularity="out_channel")
    alone = by_the_loop(copy.deepcopy(config), tmp_path)
    config["pruning"]["gates"] = {"prior": prior, "warmup": 3}
    config["pruning"]["phases"] = {"dense": 0.05, "fixed": 0.2}  # one step, so that the warm-up has two more
    expected = by_the_loop(copy.deepcopy(config), tmp_path)
    assert not any(torch.equal(a, b) for a, b in zip(alone.latents, expected.latents, strict=True))
    assert_same(DOORS[door](copy.deepcopy(config), tmp_path), expected)


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_no_door_is_changed_by_a_distillation_of_weight_zero(door: str, tmp_path: Path) -> None:
    config = configuration(None, granularity="out_channel")
    expected = by_the_loop(copy.deepcopy(config), tmp_path)
    found = DOORS[door]({**copy.deepcopy(config), "distillation": {"logits": 0}}, tmp_path)
    for ours, theirs in zip(found.latents, expected.latents, strict=True):
        assert torch.equal(ours, theirs)
