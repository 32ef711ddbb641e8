"""Data sets of the user's own, named in a configuration by a factory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from gumbel_plugin.errors import ConfigError, DataError, GumbelPluginError
from gumbel_plugin.runs.data import load_data
from gumbel_plugin.runs.run import run
from gumbel_plugin.runs.run_config import RunConfig

MODULE = """
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

GENERATOR = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(60, 1, 8, 8, generator=GENERATOR), torch.arange(60) % 3


class Fresh(Dataset):
    "As a transform draws anew each time, nothing may be kept from an earlier look."
    targets = LABELS.tolist()
    looks = 0

    def __len__(self):
        return 60

    def __getitem__(self, index):
        type(self).looks += 1
        return IMAGES[index] + 0.01 * self.looks, int(LABELS[index])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def one(): return TensorDataset(IMAGES, LABELS)
def two(): return TensorDataset(IMAGES[:40], LABELS[:40]), TensorDataset(IMAGES[40:], LABELS[40:])
def fresh(): return Fresh()
def numbers(): return TensorDataset(IMAGES, torch.randn(60, 2))
def nothing(): return None
def stream(): return Stream()
def tiny(): return TensorDataset(IMAGES[:1], LABELS[:1])
def fails(): raise OSError("no such folder")
def negative(): return TensorDataset(IMAGES, LABELS - 1)
def single(): return TensorDataset(IMAGES)
def words(): return [("an image", 3)] * 5
constant = 3
"""


@pytest.fixture(scope="module", autouse=True)
def own_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_data_of_a_test.py").write_text(MODULE, encoding="utf-8")
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("own_data_of_a_test", None)


def named(factory: str) -> str:
    return f"own_data_of_a_test:{factory}"


def size(part: Dataset[Any] | None) -> int:
    return 0 if part is None else len(part)  # type: ignore[arg-type]


def test_a_fifth_of_one_data_set_is_for_the_test_whatever_the_seed() -> None:
    first, second = (load_data(named("one"), validation_fraction=0.25, seed=seed) for seed in (0, 1))
    assert [size(part) for part in (first.train, first.validation, first.test)] == [36, 12, 12]
    assert (first.num_classes, first.input_shape, first.is_regression) == (3, (1, 8, 8), False)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first.test, second.test, strict=True))
    parts = [float(image.sum()) for part in (first.train, first.validation, first.test) for image, _ in part]
    assert len(set(parts)) == 60


def test_a_pair_is_taken_as_it_is() -> None:
    bundle = load_data(named("two"), samples=10)
    assert [size(part) for part in (bundle.train, bundle.validation, bundle.test)] == [10, 0, 20]


def test_a_transform_is_asked_each_time() -> None:
    bundle = load_data(named("fresh"))
    assert bundle.num_classes == 3
    assert not torch.equal(bundle.train[0][0], bundle.train[0][0])


def test_numbers_are_a_regression() -> None:
    bundle = load_data(named("numbers"))
    assert bundle.is_regression
    assert bundle.num_classes == 2


@pytest.mark.parametrize(
    ("factory", "error", "reason"),
    [
        ("nothing", ConfigError, "returned None; it must be a torch.utils.data.Dataset with a length, or a pair"),
        ("stream", ConfigError, "it must be a torch.utils.data.Dataset with a length"),
        ("words", ConfigError, "it must be a torch.utils.data.Dataset"),
        ("tiny", DataError, "holds 1 samples; at least two are needed"),
        ("fails", ConfigError, r"its factory raises OSError\('no such folder'\)"),
        ("negative", DataError, "holds the label -1; classes are numbered from 0 on"),
        ("single", DataError, "(?s)item 0 is .*it must be a pair of a tensor and a target"),
        ("constant", ConfigError, "has no callable 'constant'"),
        ("oen", ConfigError, "has no callable 'oen'; did you mean 'one'"),
    ],
)
def test_what_is_no_data_set(factory: str, error: type[GumbelPluginError], reason: str) -> None:
    with pytest.raises(error, match=reason):
        load_data(named(factory))


@pytest.mark.parametrize("settings", [{"root": "somewhere"}, {"download": True}, {"augment": True}, {"samples": 99}])
def test_what_is_for_known_sets_only(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load_data(named("one"), **settings)


def test_a_run_trains_on_it(tmp_path: Path) -> None:
    config = {
        "model": {"name": "digits_cnn", "num_classes": 3},
        "data": {"name": named("fresh"), "batch_size": 16},
        "training": {"max_epochs": 1},
        "report": {"html": False, "latency_batches": []},
        "pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]},
    }
    result = run(RunConfig.load(config), tmp_path / "run")
    assert result.sparsity == pytest.approx(0.5, abs=0.02)
    assert result.equivalence.passed
