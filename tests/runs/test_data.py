from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from gumbel_plugin.errors import ConfigError, DataError, MissingExtraError
from gumbel_plugin.runs.data import DataBundle, ImageDataset, load_data, make_loader, read_idx

IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx_arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (50, 5, 4))
    test_images = random.integers(0, 256, (20, 5, 4))
    return dict(zip(IDX_NAMES, (images, np.arange(50) % 10, test_images, np.arange(20) % 10), strict=True))


def write_idx(folder: Path, *, zipped: bool, **replaced: np.ndarray) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = idx_arrays() | replaced
    for name, array in arrays.items():
        content = idx_bytes(array)
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    return arrays


def samples(dataset: torch.utils.data.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(inputs), torch.stack(targets)


def rows(dataset: torch.utils.data.Dataset) -> set[bytes]:
    return {x.numpy().tobytes() for x in samples(dataset)[0]}


@pytest.fixture(scope="module")
def fashion() -> DataBundle:
    try:
        return load_data("fashion_mnist")
    except DataError as error:  # CI installs it; a newcomer may not be able to
        pytest.skip(str(error))


@pytest.mark.slow
class TestFashionMnist:
    def test_sizes_and_types(self, fashion: DataBundle) -> None:
        assert (len(fashion.train), len(fashion.test)) == (60_000, 10_000)
        assert fashion.validation is None
        assert (fashion.num_classes, fashion.input_shape) == (10, (1, 28, 28))
        images, labels = fashion.train.tensors
        assert images.shape == (60_000, 1, 28, 28)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert labels.bincount().tolist() == [6000] * 10
        assert fashion.test.tensors[1].bincount().tolist() == [1000] * 10

    def test_normalised_by_the_training_set(self, fashion: DataBundle) -> None:
        images = fashion.train.tensors[0]
        assert images.mean(dtype=torch.float64).item() == pytest.approx(0, abs=1e-5)
        assert images.double().std(correction=0).item() == pytest.approx(1, abs=1e-5)
        # The published mean and standard deviation, from the value of a black pixel and of a white one.
        black, white = images.min().item(), images.max().item()
        assert 1 / (white - black) == pytest.approx(0.3530, abs=1e-4)
        assert -black / (white - black) == pytest.approx(0.2860, abs=1e-4)


class TestIdx:
    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("name", ["fashion_mnist", "mnist"])
    @pytest.mark.parametrize("torchvision_layout", [True, False])
    def test_values(self, tmp_path: Path, zipped: bool, name: str, torchvision_layout: bool) -> None:
        kind = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name]
        folder = tmp_path / kind / "raw" if torchvision_layout else tmp_path
        arrays = write_idx(folder, zipped=zipped)
        bundle = load_data(name, root=str(tmp_path))
        train, test = arrays[IDX_NAMES[0]] / 255, arrays[IDX_NAMES[2]] / 255
        for dataset, raw in ((bundle.train, train), (bundle.test, test)):
            expected = torch.from_numpy((raw - train.mean()) / train.std()).float().unsqueeze(1)
            torch.testing.assert_close(dataset.tensors[0], expected)
        assert bundle.train.tensors[1].tolist() == arrays[IDX_NAMES[1]].tolist()
        assert bundle.test.tensors[1].tolist() == arrays[IDX_NAMES[3]].tolist()
        assert bundle.input_shape == (1, 5, 4)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "not an idx file"),
            (b"\0\0\x08", "not an idx file"),
            (b"\0\0\x0d\x01" + struct.pack(">I", 1) + b"1234", "not an idx file of unsigned bytes"),
            (b"\x89PNG\r\n\x1a\n1234", "not an idx file"),
            (b"\0\0\x08\x03" + struct.pack(">I", 1), "not an idx file"),
            (b"\0\0\x08\x01" + struct.pack(">I", 5) + b"1234", r"damaged: 4 bytes follow a header of shape \(5,\)"),
            (b"\0\0\x08\x01" + struct.pack(">I", 3) + b"1234", "damaged"),
            (b"\0\0\x08\x01" + struct.pack(">I", 0), "damaged"),
            (b"\0\0\x08\x04" + struct.pack(">4I", *[2**32 - 1] * 4) + b"1234", "damaged"),
        ],
    )
    def test_damaged(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_idx(tmp_path / "file")

    @pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: b"no gzip", lambda c: c[:20] + b"\xff" + c[21:]])
    def test_damaged_gzip(self, tmp_path: Path, damage) -> None:
        (tmp_path / "file.gz").write_bytes(damage(gzip.compress(idx_bytes(np.arange(200)))))
        with pytest.raises(DataError, match=r"file\.gz cannot be read"):
            read_idx(tmp_path / "file.gz")

    @pytest.mark.parametrize(
        ("replaced", "message"),
        [
            ({IDX_NAMES[1]: np.arange(49) % 10}, r"\(50, 5, 4\) and \(49,\)"),
            ({IDX_NAMES[1]: np.full(50, 10)}, "label 10"),
            ({IDX_NAMES[2]: np.zeros((20, 4, 4))}, "different sizes"),
            ({IDX_NAMES[0]: np.zeros((50, 20))}, r"expected \(n, height, width\)"),
        ],
    )
    def test_files_that_do_not_fit(self, tmp_path: Path, replaced: dict[str, np.ndarray], message: str) -> None:
        write_idx(tmp_path, zipped=True, **replaced)
        with pytest.raises(DataError, match=message):
            load_data("mnist", root=tmp_path)

    def test_constant_images_stay_finite(self, tmp_path: Path) -> None:
        write_idx(tmp_path, zipped=True, **{IDX_NAMES[0]: np.full((50, 5, 4), 255)})
        assert load_data("mnist", root=tmp_path).train.tensors[0].eq(0).all()


