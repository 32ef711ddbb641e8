from __future__ import annotations

import csv
import math
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gumbel_plugin.config import PruningSection
from gumbel_plugin.errors import ConfigError, DataError, NonFiniteLossError
from gumbel_plugin.layers.weights import GATES
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.runs.data import make_loader
from gumbel_plugin.runs.epoch_log import EpochLog
from gumbel_plugin.runs.run_config import RunConfig, TrainingConfig
from gumbel_plugin.runs.train import evaluate, fit, loaders, make_loss
from gumbel_plugin.training.session import MaskingSession

ELEMENTS = {"op_types": ["Linear"], "granularity": "element"}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def points(count: int = 48, batch_size: int = 16) -> DataLoader[Any]:
    """Points in three classes that a linear layer can separate: the class is the largest of three inputs."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return make_loader(TensorDataset(x, x[:, :3].argmax(1)), batch_size, shuffle=True, seed=0)


class Turning(Dataset[Any]):
    """The points, with wrong labels after some epochs."""

    def __init__(self, good_epochs: int) -> None:
        self.points = points().dataset.dataset
        self.good = good_epochs * len(self)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.good -= 1
        x, y = self.points[index]
        return x, y if self.good >= 0 else (y + 1) % 3

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self, batch_size=4)


def session_on(model: nn.Module, rule: dict[str, Any] | None = None, **pruning: Any) -> MaskingSession:
    section = PruningSection.model_validate({"config_list": [{**ELEMENTS, **(rule or {})}], **pruning})
    return MaskingSession(model, section)


def training(**values: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"accelerator": "cpu", "max_epochs": 4, **values})


def fit_and_read(
    tmp_path: Path, model: nn.Module, session: MaskingSession | None, config: TrainingConfig, **more: Any
) -> list[dict[str, str]]:
    """Train with an epoch log and return its rows."""
    path = tmp_path / "log.csv"
    fit(model, session, config, points(), logger=EpochLog(config.max_epochs, path), **more)
    return read(path)


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def steps_of() -> Iterator[Counter[str]]:
    """Count the steps of every optimizer, by its class and number of parameters."""
    counts: Counter[str] = Counter()

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        counts[f"{type(optimizer).__name__} {sum(len(group['params']) for group in optimizer.param_groups)}"] += 1

    handle = register_optimizer_step_post_hook(count)
    yield counts
    handle.remove()


class TestSteps:
    @pytest.mark.parametrize("steps", [1, 3, 7])
    def test_max_steps_counts_the_steps_of_the_weights(self, steps: int, steps_of: Counter[str]) -> None:
        model = network()
        session = session_on(model, rescale="learned")
        fit(model, session, training(), points(), max_steps=steps)  # three batches an epoch
        assert steps_of == {"Adam 4": steps, "Adam 2": steps, "SGD 2": steps}
        assert session.steps == session.total_steps == steps

    def test_max_steps_without_gates_and_with_frozen_weights(self, steps_of: Counter[str]) -> None:
        fit(network(), None, training(), points(), max_steps=5)
        assert steps_of == {"Adam 4": 5}
        steps_of.clear()
        model = network()
        fit(model, session_on(model, weights="frozen"), training(), points(), max_steps=5)
        assert steps_of == {"SGD 2": 5}

    def test_max_steps_may_exceed_max_epochs(self, steps_of: Counter[str]) -> None:
        fit(network(), None, training(max_epochs=1), points(), max_steps=8)
        assert steps_of == {"Adam 4": 8}

    def test_epochs(self, tmp_path: Path, steps_of: Counter[str]) -> None:
        model = network()
        session = session_on(model, {"sparse_ratio": 0.5}, phases={"dense": 0.25, "fixed": 0.5})
        rows = fit_and_read(tmp_path, model, session, training(max_epochs=4))
        assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
        assert session.steps == session.total_steps == 12
        assert steps_of["Adam 4"] == 12
        assert session.phase is Phase.FIXED
        assert float(rows[0]["sparsity"]) == 0
        assert float(rows[-1]["sparsity"]) == 0.5
        assert not model.training


@pytest.mark.slow
class TestFrozenWeights:
    @pytest.mark.parametrize("rescale", ["none", "learned"])
    def test_only_gates_and_scales_learn(self, rescale: str) -> None:
        model = network()
        session = session_on(model, weights="frozen", weight_init="signed_constant", rescale=rescale)
        accuracy = evaluate(model, points())
        fit(model, session, training(max_epochs=20), points())
        biases = [model[0].bias.clone(), model[2].bias.clone()]
        magnitudes = [model[i].weight.abs().unique() for i in (0, 2)]
        assert all(len(magnitude) == 1 for magnitude in magnitudes)  # still one magnitude a layer, nothing closed
        scales = [scale.item() for scale in session.scale_parameters()] or [1.0, 1.0]
        assert (rescale == "learned") == (scales != [1.0, 1.0])
        learned = evaluate(model, points())
        session.extract()
        session.detach()
        for layer, magnitude, scale in zip((model[0], model[2]), magnitudes, scales, strict=True):
            left = layer.weight.abs().unique()
            assert torch.equal(left, torch.tensor([0.0, float(magnitude * torch.tensor(scale).abs())]))
        torch.manual_seed(0)
        fresh = [nn.Linear(6, 12).bias, nn.Linear(12, 3).bias]
        assert all(torch.equal(a, b) for a, b in zip(biases, fresh, strict=True))
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert evaluate(model, points()) == learned > accuracy + 20

    def test_on_digits(self) -> None:
        """Method A on real data: an untrained network's subnetwork recognizes digits, without one weight learned."""
        config = RunConfig.load({"data": {"name": "digits"}, "pruning": {"config_list": [ELEMENTS]}})
        train, _, test = loaders(config)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
        session = session_on(model, weights="frozen", weight_init="signed_constant", rescale="learned")
        fit(model, session, training(max_epochs=6), train)
        session.extract()
        assert 0.4 < session.status().sparsity < 0.6
        assert evaluate(model, test) > 80


