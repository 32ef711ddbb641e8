"""Small networks that every behavior is tried on, and shorthands that many tests need.

What stands behind a ReLU has a batch norm before it (or is a SiLU), so that in train mode no unit is dead by chance.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gumbel_plugin  # noqa: F401  (makes torchvision, and with it torch_pruning, importable)
from gumbel_plugin.config import PruningSection
from gumbel_plugin.config_list import LayerRule
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_torch_pruning import find_groups

ROOT = Path(__file__).parents[1]


class Residual(nn.Module):
    """conv1 and conv3 are tied by the addition, conv2 is free; the head reads the sum after pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x))))))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    """One layer reads two groups, and normalizes them after the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 6, 1)
        self.bn = nn.BatchNorm2d(10)
        self.mix = nn.Conv2d(10, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.bn(torch.cat([self.left(x), self.right(x)], 1)))
        return self.head(F.silu(self.mix(x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """The channels of `stem` are multiplied by gates that a bottleneck computes from them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn(self.stem(x)))
        scale = torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3))))))
        return self.head((x * scale[:, :, None, None]).mean((2, 3)))


class GlobalPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def _conv_bn_relu() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Conv2d(5, 4, 3), GlobalPool(),
    )  # fmt: skip


def _depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), GlobalPool(), nn.Linear(6, 4),
    )  # fmt: skip


def _sigmoid() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Sigmoid(),
        nn.Conv2d(6, 5, 3, padding=1), nn.Softplus(), GlobalPool(), nn.Linear(5, 4),
    )  # fmt: skip


def _no_bn() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 4))


def _grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 6, 1), GlobalPool(), nn.Linear(6, 4),
    )  # fmt: skip


def _transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 5, 2, stride=2), nn.BatchNorm2d(5), nn.Sigmoid(),
        nn.Conv2d(5, 4, 3), GlobalPool(),
    )  # fmt: skip


def _flatten_linear() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(96, 10), nn.SiLU(), nn.Linear(10, 4),
    )  # fmt: skip


_IMAGES = (2, 3, 8, 8)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv_bn_relu": (_conv_bn_relu, _IMAGES),
    "residual": (Residual, _IMAGES),
    "depthwise": (_depthwise, _IMAGES),
    "concat": (Concat, _IMAGES),
    "squeeze_excite": (SqueezeExcite, _IMAGES),
    "sigmoid": (_sigmoid, _IMAGES),
    "no_bn": (_no_bn, (3, 7)),
    "grouped": (_grouped, _IMAGES),
    "transposed": (_transposed, _IMAGES),
    "flatten_linear": (_flatten_linear, _IMAGES),
}


@dataclass
class Network:
    """One network of the table.

    Attributes:
        name: Its name in `NETWORKS`.
        model: Fresh, with random parameters and statistics, in train mode.
        inputs: Example inputs.
    """

    name: str
    model: nn.Module
    inputs: Tensor

    def batch(self, size: int) -> Tensor:
        """Return other random inputs, more of them."""
        generator = torch.Generator().manual_seed(size)
        return torch.randn(size, *self.inputs.shape[1:], generator=generator).to(self.inputs.dtype)

    def groups(self) -> dict[str, ChannelGroup]:
        """Return the channel groups that can be cut, by name."""
        return {group.name: group for group in find_groups(self.model, self.inputs) if group.safety == "exact"}


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give every parameter and every batch norm's statistics values that hide nothing: none is 0, 1 or equal."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            nn.init.normal_(bias, std=0.5)


def make(name: str, dtype: torch.dtype = torch.float32) -> Network:
    build, shape = NETWORKS[name]
    torch.manual_seed(len(name))
    model = build()
    randomize(model)
    return Network(name, model.to(dtype), torch.randn(shape).to(dtype))


@pytest.fixture
def make_network() -> Callable[..., Network]:
    """Return the function that makes a network of the table: its name, and optionally a dtype."""
    return make


@pytest.fixture(params=NETWORKS)
def network_name(request: pytest.FixtureRequest) -> str:
    """Return the name of every network of the table in turn."""
    return str(request.param)


@pytest.fixture
def network(network_name: str) -> Network:
    """Return every network of the table in turn."""
    return make(network_name)


class Parts(nn.Module):
    """Two layers each compute a part of the channels that a third computes as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.whole = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(3, 10, 1)
        self.head = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(torch.cat([self.left(x), self.right(x)], 1) + self.whole(x)))


@pytest.fixture
def parts() -> Parts:
    """Return a network whose group has layers that compute a part of its channels each."""
    torch.manual_seed(0)
    return Parts()


@pytest.fixture
def section() -> Callable[..., PruningSection]:
    """Return a function that configures the pruning of all convolutions and linear layers of a model.

    Its keywords that an entry of the config list has go there, the others into the section.
    """

    def configure(model: nn.Module, **keys: object) -> PruningSection:
        entry = {key: keys.pop(key) for key in list(keys) if key in LayerRule.model_fields}
        layers = {type(m).__name__ for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
        return PruningSection(config_list=[{"op_types": sorted(layers), **entry}], **keys)

    return configure


@pytest.fixture
def run_block(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Return a function that runs one Python block of a page, and compares what it prints with the text behind it."""

    def run(page: Path, number: int) -> None:
        monkeypatch.chdir(ROOT)
        torch.manual_seed(0)
        code, expected = blocks_of(page)[number]
        if "GumbelPruner" in code:
            pytest.importorskip("nni")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{page.name}, block {number}", "exec"), {})
        if expected:
            assert printed.getvalue() == expected

    return run


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Return a page's Python blocks, each with the text block that follows it, if one does."""
    return re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", page.read_text(encoding="utf-8"), re.DOTALL)