class TestMissing:
    @pytest.mark.parametrize(
        ("name", "ways"),
        [
            ("fashion_mnist", ["apt-get install dataset-fashion-mnist", "download: true", "root:"]),
            ("mnist", ["download: true", "root:"]),
            ("cifar10", ["download: true", "root:", "cifar-10-batches-py"]),
            ("cifar100", ["download: true", "root:", "cifar-100-python"]),
        ],
    )
    def test_one_sentence_says_how_to_get_it(self, tmp_path: Path, name: str, ways: list[str]) -> None:
        with pytest.raises(DataError) as caught:
            load_data(name, root=tmp_path)
        message = str(caught.value)
        assert all(way in message for way in [*ways, str(tmp_path)])
        assert "\n" not in message
        assert ". " not in message

    def test_one_file_missing(self, tmp_path: Path) -> None:
        write_idx(tmp_path, zipped=True)
        (tmp_path / f"{IDX_NAMES[3]}.gz").unlink()
        with pytest.raises(DataError, match="MNIST was not found"):
            load_data("mnist", root=tmp_path)

    def test_failed_download(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*args: object, **kwargs: object) -> None:
            raise OSError("no network")

        monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
        monkeypatch.setattr("torchvision.datasets.MNIST.download", offline)
        for name in ("cifar10", "mnist"):
            with pytest.raises(DataError, match=r"could not be downloaded.*no network"):
                load_data(name, root=tmp_path, download=True)

    @pytest.mark.parametrize(
        ("name", "module", "package"),
        [("digits", "sklearn.datasets", "scikit-learn"), ("cifar10", "torchvision.datasets", "torchvision")],
    )
    def test_extra(self, monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=rf"{package} is not installed.*gumbel-plugin\[data\]"):
            load_data(name)


class TestDigits:
    def test_sizes_and_scale(self) -> None:
        bundle = load_data("digits")
        assert len(bundle.train) + len(bundle.test) == 1797
        assert len(bundle.test) == 359
        assert (bundle.num_classes, bundle.input_shape, bundle.validation) == (10, (1, 8, 8), None)
        images, labels = bundle.train.tensors
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert images.mean().item() == pytest.approx(0, abs=1e-5)
        assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)

    def test_split_is_stratified_and_does_not_depend_on_the_seed(self) -> None:
        first, second = load_data("digits", seed=0), load_data("digits", seed=1)
        assert torch.equal(first.test.tensors[0], second.test.tensors[0])
        train, test = (part.tensors[1].bincount(minlength=10) for part in (first.train, first.test))
        assert ((train + test) * 0.2 - test).abs().max() <= 1

    def test_splits_share_no_image(self) -> None:
        bundle = load_data("digits", validation_fraction=0.1)
        train, validation, test = rows(bundle.train), rows(bundle.validation), rows(bundle.test)
        assert len(train | validation | test) == len(train) + len(validation) + len(test) == 1797


class TestSamples:
    def test_some_of_the_training_images_the_same_for_a_seed(self) -> None:
        first, again, other = (load_data("digits", samples=100, seed=seed).train.tensors[0] for seed in (0, 0, 1))
        assert len(first) == 100
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert rows(load_data("digits", samples=100).train) <= rows(load_data("digits").train)

    def test_they_include_the_validation_images_and_not_the_test_images(self) -> None:
        bundle = load_data("digits", samples=200, validation_fraction=0.1)
        assert len(bundle.train) + len(bundle.validation) == 200
        assert rows(bundle.test) == rows(load_data("digits").test)

    def test_as_many_as_there_are(self) -> None:
        count = len(load_data("digits").train)
        for samples in (0, count + 1):
            with pytest.raises(ConfigError, match=f"samples is {samples}; data set 'digits' has {count} to train with"):
                load_data("digits", samples=samples)