class TestLearningRate:
    def rates(self, rows: list[dict[str, str]]) -> list[float]:
        return [float(row["learning_rate"]) for row in rows]

    def test_cosine(self, tmp_path: Path) -> None:
        rows = fit_and_read(tmp_path, network(), None, training(lr_schedule="cosine", optimizer={"lr": 0.1}))
        expected = [0.1 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
        assert self.rates(rows) == pytest.approx(expected)

    @pytest.mark.parametrize("schedule", ["constant", "cosine"])
    def test_decay_begins_when_the_masks_are_fixed(self, tmp_path: Path, schedule: str) -> None:
        model = network()
        session = session_on(model, phases={"dense": 0.25, "fixed": 0.5})
        config = training(max_epochs=8, lr_schedule=schedule, lr_decay=0.5, optimizer={"lr": 0.1})
        rows = fit_and_read(tmp_path, model, session, config)
        cosine = [(1 + math.cos(math.pi * epoch / 8)) / 2 if schedule == "cosine" else 1 for epoch in range(8)]
        # The masks are fixed after the last step of the fourth epoch.
        decay = [1, 1, 1, 1, 0.5, 0.25, 0.125, 0.0625]
        assert self.rates(rows) == pytest.approx([0.1 * c * d for c, d in zip(cosine, decay, strict=True)])

    def test_there_is_none_for_frozen_weights(self, tmp_path: Path) -> None:
        model = network()
        rows = fit_and_read(tmp_path, model, session_on(model, weights="frozen"), training(max_epochs=1))
        assert rows[0]["learning_rate"] == ""

    def test_clipping_is_for_the_weights(self) -> None:
        model = network()
        before = model[0].weight.detach().clone()
        session = session_on(model, gate_optimizer={"name": "sgd", "lr": 50.0})
        settings = training(max_epochs=1, gradient_clip=1e-6, optimizer={"name": "sgd", "lr": 1.0})
        fit(model, session, settings, points())
        assert 0 < (model[0].weight - before).norm() < 1e-5
        assert (session.gate_parameters()[0] - 3).abs().max() > 1e-3


class TestPatience:
    def test_stops_when_nothing_improves(self, tmp_path: Path) -> None:
        config = training(max_epochs=20, patience=3, optimizer={"lr": 1e-12})
        rows = fit_and_read(tmp_path, network(), None, config, validation=points())
        assert len(rows) == 1 + 3  # the first epoch is the best one

    @pytest.mark.slow
    def test_does_not_count_before_the_masks_are_fixed(self, tmp_path: Path) -> None:
        model = network()
        session = session_on(
            model, gate_optimizer={"lr": 1e-12}, phases={"dense": 0.3, "fixed": 0.5}, rule={"sparse_ratio": 0.5}
        )
        config = training(max_epochs=20, patience=2, optimizer={"lr": 1e-12})
        rows = fit_and_read(tmp_path, model, session, config, validation=points())
        assert len(rows) == 10 + 2  # masks are fixed at the end of epoch 10, which is the best one then

    @pytest.mark.slow
    def test_does_not_count_while_the_budget_falls(self, tmp_path: Path) -> None:
        model = network()
        session = session_on(model, {"sparse_ratio": 0.5}, gate_optimizer={"lr": 1e-12}, budget={"ramp": 0.5})
        config = training(max_epochs=20, patience=2, optimizer={"lr": 1e-12})
        rows = fit_and_read(tmp_path, model, session, config, validation=points())
        assert len(rows) == 10 + 2

    @pytest.mark.slow
    @pytest.mark.parametrize("ratio", [0.9, None])
    def test_gives_the_best_settled_state_back(self, tmp_path: Path, ratio: float | None) -> None:
        """The labels turn wrong in the end, so that the last state is bad; the best of all is before the masks."""
        model = network()
        session = session_on(model, {"sparse_ratio": ratio}, phases={"dense": 0.5, "fixed": 0.3} if ratio else {})
        config = training(max_epochs=20, patience=20, optimizer={"lr": 0.05})
        path, validation = tmp_path / "log.csv", points(batch_size=48)
        fit(model, session, config, Turning(good_epochs=17).loader(), validation, logger=EpochLog(20, path))
        scores = [float(row["validation_score"]) for row in read(path)]
        settled = scores[13:] if ratio else scores  # masks are fixed with the last step of epoch 14
        assert settled[-1] < max(settled) - 20
        assert not ratio or max(settled) < max(scores)
        assert evaluate(model, validation) == pytest.approx(max(settled))
        session.extract()
        session.detach()
        assert evaluate(model, validation) == pytest.approx(max(settled))
        if ratio:
            closed = sum(int((layer.weight == 0).sum()) for layer in (model[0], model[2]))
            assert closed == int(72 * ratio) + int(36 * ratio)

    def test_without_a_settled_state_the_last_one_stays(self) -> None:
        model = network()
        session = session_on(model, {"sparse_ratio": 0.5}, phases={"dense": 0.9})
        fit(model, session, training(patience=1), points(), points(), max_steps=3)
        assert session.steps == 3

    def test_needs_validation_data(self) -> None:
        model = network()
        session = session_on(model)
        with pytest.raises(ConfigError, match=r"training\.patience = 2: it needs validation data"):
            fit(model, session, training(patience=2), points())
        assert not hasattr(model[0], GATES)  # nothing was started


class TestNonFiniteLoss:
    class Poisoned(Dataset[Any]):
        """Everything is fine until the sixth batch of eight."""

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return torch.full((6,), math.nan if index >= 40 else 1.0), torch.tensor(0)

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self.Poisoned(), batch_size=8)

    def test_dense(self) -> None:
        with pytest.raises(NonFiniteLossError, match="loss became nan at step 5"):
            fit(network(), None, training(), self.loader())

    def test_gated_keeps_a_good_state(self) -> None:
        model = network()
        with pytest.raises(NonFiniteLossError, match="loss became nan at step 5"):
            fit(model, session_on(model), training(), self.loader())
        assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


