"""The analysis by itself, without the check that follows it: what it lets through, what it stops, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin.graph.exactness.channel_labels import ChannelLabels, tight, varying
from gumbel_torch_pruning import find_groups

Forward = Callable[[nn.Module, Tensor], Any]


class Net(nn.Module):
    """A stem of 8 channels, something between, and a head that reads as many channels as there are then."""

    def __init__(self, between: Forward, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(width, 4, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.register_buffer("table", torch.ones(1, 8, 1, 1))
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.head(self.between(self, self.stem(x)))


def written_into_a_part(net: nn.Module, y: Tensor) -> Tensor:
    whole = torch.zeros(2, 10, 8, 8)
    whole[:, 2:] = y
    return whole


def by_position(net: nn.Module, y: Tensor) -> Tensor:
    """Windows of 4×4 positions as tokens, normalized over positions, and back."""
    tokens = y.view(2, 8, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(8, 16, 8)
    tokens = torch.softmax(tokens.roll(3, dims=1), dim=1) + tokens.cumsum(1)
    return tokens.view(2, 2, 2, 4, 4, 8).permute(0, 5, 1, 3, 2, 4).reshape(2, 8, 8, 8)


PASSES: dict[str, Forward] = {
    "nothing": lambda net, y: y,
    "in place": lambda net, y: F.hardswish(y, inplace=True).mul_(2).clamp_(-1, 1),
    "a parameter per channel": lambda net, y: y * net.scale,
    "squeezed and excited": lambda net, y: y * torch.sigmoid(y.mean((2, 3), keepdim=True)),
    "highest position": lambda net, y: y * y.amax((2, 3), keepdim=True) / y.var((2, 3), keepdim=True),
    "pooled, padded, resized": lambda net, y: F.interpolate(F.pad(F.max_pool2d(y, 2), (1, 1, 1, 1)), size=7),
    "channels last and back": lambda net, y: F.gelu(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous(),
    "windows of positions": by_position,
    "a slice of positions": lambda net, y: torch.cat([y[:, :, ::2], y[:, :, 1::2]], 3),
    "branches of positions": lambda net, y: torch.cat([part * 2 for part in y.chunk(2, 3)], 3),
    "half precision and back": lambda net, y: y.double().float(),
    "halves": lambda net, y: torch.cat([y.chunk(2, 1)[1], y.chunk(2, 1)[0]], 1),
    "a half read twice": lambda net, y: torch.cat([(half := y.chunk(2, 1)[1]).relu(), half + 1], 1),
    "halves by slices": lambda net, y: torch.cat([y[:, y.shape[1] // 2 :], y[:, : y.shape[1] // 2]], 1),
    "quarters": lambda net, y: torch.cat([part * (2 + k) for k, part in enumerate(y.chunk(4, 1))], 1),
    "stacked and summed": lambda net, y: torch.stack([y, y.relu()]).sum(0),
}

STOPPED: dict[str, tuple[Forward, str, int]] = {
    "mean over channels": (lambda net, y: y - y.mean(1, keepdim=True), "aten::mean mixes", 8),
    "mean over everything": (lambda net, y: y - y.mean(), "aten::mean mixes", 8),
    "highest channel": (lambda net, y: y - y.amax(1, keepdim=True), "aten::amax mixes", 8),
    "normed over channels": (lambda net, y: F.normalize(y, dim=1), "norm mixes", 8),
    "softmax over channels": (lambda net, y: y.softmax(1), "aten::_softmax mixes", 8),
    "sum so far": (lambda net, y: y.cumsum(1), "aten::cumsum mixes", 8),
    "neighboring channels": (lambda net, y: F.avg_pool3d(y[:, None], (3, 1, 1), 1, (1, 0, 0))[:, 0], "mixes", 8),
    "layer norm of a map": (lambda net, y: F.layer_norm(y, y.shape[1:]), "aten::native_layer_norm mixes", 8),
    "flipped": (lambda net, y: y.flip(1), "changes the order", 8),
    "rolled": (lambda net, y: y.roll(1, dims=1), "changes the order", 8),
    "chosen": (lambda net, y: y[:, [0, 3, 5]], "takes these channels apart", 3),
    "sliced": (lambda net, y: y[:, 2:], "takes these channels apart", 6),
    "parts of different sizes": (lambda net, y: y.split([2, 6], 1)[1], "takes these channels apart", 6),
    "every channel by itself": (lambda net, y: sum(y.split(1, 1)).repeat(1, 8, 1, 1), "takes these channels apart", 8),
    "shuffled": (
        lambda net, y: y.view(2, 2, 4, 8, 8).transpose(1, 2).reshape(2, 8, 8, 8),
        "spreads these channels over several dimensions",
        8,
    ),
    "pixel shuffle": (lambda net, y: F.pixel_shuffle(y, 2), "spreads these channels", 2),
    "a matrix product": (lambda net, y: (y.flatten(2) @ y.flatten(2).mT).unsqueeze(-1), "is not known", 8),
    "functional convolution": (lambda net, y: F.conv2d(y, torch.ones(8, 8, 1, 1)), "aten::convolution", 8),
    "sorted": (lambda net, y: y.sort(1).values, "aten::sort is not known", 8),
    "a buffer per channel": (lambda net, y: y * net.table, "a tensor per channel that is no parameter", 8),
    "part of another tensor": (written_into_a_part, "writes them into a part of another tensor", 10),
    "its largest value": (lambda net, y: y / (1 + y.detach().abs().max().item()), "mixes", 8),
}


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], dict[str, tuple[str, str]]]:
    """Return what the analysis alone says of each group."""

    def analysis(model: nn.Module) -> dict[str, tuple[str, str]]:
        monkeypatch.setattr("gumbel_plugin.graph.dependency_groups.check_empirically", lambda *_: {})
        torch.manual_seed(0)
        return {group.name: (group.safety, group.reason) for group in find_groups(model, torch.randn(2, 3, 8, 8))}

    return analysis


@pytest.mark.parametrize("case", PASSES)
def test_what_keeps_channels_apart_is_exact(case: str, judged: Any) -> None:
    assert judged(Net(PASSES[case]))["stem"] == ("exact", "")


@pytest.mark.parametrize("case", STOPPED)
def test_what_does_not_is_stopped_and_named(case: str, judged: Any) -> None:
    between, reason, width = STOPPED[case]
    safety, why = judged(Net(between, width))["stem"]
    assert safety != "exact"
    assert reason in why


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def test_a_layer_that_computes_its_weight_is_not_exact(judged: Any) -> None:
    safety, reason = judged(nn.Sequential(nn.Conv2d(3, 8, 1), Standardised(8, 4, 1)))["0"]
    assert (safety, reason) == ("inexact", "1 computes another weight from its own (aten::std)")
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 4, 1))
    groups = judged(nn.Sequential(nn.Conv2d(3, 8, 1), normed))
    assert all(safety != "exact" for safety, _ in groups.values())


@dataclass
class Result:
    head: Tensor
    features: Tensor


def test_outputs_in_a_dataclass_are_outputs(judged: Any) -> None:
    class Returning(Net):
        def forward(self, x: Tensor) -> Result:
            features = self.stem(x)
            return Result(self.head(features), features)

    assert judged(Returning(lambda net, y: y))["stem"] == ("unsupported", "it reaches the network's output")


def test_dyes_unite_like_a_graph() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = ChannelLabels()
    every = labels.fresh(60)
    component = {int(label): {int(label)} for label in every}
    for _ in range(10):
        first, second = every[torch.randint(0, 60, (2, 4), generator=generator)]
        labels.unite(first, second)
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            both = component[a] | component[b]
            component.update(dict.fromkeys(both, both))
        roots = labels.roots(every)
        for a in range(60):
            same = {int(label) for label in every[roots == roots[a]]}
            assert same == component[int(every[a])]


def test_nothing_is_united_with_no_channel() -> None:
    labels = ChannelLabels()
    one, other = labels.fresh(2)
    labels.unite(torch.stack([one, one * 0]), torch.stack([other * 0, other]))
    assert labels.roots(one) != labels.roots(other)


def test_tight_dyes_hold_one_of_equal_ones() -> None:
    labels = torch.arange(1, 4).reshape(1, 3, 1).expand(2, 3, 5).contiguous()
    small = tight(labels)
    assert torch.equal(small, labels)
    assert varying(small) == (1,)
    assert small.untyped_storage().nbytes() == 3 * 8