class TestValidation:
    def test_fraction_and_strata(self) -> None:
        bundle = load_data("digits", validation_fraction=0.25)
        total = len(bundle.train) + len(bundle.validation)
        assert len(bundle.validation) == round(0.25 * total)
        train, held_out = (part.tensors[1].bincount(minlength=10) for part in (bundle.train, bundle.validation))
        assert ((train + held_out) * 0.25 - held_out).abs().max() <= 1

    def test_seed(self) -> None:
        def held_out(seed: int) -> torch.Tensor:
            return load_data("digits", validation_fraction=0.1, seed=seed).validation.tensors[0]

        assert torch.equal(held_out(3), held_out(3))
        assert not torch.equal(held_out(3), held_out(4))

    @pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
    def test_neither_part_is_empty(self, fraction: float) -> None:
        bundle = load_data("toy_regression", validation_fraction=fraction)
        assert min(len(bundle.train), len(bundle.validation)) == 1


def test_toy_regression() -> None:
    bundle = load_data("toy_regression", seed=5)
    assert (len(bundle.train), len(bundle.test)) == (1000, 1000)
    assert (bundle.num_classes, bundle.input_shape) == (2, (4,))
    x, y = (torch.cat(pair).double() for pair in zip(bundle.train.tensors, bundle.test.tensors, strict=True))
    assert y.shape == (2000, 2)
    assert bundle.train.tensors[1].dtype == torch.float32
    a, b, c, d = x.unbind(1)
    torch.testing.assert_close(y, torch.stack((3 * torch.sin((a - b).square()), (c + d).pow(3)), 1), rtol=0, atol=1e-5)
    # Uniform on [-1, 1]: mean 0 and variance 1/3, each within five standard errors of 2000 draws.
    assert x.abs().max() <= 1
    assert x.mean(0).abs().max() < 5 * (1 / 3 / 2000) ** 0.5
    assert (x.var(0) - 1 / 3).abs().max() < 5 * (4 / 45 / 2000) ** 0.5
    assert torch.equal(load_data("toy_regression", seed=6).test.tensors[0], bundle.test.tensors[0])


