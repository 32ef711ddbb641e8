"""Data sets by name, as tensors in memory, and loaders that keep up with small networks.

Every set is normalized with the mean and standard deviation of its whole training set. The test set never depends on
a seed, and neither it nor the validation set is ever augmented.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from gumbel_plugin.errors import ConfigError, DataError, MissingExtraError, nearest, shown, shown_path
from gumbel_plugin.runs.idx_files import read_idx
from gumbel_plugin.runs.own_data import describe, own_data_sets, random_split

DEFAULT_ROOT = Path("data")
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_CROP_PADDING = 4  # pixels: the usual CIFAR augmentation (He et al. 2015, section 4.2)


@dataclass(frozen=True)
class DataBundle:
    """One data set, split and ready for loaders.

    Attributes:
        train: Samples to learn from: pairs of a float32 input and a target.
        validation: Samples held out of the training set, never augmented; None where none were asked for.
        test: Samples to report on.
        num_classes: Number of classes; for a regression the number of outputs.
        input_shape: Shape of one input, without the batch, such as (1, 28, 28).
    """

    train: Dataset[Any]
    validation: Dataset[Any] | None
    test: Dataset[Any]
    num_classes: int
    input_shape: tuple[int, ...]

    @property
    def is_regression(self) -> bool:
        """Whether the targets are numbers instead of classes."""
        return torch.as_tensor(self.test[0][1]).is_floating_point()


@dataclass(frozen=True)
class _Tables:
    """What a reader returns: inputs and targets; byte images (n, channels, height, width) are not yet normalized."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """Byte images in memory, normalized (and augmented) when they are read, one or a batch at a time.

    Augmentation is a random crop of the zero-padded image and a random horizontal flip. Its draws come from torch's
    global generator, so `torch.manual_seed` repeats them.

    Args:
        images: uint8 of shape (n, channels, height, width).
        labels: int64 of shape (n,).
        mean: Mean of each channel, in [0, 1], of shape (channels, 1, 1).
        std: Standard deviation of each channel, likewise.
        padding: Pixels of padding before the crop; 0 turns augmentation off.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, padding: int = 0) -> None:
        self.images = images
        self.labels = labels
        self.mean = mean
        self.std = std
        self.padding = padding

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | Tensor) -> tuple[Tensor, Tensor]:
        """Return the image and label at an index, or the images and labels at a tensor of indices."""
        images = self.images[index]
        if self.padding:
            images = _crop_and_flip(images.reshape(-1, *images.shape[-3:]), self.padding).reshape(images.shape)
        return _normalise(images, self.mean, self.std), self.labels[index]


def data_names() -> list[str]:
    """Return every name that `load_data` knows."""
    return sorted(_READERS)


def load_data(
    name: str,
    *,
    root: str | Path | None = None,
    samples: int | None = None,
    validation_fraction: float = 0.0,
    augment: bool = False,
    download: bool = False,
    seed: int = 0,
) -> DataBundle:
    """Load a data set by name.

    Sources: ``digits`` is scikit-learn's copy of the UCI optical digits (Alpaydin and Kaynak 1998), one fifth of it the
    test set; ``mnist`` LeCun et al. 1998; ``fashion_mnist`` Xiao et al. 2017 (arXiv 1708.07747); ``cifar10`` and
    ``cifar100`` Krizhevsky 2009; ``toy_regression`` the synthetic check of Zhang et al. (arXiv 2311.12526).

    Args:
        name: One of `data_names`, or ``package.module:factory`` for data of your own (see `own_data`).
        root: Folder that holds the files, torchvision's layout included. None means ``./data`` and, for
            ``fashion_mnist``, the place where Debian's package puts them.
        samples: How many training images to use, drawn at random (validation images among them); None takes all.
        validation_fraction: Fraction of the training set to hold out, in [0, 1), the same in every class.
        augment: Whether to crop and flip the training images at random (``cifar10`` and ``cifar100`` only).
        download: Whether torchvision may download what is missing.
        seed: Seed of the samples and of the validation split. The test set does not depend on it.

    Returns:
        The data set; images are (channels, height, width) float32.

    Raises:
        ConfigError: The name is unknown or an argument breaks its rule.
        DataError: The files are missing or damaged.
        MissingExtraError: scikit-learn or torchvision is needed and not installed.
    """
    if name not in _READERS and ":" not in name:
        raise ConfigError(f"unknown data set {shown(name)}{nearest(name, _READERS)}, or package.module:factory")
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"validation_fraction is {shown(validation_fraction)}; it must be at least 0 and less than 1")
    if augment and name not in _AUGMENTED:
        raise ConfigError(f"augment is true for data set {name!r}; only {' and '.join(_AUGMENTED)} can be augmented")
    if ":" in name:
        if root is not None or download:
            raise ConfigError(f"root and download are for data sets that are known by name; {name!r} finds its own")
        return _load_own(name, samples, validation_fraction, seed)
    tables = _READERS[name](None if root is None else _folder(root), download)
    inputs, targets = tables.train
    if samples is not None:
        chosen = _chosen(name, len(inputs), samples, seed)
        inputs, targets = inputs[chosen], targets[chosen]
    wrap: Callable[..., Dataset[Any]] = TensorDataset
    if inputs.dtype == torch.uint8:
        mean, std = _statistics(inputs)
        wrap = partial(ImageDataset, mean=mean, std=std)
    test = wrap(*tables.test)
    validation = None
    if validation_fraction > 0:
        kept, held_out = _split(targets, validation_fraction, seed)
        validation = wrap(inputs[held_out], targets[held_out])
        inputs, targets = inputs[kept], targets[kept]
    train = wrap(inputs, targets, padding=_CROP_PADDING) if augment else wrap(inputs, targets)
    return DataBundle(train, validation, test, tables.num_classes, tuple(inputs.shape[1:]))


