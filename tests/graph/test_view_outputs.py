"""Layers whose output is a view, with an activation in place behind them: as with one that is not in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.graph.exact_cuts import Net, exact_groups

IMAGES, SEQUENCES, VOLUMES = (2, 3, 6, 6), (2, 4, 5), (2, 2, 4, 4, 4)


def block(before: int, after: int, activation: nn.Module) -> tuple[nn.Module, ...]:
    """As in nnU-Net."""
    return nn.Conv3d(before, after, 3, padding=1), nn.InstanceNorm3d(after, affine=True), activation


def norm(channels: int, **keys: bool) -> nn.InstanceNorm2d:
    return nn.InstanceNorm2d(channels, affine=True, **keys)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "volumes": (
        lambda: nn.Sequential(
            *block(2, 6, nn.LeakyReLU(inplace=True)), *block(6, 9, nn.ELU(inplace=True)), nn.Conv3d(9, 2, 1)
        ),
        VOLUMES,
        {"0", "3"},
    ),
    "one sample": (
        lambda: nn.Sequential(*block(2, 6, nn.ReLU(inplace=True)), nn.Conv3d(6, 2, 1)), (1, *VOLUMES[1:]), {"0"}
    ),
    "running statistics": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1), norm(8, track_running_stats=True), nn.Hardswish(inplace=True), nn.Conv2d(8, 2, 1)
        ),
        IMAGES,
        {"0"},
    ),
    "no affine": (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 1), nn.InstanceNorm1d(8), nn.SiLU(inplace=True), nn.Conv1d(8, 2, 1)),
        SEQUENCES,
        {"0"},
    ),
    "linear layers on sequences": (
        lambda: nn.Sequential(
            nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.Mish(inplace=True), nn.Linear(6, 2)
        ),
        SEQUENCES,
        {"0", "2"},
    ),
    "one multiplied in place": (
        lambda: Net(
            lambda s, x: s.head(s.a(x).mul_(s.b(x).sigmoid_())), a=nn.Linear(5, 8), b=nn.Linear(5, 8),
            head=nn.Linear(8, 2),
        ),
        SEQUENCES,
        {"a"},
    ),
    "a residual added in place": (
        lambda: Net(
            lambda s, x: s.head(s.norm(s.b(y := s.a(x).relu())).add_(y).relu_()),
            a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 8, 1), norm=norm(8), head=nn.Conv2d(8, 2, 1),
        ),
        IMAGES,
        {"a"},
    ),
    "a norm that is used twice": (
        lambda: Net(
            lambda s, x: s.head(s.norm(s.b(s.norm(s.a(x)).relu_())).relu_()),
            a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 8, 1), norm=norm(8), head=nn.Conv2d(8, 2, 1),
        ),
        IMAGES,
        {"b"},
    ),
    "a view of a view": (
        lambda: Net(
            lambda s, x: s.head(s.norm(s.a(x)).flatten(2).relu_().mean(2)),
            a=nn.ConvTranspose2d(3, 8, 2, stride=2), norm=norm(8), head=nn.Linear(8, 2),
        ),
        IMAGES,
        {"a"},
    ),
    "attention that returns a view": (
        lambda: Net(
            lambda s, x: s.head(s.b(s.attention(x, x, x)[0].relu_()).relu_()),
            attention=nn.MultiheadAttention(5, 1, batch_first=True), b=nn.Linear(5, 8), head=nn.Linear(8, 2),
        ),
        SEQUENCES,
        {"b"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_layer_is_in_the_graph(case: str) -> None:
    build, shape, exact = CASES[case]
    torch.manual_seed(0)
    assert exact_groups(build(), torch.randn(shape)) == exact


def test_the_layers_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    exact_groups(model, torch.randn(2, 4, 5))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_view_of_the_input_stays_one() -> None:
    """What is no layer may return its input, of which a part is written to."""

    class Zeroing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            view = nn.Identity()(x[:, :, :1])
            view.zero_()
            return x

    model = nn.Sequential(nn.Linear(5, 8), Zeroing(), nn.Linear(8, 2))
    assert exact_groups(model, torch.randn(2, 4, 5)) == set()