def cifar_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Write a tiny CIFAR-10 in its own format and give torchvision the checksums of these files."""
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = {"train": random.integers(0, 256, (40, 3072)), "test": random.integers(0, 256, (10, 3072))}
    labels = {name: (np.arange(len(values)) % 10).tolist() for name, values in rows.items()}
    contents = {name: {"data": rows[name].astype(np.uint8), "labels": labels[name]} for name in rows}
    sums = {}
    for name, content in (contents | {"meta": {"label_names": list("0123456789")}}).items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5(pickle.dumps(content)).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": sums["meta"]})
    return rows["train"].reshape(-1, 3, 32, 32) / 255, rows["test"].reshape(-1, 3, 32, 32) / 255


class TestCifar:
    def test_values(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        train, test = cifar_folder(tmp_path, monkeypatch)
        bundle = load_data("cifar10", root=tmp_path)
        axes, shape = (0, 2, 3), (3, 1, 1)
        mean, std = train.mean(axes).reshape(shape), train.std(axes).reshape(shape)
        for dataset, raw in ((bundle.train, train), (bundle.test, test)):
            images, labels = samples(dataset)
            torch.testing.assert_close(images, torch.from_numpy((raw - mean) / std).float())
            assert labels.tolist() == [i % 10 for i in range(len(raw))]
        assert (bundle.num_classes, bundle.input_shape) == (10, (3, 32, 32))

    def test_only_the_training_set_is_augmented(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cifar_folder(tmp_path, monkeypatch)
        plain = load_data("cifar10", root=tmp_path, validation_fraction=0.25)
        augmented = load_data("cifar10", root=tmp_path, validation_fraction=0.25, augment=True)
        assert (len(plain.train), len(plain.validation)) == (30, 10)
        for seed in (0, 1):
            torch.manual_seed(seed)
            assert rows(augmented.validation) == rows(plain.validation)
            assert rows(augmented.test) == rows(plain.test)
        assert not rows(augmented.train) & rows(plain.train)
        assert torch.equal(augmented.train.labels, plain.train.labels)

    def test_augmentation_is_repeated_by_torchs_seed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cifar_folder(tmp_path, monkeypatch)
        train = load_data("cifar10", root=tmp_path, augment=True).train

        def epoch(seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            return torch.cat([x for x, _ in make_loader(train, 8, shuffle=False, seed=0)])

        assert torch.equal(epoch(0), epoch(0))
        assert not torch.equal(epoch(0), epoch(1))

    def test_damaged_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cifar_folder(tmp_path, monkeypatch)
        (tmp_path / "cifar-10-batches-py" / "train").write_bytes(b"?")
        with pytest.raises(DataError, match="damaged"):
            load_data("cifar10", root=tmp_path)


def test_augmentation_is_a_crop_of_the_padded_image_and_a_flip() -> None:
    torch.manual_seed(0)
    count, padding = 2000, 2
    image = torch.arange(1, 31, dtype=torch.uint8).reshape(1, 2, 3, 5)  # no zeros, no two pixels alike
    mean, std = torch.zeros(2, 1, 1), torch.ones(2, 1, 1)
    dataset = ImageDataset(image.expand(count, -1, -1, -1), torch.zeros(count), mean, std, padding)
    seen = dataset[torch.arange(count)][0].mul(255).round().byte()
    padded = torch.zeros(2, 7, 9, dtype=torch.uint8)
    padded[:, 2:5, 2:7] = image[0]
    crops = [padded[:, top : top + 3, left : left + 5] for top in range(5) for left in range(5)]
    views = torch.stack([view for crop in crops for view in (crop, crop.flip(2))])
    matches = (seen[:, None] == views[None]).flatten(2).all(2)
    assert matches.any(1).all(), "something that is neither a crop nor a flipped crop"
    counts = matches.sum(0)
    # 50 equally likely views: each count is binomial, and six standard deviations never happen.
    expected = count / 50
    assert (counts - expected).abs().max() < 6 * (expected * (1 - 1 / 50)) ** 0.5
    assert dataset[3][0].shape == (2, 3, 5)


class TestLoader:
    numbered = TensorDataset(torch.arange(20.0).reshape(10, 2), torch.arange(10))

    @staticmethod
    def order(loader: DataLoader) -> list[list[int]]:
        return [batch[1].tolist() for batch in loader]

    def test_order(self) -> None:
        order = self.order(make_loader(self.numbered, 4, shuffle=False, seed=0))
        assert order == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    def test_seed_fixes_the_orders_of_all_epochs(self) -> None:
        def epochs(seed: int) -> list[list[list[int]]]:
            loader = make_loader(self.numbered, 4, shuffle=True, seed=seed)
            return [self.order(loader) for _ in range(3)]

        torch.manual_seed(0)
        first = epochs(7)
        torch.manual_seed(1)
        assert epochs(7) == first
        assert epochs(8) != first
        assert first[0] != first[1]

    def test_batches_are_those_of_a_plain_loader(self) -> None:
        for dataset in (self.numbered, Subset(self.numbered, range(1, 9))):
            ours = list(make_loader(dataset, 3, shuffle=True, seed=2))
            plain = list(DataLoader(dataset, 3, shuffle=True, generator=torch.Generator().manual_seed(2)))
            for batch, other in zip(ours, plain, strict=True):
                assert type(batch) is list
                assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))

    def test_in_memory_sets_are_read_a_batch_at_a_time(self) -> None:
        class Counted(ImageDataset):
            reads = 0

            def __getitem__(self, index):
                self.reads += 1
                return super().__getitem__(index)

        ones = torch.ones(1, 1, 1)
        dataset = Counted(torch.zeros(100, 1, 2, 2, dtype=torch.uint8), torch.arange(100), ones, ones)
        assert len(list(make_loader(dataset, 10, shuffle=True, seed=0))) == 10
        assert dataset.reads == 10

    def test_sampler_can_be_replaced_as_lightning_does(self) -> None:
        loader = make_loader(self.numbered, 4, shuffle=True, seed=0)
        seen = []
        for rank in (0, 1):
            sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=rank, seed=0)
            share = DataLoader(loader.dataset, loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn)
            seen += [label for batch in self.order(share) for label in batch]
        assert sorted(seen) == list(range(10))

    def test_workers(self) -> None:
        loader = make_loader(self.numbered, 4, shuffle=True, seed=0, num_workers=1)
        assert self.order(loader) == self.order(make_loader(self.numbered, 4, shuffle=True, seed=0))

    @pytest.mark.parametrize(("batch_size", "num_workers"), [(0, 0), (4, -1)])
    def test_out_of_range(self, batch_size: int, num_workers: int) -> None:
        with pytest.raises(ConfigError, match=f"batch_size is {batch_size} and num_workers {num_workers}"):
            make_loader(self.numbered, batch_size, shuffle=True, seed=0, num_workers=num_workers)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar", {}, r"unknown data set 'cifar'; did you mean 'cifar10"),
        ("digits", {"validation_fraction": 1.0}, "validation_fraction is 1.0; it must be at least 0 and less than 1"),
        ("digits", {"validation_fraction": -0.1}, "validation_fraction is -0.1"),
        ("digits", {"augment": True}, "only cifar10 and cifar100 can be augmented"),
    ],
)
def test_wrong_arguments(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_data(name, **options)  # type: ignore[arg-type]