def _load_own(name: str, samples: int | None, validation_fraction: float, seed: int) -> DataBundle:
    train, test = own_data_sets(name)
    num_classes, input_shape = describe(name, train, test)
    if samples is not None:
        train = Subset(train, _chosen(name, len(train), samples, seed).tolist())  # type: ignore[arg-type]
    validation = None
    if validation_fraction > 0:
        kept, held_out = random_split(len(train), validation_fraction, seed)  # type: ignore[arg-type]
        train, validation = Subset(train, kept), Subset(train, held_out)
    return DataBundle(train, validation, test, num_classes, input_shape)


def _chosen(name: str, count: int, samples: int, seed: int) -> Tensor:
    if not 1 <= samples <= count:
        raise ConfigError(f"samples is {shown(samples)}; data set {name!r} has {count} to train with")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]


def _folder(root: str | Path) -> Path:
    try:
        folder = Path(root).expanduser()
        folder.exists()  # what can be no path at all, such as 5,000 letters, raises
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"root {shown_path(root)} cannot be a folder: {reason}") from error
    return folder


def make_loader(
    dataset: Dataset[Any], batch_size: int, *, shuffle: bool, seed: int, num_workers: int = 0
) -> DataLoader[Any]:
    """Make a loader whose order is fixed by a seed.

    Data sets of this module are read a batch at a time, by one indexing of their tensors. The sampler is torch's own,
    so Lightning and DistributedSampler can replace it.

    Args:
        dataset: Samples to load.
        batch_size: Samples in a batch; the last batch may be smaller.
        shuffle: Whether to draw a new order in every epoch.
        seed: Seed of the orders (and of the workers).
        num_workers: Processes that load ahead; in-memory sets need none.

    Returns:
        A loader of [inputs, targets].

    Raises:
        ConfigError: A number is out of range.
    """
    if batch_size < 1 or num_workers < 0:
        raise ConfigError(f"batch_size is {batch_size} and num_workers {num_workers}; they must be at least 1 and 0")
    in_memory = isinstance(dataset, ImageDataset) or type(dataset) is TensorDataset
    return DataLoader(
        _Batches(dataset) if in_memory else dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        collate_fn=list if in_memory else None,
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=num_workers > 0,
    )


class _Batches(Dataset[Any]):
    """A data set that hands a loader a whole batch for a list of indices, ready collated."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.dataset[index]  # type: ignore[no-any-return]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.dataset[torch.as_tensor(indices)]  # type: ignore[no-any-return]


def _read_digits(root: Path | None, download: bool) -> _Tables:
    digits = _import("sklearn.datasets", "scikit-learn").load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # the file counts ink from 0 to 16
    labels = torch.from_numpy(digits.target).long()
    train, test = _split(labels, 0.2, seed=0)
    mean, std = images[train].mean(), images[train].std(correction=0)
    images = (images - mean) / std
    return _Tables((images[train], labels[train]), (images[test], labels[test]), 10)


def _read_toy_regression(root: Path | None, download: bool) -> _Tables:
    """Draw 2000 points x in [-1, 1]^4 with y1 = 3·sin((x1 - x2)²) and y2 = (x3 + x4)³; test on half."""
    x = torch.rand(2000, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.stack((3 * torch.sin((x[:, 0] - x[:, 1]) ** 2), (x[:, 2] + x[:, 3]) ** 3), dim=1)
    return _Tables((x[:1000], y[:1000]), (x[1000:], y[1000:]), 2)


def _read_mnist(kind: str, root: Path | None, download: bool) -> _Tables:
    """Read MNIST or a set in its format; ``kind`` is the name of torchvision's class and folder."""
    base = root or DEFAULT_ROOT
    places = [base]
    if kind == "FashionMNIST" and root is None:
        places.append(DEBIAN_FASHION_MNIST)
    paths = next(filter(None, map(_idx_paths, [*places, base / kind / "raw"])), None)
    if paths is None and download:
        _torchvision_set(kind, base, train=True, download=True)
        paths = _idx_paths(base / kind / "raw")
    if paths is None:
        package = "run apt-get install dataset-fashion-mnist, " if kind == "FashionMNIST" else ""
        raise DataError(
            f"{kind} was not found in {' or '.join(map(str, places))}: {package}set download: true, "
            f"or point root: at the folder that holds {_IDX_FILES[0]}.gz"
        )
    images, labels = _read_labelled(*paths[:2])
    test_images, test_labels = _read_labelled(*paths[2:])
    if images.shape[1:] != test_images.shape[1:]:
        raise DataError(f"{paths[0]} and {paths[2]} hold images of different sizes")
    mean, std = _statistics(images)
    return _Tables((_normalise(images, mean, std), labels), (_normalise(test_images, mean, std), test_labels), 10)


