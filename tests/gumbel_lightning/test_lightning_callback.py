"""The callback on both Lightnings: as the library's own loop, through checkpoints, with foreign optimizers."""

from __future__ import annotations

import copy
import importlib
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gumbel_lightning import GumbelPruning
from gumbel_plugin import verify_equivalence
from gumbel_plugin.errors import ConfigError, LifecycleError, NonFiniteLossError, TargetError
from gumbel_plugin.training.session import MaskingSession, PruningSection
from gumbel_torch_pruning import find_groups

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
RULES = [{"op_names": ["0", "2"], "sparse_ratio": 0.5}]
CONFIG = {"pruning": {"config_list": RULES, "phases": {"dense": 0.2, "fixed": 0.3}}, "seed": 3}
EXAMPLE = torch.zeros(2, 6)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 8), nn.SiLU(), nn.Linear(8, 3))


def loader(count: int = 48) -> DataLoader[Any]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16)


def module(package: str, **options: Any) -> Any:
    """Return somebody's module: automatic optimization, all its parameters in one optimizer."""
    base = importlib.import_module(package).LightningModule

    class Classifier(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.example_input_array = EXAMPLE
            self.poison = options.get("poison", 1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.poison * nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 0.01)

    return Classifier()


def trainer(package: str, callback: Any, folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"max_epochs": 4, "accelerator": "cpu", "logger": False, **options}
    settings.setdefault("enable_checkpointing", False)
    return importlib.import_module(package).Trainer(
        callbacks=[callback, *settings.pop("more", [])],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **settings,
    )


@pytest.fixture(autouse=True)
def _lightning_may_hint() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("package", PACKAGES)
class TestBoth:
    def test_four_lines(self, package: str, tmp_path: Path) -> None:
        callback, task = GumbelPruning(CONFIG, attribute="net"), module(package)
        trainer(package, callback, tmp_path).fit(task, loader())
        small = callback.shrink()
        assert [layer.out_features for layer in small if isinstance(layer, nn.Linear)] == [6, 4, 3]
        assert verify_equivalence(task.net, small, EXAMPLE).passed
        assert not list(task.net.named_buffers())  # plain again
        assert callback.masks is not None
        assert set(callback.masks) == {"0", "2"}

    def test_it_is_the_librarys_own_loop(self, package: str, tmp_path: Path) -> None:
        """Bit for bit what the verbs of a session do in a hand-written loop."""
        callback, task = GumbelPruning(CONFIG, attribute="net"), module(package)
        trainer(package, callback, tmp_path).fit(task, loader())

        model = network()
        section = PruningSection.model_validate(CONFIG["pruning"])
        session = MaskingSession(model, section, find_groups(model, EXAMPLE), 3)
        weights = torch.optim.Adam(model.parameters(), 0.01)
        session.start(12)
        own = session.optimizers()
        for _ in range(4):
            for x, y in loader():
                loss = session.guard(nn.functional.cross_entropy(model(x), y)) + session.loss()
                for optimizer in (weights, *own):
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in (weights, *own):
                    optimizer.step()
                session.step()
        session.extract()
        session.detach()
        for ours, theirs in zip(task.net.parameters(), model.parameters(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
            assert torch.equal(ours == 0, theirs == 0)

    @pytest.mark.slow
    def test_checkpoints_hold_gates_and_schedules(self, package: str, tmp_path: Path) -> None:
        """Stopped after two epochs and resumed by Lightning's own means, the result is the same."""
        whole = module(package)
        trainer(package, GumbelPruning(CONFIG, attribute="net"), tmp_path).fit(whole, loader())
        checkpoint = importlib.import_module(f"{package}.callbacks").ModelCheckpoint
        saving = checkpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer(
            package, GumbelPruning(CONFIG, attribute="net"), tmp_path, more=[saving], enable_checkpointing=True
        ).fit(module(package), loader())
        resumed, callback = module(package), GumbelPruning(CONFIG, attribute="net")
        trainer(package, callback, tmp_path).fit(resumed, loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
        for ours, theirs in zip(resumed.net.parameters(), whole.net.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_the_module_as_the_network(self, package: str, tmp_path: Path) -> None:
        rules = [{"op_names": ["net.0"], "sparse_ratio": 0.5}]
        callback, task = GumbelPruning(rules), module(package)
        trainer(package, callback, tmp_path).fit(task, loader())
        assert callback.masks is not None
        assert int(callback.masks["net.0"]["weight"].any(1).sum()) == 6

    def test_accumulated_gradients_are_one_step(self, package: str, tmp_path: Path) -> None:
        callback = GumbelPruning(CONFIG, attribute="net")
        trainer(package, callback, tmp_path, accumulate_grad_batches=3).fit(module(package), loader())
        assert callback._running.session.steps == callback._running.session.total_steps == 4


class Watching(importlib.import_module("lightning.pytorch").Callback):  # type: ignore[misc, name-defined]
    """Notes what the gated network returns in eval mode at the end of every epoch."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.eval()
        with torch.no_grad():
            self.outputs.append(pl_module.net(EXAMPLE + 1))
        pl_module.train()


class TestCheckpoints:
    """Files of a training, loaded with and without the callback."""

    def save(self, tmp_path: Path) -> tuple[Any, GumbelPruning, Watching, Any]:
        pl = importlib.import_module("lightning.pytorch")
        saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        task, callback, watching = module("lightning.pytorch"), GumbelPruning(CONFIG, attribute="net"), Watching()
        fitter = trainer("lightning.pytorch", callback, tmp_path, more=[watching, saving], enable_checkpointing=True)
        fitter.fit(task, loader())
        return task, callback, watching, fitter

    def test_a_plain_module_loads_what_the_gated_one_computed(self, tmp_path: Path) -> None:
        *_, watching, _ = self.save(tmp_path)
        sparsities = []
        for epoch, outputs in enumerate(watching.outputs):  # dense, learning, fixed
            plain = module("lightning.pytorch")
            plain.load_state_dict(torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"])
            assert torch.equal(plain.eval().net(EXAMPLE + 1), outputs)
            sparsities.append(float((plain.net[2].weight == 0).float().mean()))
        assert sparsities[0] < sparsities[-1] == 0.5

    def test_the_best_one_is_tested_after_the_fit(self, tmp_path: Path) -> None:
        task, _, _, fitter = self.save(tmp_path)
        task.test_step = lambda batch: task.log("loss", nn.functional.cross_entropy(task.net(batch[0]), batch[1]))
        assert fitter.test(task, loader(), ckpt_path="best", verbose=False)[0]["loss"] > 0
        assert type(task).load_from_checkpoint(tmp_path / "epoch=1.ckpt").net[0].out_features == 12

    def test_a_training_killed_after_its_last_one_is_finished(self, tmp_path: Path) -> None:
        whole, first, *_ = self.save(tmp_path)
        resumed, second = module("lightning.pytorch"), GumbelPruning(CONFIG, attribute="net")
        trainer("lightning.pytorch", second, tmp_path).fit(resumed, loader(), ckpt_path=tmp_path / "epoch=3.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(resumed.net.parameters(), whole.net.parameters(), strict=True))
        assert first.masks is not None
        assert second.masks is not None
        assert all(torch.equal(mask["weight"], second.masks[name]["weight"]) for name, mask in first.masks.items())
        assert [layer.out_features for layer in second.shrink() if isinstance(layer, nn.Linear)] == [6, 4, 3]


class TestLightningsOwnIdioms:
    def widths(self, callback: GumbelPruning) -> list[int]:
        return [layer.out_features for layer in callback.shrink() if isinstance(layer, nn.Linear)]

    def test_data_that_setup_makes(self, tmp_path: Path) -> None:
        class Own(type(module("lightning.pytorch"))):  # type: ignore[misc]
            def setup(self, stage: str) -> None:
                self.data = loader()

            def train_dataloader(self) -> DataLoader[Any]:
                return self.data

        callback = GumbelPruning(CONFIG, attribute="net")
        trainer("lightning.pytorch", callback, tmp_path).fit(Own())
        assert callback._running.session.total_steps == 12
        assert self.widths(callback) == [6, 4, 3]

    def test_a_network_that_configure_model_makes(self, tmp_path: Path) -> None:
        class Late(type(module("lightning.pytorch"))):  # type: ignore[misc]
            def configure_model(self) -> None:
                if self.net is None:
                    self.net = network()

        task, callback = Late(), GumbelPruning(CONFIG, EXAMPLE, "net")
        task.net = task.example_input_array = None
        trainer("lightning.pytorch", callback, tmp_path).fit(task, loader())
        assert self.widths(callback) == [6, 4, 3]

    @pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
    def test_a_network_of_another_dtype(self, precision: str, tmp_path: Path) -> None:
        callback = GumbelPruning(CONFIG, EXAMPLE, "net")
        trainer("lightning.pytorch", callback, tmp_path, precision=precision).fit(module("lightning.pytorch"), loader())
        assert self.widths(callback) == [6, 4, 3]

    @pytest.mark.slow
    def test_averages_of_the_weights(self, tmp_path: Path) -> None:
        callbacks = importlib.import_module("lightning.pytorch").callbacks
        for average in (
            callbacks.EMAWeightAveraging(decay=0.5, use_buffers=False),
            callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=1, annealing_epochs=1),
        ):
            task, callback = module("lightning.pytorch"), GumbelPruning(CONFIG, attribute="net")
            trainer("lightning.pytorch", callback, tmp_path, more=[average]).fit(task, loader())
            assert self.widths(callback) == [6, 4, 3]
            assert verify_equivalence(task.net, callback.shrink(), EXAMPLE).passed

    def test_a_search_for_the_learning_rate(self, tmp_path: Path) -> None:
        tuner = importlib.import_module("lightning.pytorch.tuner")
        task, callback = module("lightning.pytorch"), GumbelPruning(CONFIG, attribute="net")
        task.lr = 0.01
        fitter = trainer("lightning.pytorch", callback, tmp_path)
        tuner.Tuner(fitter).lr_find(task, loader(), num_training=4)
        assert not list(task.net.named_buffers())
        fitter.fit(task, loader())
        assert self.widths(callback) == [6, 4, 3]

    @pytest.mark.slow
    @pytest.mark.parametrize("package", PACKAGES)
    @pytest.mark.parametrize("moment", ["on_train_start", "on_before_zero_grad", "on_train_epoch_end", "on_fit_end"])
    def test_ctrl_c_leaves_a_plain_module(self, package: str, moment: str, tmp_path: Path) -> None:
        task, callback = module(package), GumbelPruning(CONFIG, attribute="net")
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        setattr(task, moment, lambda *_: signal.raise_signal(signal.SIGINT))
        try:
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                trainer(package, callback, tmp_path).fit(task, loader())
        finally:
            signal.signal(signal.SIGINT, handler)
        assert task.net.state_dict().keys() == network().state_dict().keys()
        assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in task.net.modules())
        if moment == "on_fit_end":  # the masks were decided by then
            assert self.widths(callback) == [6, 4, 3]
            return
        with pytest.raises(LifecycleError, match="there are no masks yet"):
            callback.shrink()
        delattr(task, moment)
        trainer(package, callback, tmp_path).fit(task, loader())
        assert self.widths(callback) == [6, 4, 3]

    def test_a_training_that_failed_leaves_a_plain_module(self, tmp_path: Path) -> None:
        task, callback = module("lightning.pytorch", poison=float("nan")), GumbelPruning(CONFIG, attribute="net")
        with pytest.raises(NonFiniteLossError):
            trainer("lightning.pytorch", callback, tmp_path).fit(task, loader())
        assert [name for name, _ in task.net.named_parameters()] == [name for name, _ in network().named_parameters()]
        task.poison = 1.0
        trainer("lightning.pytorch", callback, tmp_path).fit(task, loader())
        assert self.widths(callback) == [6, 4, 3]


class TestRefusals:
    def fit(self, callback: GumbelPruning, tmp_path: Path, task: Any = None, **options: Any) -> None:
        trainer(PACKAGES[0], callback, tmp_path, **options).fit(task or module(PACKAGES[0]), loader())

    def test_float16(self) -> None:
        """On a machine without a GPU Lightning takes bfloat16 instead, so that no Trainer here has this precision."""
        callback = GumbelPruning(CONFIG, attribute="net")
        with pytest.raises(ConfigError, match=r"Trainer\(precision='16-mixed'\): .* use bfloat16"):
            callback.setup(SimpleNamespace(precision="16-mixed"), module(PACKAGES[0]), "fit")

    def test_averages_that_would_lose_the_gates(self, tmp_path: Path) -> None:
        average = importlib.import_module("lightning.pytorch").callbacks.EMAWeightAveraging
        callback = GumbelPruning(CONFIG, attribute="net")
        with pytest.raises(ConfigError, match="pass use_buffers=False"):
            self.fit(callback, tmp_path, more=[average()])
        with pytest.raises(ConfigError, match="GumbelPruning goes before EMAWeightAveraging"):
            trainer(PACKAGES[0], average(), tmp_path, more=[callback]).fit(module(PACKAGES[0]), loader())

    def test_no_example(self, tmp_path: Path) -> None:
        task = module(PACKAGES[0])
        task.example_input_array = None
        with pytest.raises(ConfigError, match="example_inputs"):
            self.fit(GumbelPruning(CONFIG, attribute="net"), tmp_path, task)

    def test_names_that_match_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="'model'"):
            self.fit(GumbelPruning(CONFIG, attribute="model"), tmp_path)
        with pytest.raises(TargetError, match="'conv9' matches no module"):
            self.fit(GumbelPruning([{"op_names": ["conv9"]}], attribute="net"), tmp_path)

    def test_before_and_after(self, tmp_path: Path) -> None:
        callback = GumbelPruning(CONFIG, attribute="net")
        with pytest.raises(LifecycleError, match="fit a Trainer"):
            callback.shrink()
        self.fit(callback, tmp_path)
        with pytest.raises(LifecycleError, match="trained once"):
            self.fit(callback, tmp_path)

    def test_a_loss_that_is_no_number(self, tmp_path: Path) -> None:
        with pytest.raises(NonFiniteLossError):
            self.fit(GumbelPruning(CONFIG, attribute="net"), tmp_path, module(PACKAGES[0], poison=float("inf")))


def test_a_copy_of_a_gated_module_works(tmp_path: Path) -> None:
    """Complaint: deepcopy fails."""
    copies = []

    class Copying(importlib.import_module("lightning.pytorch").Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.eval()
            copied = copy.deepcopy(pl_module.net)
            with torch.no_grad():
                copies.append(torch.equal(copied(EXAMPLE + 1), pl_module.net(EXAMPLE + 1)))
            pl_module.train()

    callback = GumbelPruning(CONFIG, attribute="net")
    trainer(PACKAGES[0], callback, tmp_path, more=[Copying()]).fit(module(PACKAGES[0]), loader())
    assert copies == [True] * 12