class TestLightning:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("precision", "inside"),
        [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("64-true", torch.float64)],
    )
    def test_precision_is_passed_on_and_undone(self, precision: str, inside: torch.dtype) -> None:
        model = network()
        seen: set[torch.dtype] = set()
        model[0].register_forward_hook(lambda module, args, output: seen.add(output.dtype))
        session = session_on(model, {"sparse_ratio": 0.5}, rescale="learned", phases={"fixed": 0.5})
        fit(model, session, training(precision=precision), points(), points())
        session.extract()
        session.detach()
        assert seen == {inside}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert int((model[0].weight == 0).sum()) == 36

    @pytest.mark.parametrize(
        "settings", [{"accelerator": "abacus"}, {"devices": "many"}, {"strategy": "none"}, {"precision": "8-true"}]
    )
    def test_what_it_refuses_is_a_configuration_error(self, settings: dict[str, str]) -> None:
        model = network()
        with pytest.raises(ConfigError, match=f"Lightning refuses .*{next(iter(settings))} '.*'"):
            fit(model, session_on(model), training(**settings), points())
        assert not hasattr(model[0], GATES)

    def test_clipping_scaled_gradients_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"training\.gradient_clip = 1\.0"):
            fit(network(), None, training(precision="16-mixed", gradient_clip=1.0), points())

    def test_no_steps_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="max_steps is 0"):
            fit(network(), None, training(), points(), max_steps=0)

    @pytest.mark.parametrize("part", ["train", "validation"])
    def test_no_data_is_refused(self, part: str) -> None:
        empty = DataLoader(TensorDataset(torch.zeros(0, 6), torch.zeros(0).long()))
        loaders = {"train": points(), "validation": points(), part: empty}
        with pytest.raises(DataError, match=f"{part}: the loader has no batch"):
            fit(network(), None, training(), **loaders)
        with pytest.raises(DataError, match="no data to evaluate on"):
            evaluate(network(), empty)

    def test_it_is_quiet(self, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        fit(network(), None, training(max_epochs=1), points())
        assert capfd.readouterr() == ("", "")
        assert list(tmp_path.iterdir()) == []

    def test_an_interrupt_stays_one(self) -> None:
        class Interrupted(Dataset[Any]):
            def __len__(self) -> int:
                return 8

            def __getitem__(self, index: int) -> Any:
                raise KeyboardInterrupt

        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            fit(network(), None, training(), DataLoader(Interrupted()))
        assert signal.getsignal(signal.SIGINT) is handler

    def test_a_terminated_training_is_no_success(self) -> None:
        class Terminated(Dataset[Any]):
            def __len__(self) -> int:
                return 8

            def __getitem__(self, index: int) -> Any:
                signal.raise_signal(signal.SIGTERM)
                return torch.zeros(6), torch.tensor(0)

        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as caught:
            fit(network(), None, training(), DataLoader(Terminated()))
        assert caught.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is handler


class TestEpochLog:
    @pytest.mark.slow
    def test_lines_are_few_and_plain(self, tmp_path: Path) -> None:
        lines: list[str] = []
        model = network()
        session = session_on(model, {"sparse_ratio": 0.5}, phases={"fixed": 0.5})
        path = tmp_path / "log.csv"
        log = EpochLog(40, path, lines.append)
        fit(model, session, training(max_epochs=40), points(), points(), logger=log)
        assert [line.split(":")[0] for line in lines] == [f"epoch {n}/40" for n in (1, *range(4, 41, 4))]
        last = read(path)[-1]
        loss, score = float(last["loss"]), float(last["validation_score"])
        assert lines[-1].startswith(f"epoch 40/40: loss {loss:.4f}, sparsity 0.5000, validation {score:.2f}, ")

    def test_silence_is_broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines: list[str] = []
        log = EpochLog(1000, None, lines.append)
        now = log._began
        for epoch in range(5):
            monkeypatch.setattr("time.monotonic", lambda epoch=epoch: now + 20 * (epoch + 1))
            log.log_metrics({"epoch": epoch, "loss": 1.0})
        assert [line.split("/")[0] for line in lines] == ["epoch 1", "epoch 3", "epoch 5"]

    def test_the_loss_is_the_mean_over_the_epoch(self, tmp_path: Path) -> None:
        model = network()
        batch = next(iter(points(count=40, batch_size=40)))
        expected = nn.functional.cross_entropy(model(batch[0]), batch[1]).item()
        path = tmp_path / "log.csv"
        config = training(max_epochs=1, optimizer={"lr": 1e-12})
        fit(model, None, config, points(count=40), logger=EpochLog(1, path))  # batches of 16, 16 and 8
        assert float(read(path)[0]["loss"]) == pytest.approx(expected)


class TestEvaluate:
    def test_every_sample_counts_once(self) -> None:
        model = network()
        x, y = next(iter(points(count=40, batch_size=40)))
        expected = float((model(x).argmax(1) == y).float().mean()) * 100
        assert evaluate(model, points(count=40)) == pytest.approx(expected)
        assert model.training

    def test_regression(self) -> None:
        model = nn.Linear(2, 2)
        data = TensorDataset(torch.randn(10, 2), torch.randn(10, 2))
        x, y = data.tensors
        expected = -nn.functional.mse_loss(model(x), y).item()
        assert evaluate(model, DataLoader(data, batch_size=4), "mse") == pytest.approx(expected)


class TestMakeLoss:
    def test_smoothed_targets_are_shared_with_all_classes(self) -> None:
        outputs, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
        smooth = 0.9 * nn.functional.one_hot(targets, 4) + 0.1 / 4
        expected = -(smooth * outputs.log_softmax(1)).sum(1).mean()
        assert float(make_loss(training(label_smoothing=0.1))(outputs, targets)) == pytest.approx(float(expected))

    def test_of_numbers(self) -> None:
        outputs, targets = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
        assert float(make_loss(training(loss="mse"))(outputs, targets)) == pytest.approx(2.5)

    def test_numbers_have_nothing_to_smooth(self) -> None:
        with pytest.raises(ValueError, match=r"label_smoothing 0\.1 is for the loss 'cross_entropy', not 'mse'"):
            training(loss="mse", label_smoothing=0.1)


class TestLoaders:
    def test_are_new_each_time(self) -> None:
        config = RunConfig.load(
            {"data": {"name": "digits", "validation_fraction": 0.2}, "pruning": {"config_list": [ELEMENTS]}}
        )
        first, second = loaders(config), loaders(config)
        assert first[1] is not None
        for a, b in zip(first, second, strict=True):
            assert all(torch.equal(x[0], y[0]) for x, y in zip(a, b, strict=True))
        sizes = [len(loader.dataset) for loader in first]
        assert sizes == [1150, 288, 359]

    def test_need_data(self) -> None:
        with pytest.raises(ConfigError, match="data: required"):
            loaders(RunConfig.load([ELEMENTS]))