def _idx_paths(folder: Path) -> list[Path]:
    """Return the four files in the order of `_IDX_FILES`, gzipped or not; nothing if one is missing."""
    found = [[path for path in (folder / f"{name}.gz", folder / name) if path.is_file()] for name in _IDX_FILES]
    return [paths[0] for paths in found] if all(found) else []


def _read_labelled(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    """Read images as uint8 (n, 1, height, width) and their labels, 0 to 9, as int64 (n,)."""
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise DataError(f"{images_path} and {labels_path} hold {shapes}; expected (n, height, width) and (n,)")
    if labels.max() > 9:
        raise DataError(f"{labels_path} holds the label {labels.max()}; the largest of ten classes is 9")
    return images.unsqueeze(1), labels.long()


def _read_cifar(kind: str, root: Path | None, download: bool) -> _Tables:
    base = root or DEFAULT_ROOT
    splits = []
    for train in (True, False):
        source = _torchvision_set(kind, base, train=train, download=download)
        images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        splits.append((images, torch.tensor(source.targets)))
    return _Tables(splits[0], splits[1], 10 if kind == "CIFAR10" else 100)


def _torchvision_set(kind: str, root: Path, *, train: bool, download: bool) -> Any:
    make = getattr(_import("torchvision.datasets", "torchvision"), kind)
    try:
        return make(root, train=train, download=download)
    except (OSError, RuntimeError) as error:
        if download:
            raise DataError(f"{kind} could not be downloaded to {root}: {error}") from error
        raise DataError(
            f"{kind} is missing from {root}, or damaged: set download: true, "
            f"or point root: at the folder that holds {make.base_folder}"
        ) from error


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise  # the package is there; something that it imports is not
        raise MissingExtraError(package, "data") from error


def _split(targets: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices to keep and to hold out, in rising order; stratified where the targets are classes."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    if not targets.is_floating_point():
        order = order[targets[order].argsort(stable=True)]
    size = min(max(round(fraction * len(targets)), 1), len(targets) - 1)
    # Evenly spaced picks from samples in the order of their classes: each class gives its share, to within one.
    picks = torch.arange(size) * len(targets) // size
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    held_out[order[picks]] = True
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's mean and standard deviation in [0, 1], as (channels, 1, 1), from exact byte counts."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    shares = counts.double() / counts.sum(1, keepdim=True)
    mean = shares @ values
    std = (shares * (values - mean[:, None]) ** 2).sum(1).sqrt()
    std[std == 0] = 1  # a constant channel stays at zero
    return mean.float()[:, None, None], std.float()[:, None, None]


def _normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return images.float().div_(255).sub_(mean).div_(std)


def _crop_and_flip(images: Tensor, padding: int) -> Tensor:
    """Crop each image (n, channels, height, width) at random after zero padding, and flip half of them."""
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (n, channels, top, left, height, width)
    top, left = torch.randint(2 * padding + 1, (2, count))
    crops = windows[torch.arange(count), :, top, left]
    flips = torch.rand(count, 1, 1, 1) < 0.5
    return torch.where(flips, crops.flip(-1), crops)


_AUGMENTED = ("cifar10", "cifar100")
_READERS: dict[str, Callable[[Path | None, bool], _Tables]] = {
    "digits": _read_digits,
    "mnist": partial(_read_mnist, "MNIST"),
    "fashion_mnist": partial(_read_mnist, "FashionMNIST"),
    "cifar10": partial(_read_cifar, "CIFAR10"),
    "cifar100": partial(_read_cifar, "CIFAR100"),
    "toy_regression": _read_toy_regression,
}
