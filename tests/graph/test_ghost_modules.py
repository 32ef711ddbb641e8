"""Channels that are joined with others computed from them, and then meet another layer's: both leave at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.graph.unit_numbers import number_units
from gumbel_torch_pruning import find_groups
from tests.graph.exact_cuts import Net, exact_groups

IMAGES, POINTS = (2, 3, 6, 6), (4, 5)


class Ghost(nn.Module):
    """Half of the outputs are convolved, the others computed from each of them."""

    def __init__(self, before: int, after: int, parts: int = 2, first: bool = True) -> None:
        super().__init__()
        n = after // parts
        self.primary, self.norm = nn.Conv2d(before, n, 1, bias=False), nn.BatchNorm2d(n)
        self.cheap = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1, groups=n) for _ in range(parts - 1))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.primary(x)).relu()
        others = [layer(y).relu() for layer in self.cheap]
        return torch.cat([y, *others] if self.first else [*others, y], 1)


class Bottleneck(nn.Module):
    """As in GhostNet: two ghosts, gates from squeeze and excitation between them, and a shortcut."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.up, self.down = Ghost(before, 12), Ghost(12, after)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.shortcut = nn.Identity()
        if before != after:
            depthwise = nn.Conv2d(before, before, 3, padding=1, groups=before)
            self.shortcut = nn.Sequential(depthwise, nn.Conv2d(before, after, 1), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.down(y) + self.shortcut(x)


def conv(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 1)


# Network: (build, shape of the inputs, {exact group: its units})
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "added": (
        lambda: Net(lambda s, x: s.head(s.g(x) + s.a(x)), g=Ghost(3, 8), a=conv(3, 8), head=conv(8, 2)), IMAGES,
        {"a": 4},
    ),
    "the other first": (
        lambda: Net(lambda s, x: s.head(s.a(x) + s.g(x)), g=Ghost(3, 8, first=False), a=conv(3, 8), head=conv(8, 2)),
        IMAGES,
        {"a": 4},
    ),
    "three parts": (
        lambda: Net(lambda s, x: s.head(s.g(x) + s.a(x)), g=Ghost(3, 12, 3), a=conv(3, 12), head=conv(12, 2)), IMAGES,
        {"a": 4},
    ),
    "multiplied": (
        lambda: Net(
            lambda s, x: s.head(s.g(x) * s.a(x.mean((2, 3), keepdim=True)).sigmoid()),
            g=Ghost(3, 8), a=conv(3, 8), head=conv(8, 2),
        ),
        IMAGES,
        {"a": 4},
    ),
    "a network of them": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Bottleneck(8, 8), Bottleneck(8, 16), Bottleneck(16, 16),
            nn.Conv2d(16, 2, 1),
        ),
        IMAGES,
        {"0": 4, "3.up.primary": 6, "4.up.primary": 6, "5.up.primary": 6, "4.shortcut.1": 8},
    ),
    "before a grouped layer": (
        lambda: Net(
            lambda s, x: s.head(s.grouped(s.g(x) + s.a(x))),
            g=Ghost(3, 8), a=conv(3, 8), grouped=nn.Conv2d(8, 4, 1, groups=2), head=conv(4, 2),
        ),
        IMAGES,
        {"a": 4, "grouped": 2},
    ),
    "parts in steps of two": (
        lambda: Net(
            lambda s, x: s.head(s.grouped(torch.cat([y := s.p(x), y.relu()], 1) + s.a(x))),
            p=conv(3, 6), a=conv(3, 12), grouped=nn.Conv2d(12, 6, 1, groups=3), head=conv(6, 2),
        ),
        IMAGES,
        {"a": 2, "grouped": 2},
    ),
    "on points": (
        lambda: Net(
            lambda s, x: s.head(torch.cat([y := s.p(x), torch.tanh(y), y.relu()], -1) + s.a(x)),
            p=nn.Linear(5, 4), a=nn.Linear(5, 12), head=nn.Linear(12, 2),
        ),
        POINTS,
        {"a": 4},
    ),
    "joined with a third": (
        lambda: Net(
            lambda s, x: s.head(torch.cat([y := s.p(x), s.q(x), y.relu()], -1) + s.a(x)),
            p=nn.Linear(5, 4), q=nn.Linear(5, 3), a=nn.Linear(5, 11), head=nn.Linear(11, 2),
        ),
        POINTS,
        {"a": 7},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_channels_leave_together(case: str) -> None:
    build, shape, sizes = CASES[case]
    torch.manual_seed(0)
    model, x = build(), torch.randn(shape)
    groups = {group.name: group for group in find_groups(model, x)}
    exact = exact_groups(model, x)
    by_root = {name: next(g for g in groups.values() if name in {p.module for p in g.producers}) for name in sizes}
    assert {name: group.size for name, group in by_root.items()} == sizes
    assert {group.name for group in by_root.values()} <= exact


def test_a_ghost_that_is_cut_to_an_odd_width_stays() -> None:
    model = Net(lambda s, x: s.head(s.g(x)[:, :7] + s.a(x)), g=Ghost(3, 8), a=conv(3, 7), head=conv(7, 2))
    reasons = {group.name: group.reason for group in find_groups(model, torch.randn(IMAGES))}
    assert "aten::slice" in reasons["a"]


def test_it_is_pruned_by_units() -> None:
    torch.manual_seed(0)
    model = Net(lambda s, x: s.head(s.g(x) + s.a(x)), g=Ghost(3, 8), a=conv(3, 8), head=conv(8, 2))
    x = torch.ones(IMAGES)
    pruner = GumbelGroupPruner(model, x, pruning_ratio=0.25)
    masked = torch.empty(0)
    for group in pruner.step(interactive=True) or ():
        masked = model.eval()(x).detach()
        group.prune()
    torch.testing.assert_close(model.eval()(x), masked, atol=1e-5, rtol=1e-5)
    assert (model.a.out_channels, model.g.primary.out_channels, model.head.in_channels) == (6, 3, 6)
    assert [len(channels) for _, _, channels in pruner.pruning_history()] == [2]


def test_units_without_gaps() -> None:
    assert number_units(1, torch.tensor([5, 2, 9])).tolist() == [0, 1, 2]
    assert number_units(2, torch.tensor([5, 2, 9, 1])).tolist() == [0, 1, 0, 1]
    assert number_units(1, torch.tensor([5, 2, 5, 3])).tolist() == [0, 1, 0, 2]
    assert number_units(2, torch.tensor([5, 2, 3, 5])).tolist() == [0, 0, 0, 0]  # 0 ~ 3 by label, 0 ~ 2, 1 ~ 3 by part
