from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
import torch

from gumbel_plugin.errors import DataError
from gumbel_plugin.runs.models import build_model
from gumbel_plugin.runs.run import Prepared, prepare, run
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.storage.yaml_files import read_yaml
from gumbel_plugin.training.session import MaskingSession

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def is_downloaded(name: str) -> bool:
    """Whether a configuration's data are not on this machine: torchvision would download them."""
    return name.endswith(("cifar10", "_mnist")) and not name.endswith("fashion_mnist")


def load(name: str) -> RunConfig:
    return RunConfig.load(CONFIGS / f"{name}.yaml")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a few random images in the format of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("fashion")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + values.numpy().tobytes())
    return folder


def prepared(name: str, images: Path) -> Prepared:
    config = load(name)
    assert config.data is not None
    if config.data.name == "fashion_mnist":
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": images, "samples": None})})
    return prepare(config)


def test_there_are_some() -> None:
    assert {"digits", "fashion_mnist_lenet5", "fashion_mnist_lenet300", "papers/aslp_conv4_cifar10"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    config = load(name)
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert RunConfig.load(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("papers/") and is_downloaded(name)])
def test_a_published_protocol_has_a_twin_that_needs_no_download(name: str) -> None:
    method = name.removeprefix("papers/").split("_")[0]
    twins = {each for each in NAMES if not is_downloaded(each) and each.removeprefix("papers/").startswith(method)}
    assert twins or method == "joint"  # whose twin is the example fashion_mnist_lenet300


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is_for(name: str) -> None:
    """A comment for the reader on top, and the sections of a whole run."""
    assert (CONFIGS / f"{name}.yaml").read_text().startswith("# ")
    assert read_yaml(CONFIGS / f"{name}.yaml").keys() >= {"seed", "model", "data", "training", "pruning"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if not is_downloaded(name)])
def test_can_be_prepared(name: str, images: Path) -> None:
    assert prepared(name, images).session.plan.masks


@pytest.mark.parametrize("name", [name for name in NAMES if is_downloaded(name)])
def test_says_that_data_are_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"(CIFAR10|MNIST) .* data.*: set download: true, .*") as caught:
        prepare(load(name))
    assert len(str(caught.value).splitlines()) == 1


class TestStructured:
    @pytest.mark.parametrize(
        ("name", "gates"),
        [
            ("digits", {"conv1": 32, "conv2": 64, "conv3": 64}),
            ("fashion_mnist_lenet5", {"conv1": 20, "conv2": 50, "fc1": 500}),
        ],
    )
    def test_gates_every_hidden_layer(self, name: str, gates: dict[str, int], images: Path) -> None:
        plan = prepared(name, images).session.plan
        assert {key: mask.hard.numel() for key, mask in plan.masks.items()} == gates
        assert {budget.name: budget.ratio for budget in plan.budgets} == dict.fromkeys(gates, 0.5)
        for key, group in plan.groups.items():
            assert key in {part.module for part in group.producers}
        # Each acts at the layer that reads its channels.
        assert list(plan.gated_layers) != list(gates)
        assert all(gated.mask is None and gated.columns is not None for gated in plan.gated_layers.values())


class TestElementwise:
    def test_lenet300_has_one_budget_over_all_weights(self, images: Path) -> None:
        (budget,) = prepared("fashion_mnist_lenet300", images).session.plan.budgets
        assert budget.total == 266_200
        assert budget.ratio == 0.995

    def test_aslp_is_the_published_protocol(self) -> None:
        config = load("papers/aslp_conv4_cifar10")
        assert config.data is not None
        assert config.model is not None
        assert config.data.model_dump(exclude={"root", "download", "samples"}) == {
            "name": "cifar10",
            "batch_size": 256,
            "validation_fraction": 0.1,
            "augment": True,
        }
        assert (config.training.max_epochs, config.training.patience) == (1000, 100)
        pruning = config.pruning
        assert (pruning.weights, pruning.weight_init, pruning.rescale) == ("frozen", "signed_constant", "learned")
        optimizers = [
            (o.name, o.lr, o.momentum, o.weight_decay)
            for o in (pruning.gate_optimizer_config(), pruning.scale_optimizer)
        ]
        assert optimizers == [("sgd", 50.0, 0.9, 0.0), ("sgd", 1e-3, 0.9, 0.0)]
        session = MaskingSession(build_model(config.model.name), pruning)
        assert sum(mask.hard.numel() for mask in session.plan.masks.values()) == 2_425_024
        assert all((budget.ratio, budget.threshold) == (None, None) for budget in session.plan.budgets)
        assert all(bool((logit == 0).all()) for logit in session.gate_parameters())
        assert len(session.scale_parameters()) == len(session.plan.masks) == 7


def test_joint_toy_is_the_published_problem(images: Path) -> None:
    """4-10-10-2 SiLU, half of 2000 points, 7500 full-batch steps of Adam 0.01, temperature 3; 24 weights are ours."""
    ready = prepared("papers/joint_toy", images)
    config, (budget,) = ready.config, ready.session.plan.budgets
    assert config.data is not None
    assert len(ready.data.train) == len(ready.data.test) == config.data.batch_size == 1000
    assert (config.training.max_epochs, config.training.optimizer.name, config.training.optimizer.lr) == (
        7500,
        "adam",
        0.01,
    )
    assert [tuple(p.shape) for p in ready.model.parameters() if p.dim() > 1] == [(10, 4), (10, 10), (2, 10)]
    assert config.pruning.options == {"temperature": 3.0}
    assert budget.total == 160
    assert budget.ratio is not None
    assert round(budget.total * (1 - budget.ratio)) == 24
    inputs, targets = next(iter(ready.data.train))
    assert inputs.abs().max() <= 1
    x1, x2, x3, x4 = inputs.double().tolist()
    expected = torch.tensor([3 * math.sin((x1 - x2) ** 2), (x3 + x4) ** 3])
    torch.testing.assert_close(targets, expected)


@pytest.mark.slow
def test_digits_runs(tmp_path: Path) -> None:
    config = load("digits")
    short = config.training.model_copy(update={"max_epochs": 2, "dense_baseline": False})
    phases = config.pruning.phases.model_copy(update={"dense": 0.0, "fixed": 0.5})
    pruning = config.pruning.model_copy(update={"phases": phases})
    result = run(config.model_copy(update={"training": short, "pruning": pruning}), tmp_path)
    assert result.sparsity == 0.5
    assert result.equivalence.passed
    dense, masked, small = (result.columns[name] for name in ("dense", "masked", "small"))
    # 9 * 64 positions and channels 1-16-32, 9 * 16 positions and 32-32, and 32 features to ten classes.
    assert small.profile.macs == 9 * 64 * (16 + 16 * 32) + 9 * 16 * 32 * 32 + 320
    assert dense.profile.macs == masked.profile.macs == 9 * 64 * (32 + 32 * 64) + 9 * 16 * 64 * 64 + 640
    assert small.score == masked.score
    assert masked.score is not None
    assert masked.score > 50
