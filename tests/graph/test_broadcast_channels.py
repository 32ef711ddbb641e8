"""One channel that scales, shifts or weighs all channels of another layer: those can leave, it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin import GumbelGroupPruner
from tests.graph.exact_cuts import Net, cut_everywhere, exact_groups

IMAGES, POINTS, TOKENS = (2, 3, 6, 6), (4, 5), (2, 4, 5)
Forward = Callable[[Any, Tensor], Any]


def on_points(function: Forward) -> nn.Module:
    return Net(function, a=nn.Linear(5, 12), g=nn.Linear(5, 1), head=nn.Linear(12, 3))


def on_images(function: Forward) -> nn.Module:
    g = nn.Sequential(nn.Conv2d(3, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())
    return Net(function, a=nn.Conv2d(3, 12, 3, padding=1), g=g, head=nn.Conv2d(12, 2, 1))


class Experts(nn.Module):
    """Four experts, whose outputs are weighed and summed."""

    def __init__(self, weigh: Forward) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(4))
        self.gate, self.head, self.weigh = nn.Linear(5, 4), nn.Linear(6, 3), weigh

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.weigh(self, x)))


def one_by_one(net: Any, x: Tensor) -> Tensor:
    weights = net.gate(x).softmax(-1)
    return sum(weights[..., e : e + 1] * expert(x) for e, expert in enumerate(net.experts))  # type: ignore[return-value]


def unbound(net: Any, x: Tensor) -> Tensor:
    weights = net.gate(x).sigmoid().unbind(-1)
    total = torch.zeros(())
    for weight, expert in zip(weights, net.experts, strict=True):
        total = total + expert(x) * weight.unsqueeze(-1)
    return total


class AttentionGate(nn.Module):
    """Of Attention U-Net: a map of one channel, from two maps, scales the skipped one before both are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.deep = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 10, 2, stride=2)
        self.w_skip, self.w_up = nn.Conv2d(8, 5, 1), nn.Conv2d(10, 5, 1)
        self.psi, self.norm = nn.Conv2d(5, 1, 1), nn.BatchNorm2d(1)
        self.head = nn.Conv2d(18, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip, up = self.skip(x).relu(), self.up(self.deep(x).relu()).relu()
        gate = self.norm(self.psi((self.w_skip(skip) + self.w_up(up)).relu())).sigmoid()
        return self.head(torch.cat([skip * gate, up], 1))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "multiplied": (lambda: on_points(lambda s, x: s.head(s.a(x).relu() * s.g(x).sigmoid())), POINTS, {"a"}),
    "in front": (lambda: on_points(lambda s, x: s.head(s.g(x).sigmoid() * s.a(x).relu())), POINTS, {"a"}),
    "in place": (lambda: on_points(lambda s, x: s.head(s.a(x).relu().mul_(s.g(x)))), POINTS, {"a"}),
    "added": (lambda: on_points(lambda s, x: s.head((s.a(x) + s.g(x)).relu())), TOKENS, {"a"}),
    "divided": (lambda: on_points(lambda s, x: s.head(s.a(x) / (1 + s.g(x).exp()))), TOKENS, {"a"}),
    "chosen by": (lambda: on_points(lambda s, x: s.head(torch.where(s.a(x) > 0, s.a(x), s.g(x)))), POINTS, {"a"}),
    "mixed": (lambda: on_points(lambda s, x: s.head(torch.lerp(y := s.a(x), y.relu(), s.g(x)))), TOKENS, {"a"}),
    "twice": (lambda: on_points(lambda s, x: s.head(s.a(x) * (g := s.g(x)) + g)), POINTS, {"a"}),
    "expanded": (lambda: on_points(lambda s, x: s.head((y := s.a(x)) * s.g(x).expand_as(y))), TOKENS, {"a"}),
    "repeated": (
        lambda: on_points(lambda s, x: s.head((y := s.a(x)) * s.g(x).repeat_interleave(y.shape[-1], -1))), TOKENS, {"a"}
    ),
    "with itself": (lambda: on_points(lambda s, x: s.head(s.a(x) * ((g := s.g(x)) * g))), TOKENS, {"a"}),
    "a map": (lambda: on_images(lambda s, x: s.head(s.a(x).relu() * s.g(x))), IMAGES, {"a"}),
    "a number a sample": (
        lambda: on_images(lambda s, x: s.head(s.a(x) * s.g(x).mean((2, 3), keepdim=True))), IMAGES, {"a"}
    ),
    "weights of positions": (
        lambda: on_points(lambda s, x: s.head((s.a(x).relu() * s.g(x).softmax(1)).sum(1))), TOKENS, {"a"}
    ),
    "channels last": (
        lambda: on_images(
            lambda s, x: s.head((s.a(x).permute(0, 2, 3, 1) * s.g(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        ),
        IMAGES,
        {"a"},
    ),
    "experts": (lambda: Experts(one_by_one), POINTS, {f"experts.{e}.0" for e in range(4)} | {"experts.3.2"}),
    "experts on tokens": (lambda: Experts(one_by_one), TOKENS, {f"experts.{e}.0" for e in range(4)} | {"experts.3.2"}),
    "experts with weights apart": (
        lambda: Experts(unbound), POINTS, {f"experts.{e}.0" for e in range(4)} | {"experts.3.2"}
    ),
    "attention u-net": (AttentionGate, IMAGES, {"skip", "deep", "up", "w_skip"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_others_can_leave(case: str) -> None:
    build, shape, exact = CASES[case]
    torch.manual_seed(0)
    assert exact_groups(build(), torch.randn(shape)) == exact


STAY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, str]]] = {
    "the one": (
        lambda: on_points(lambda s, x: s.head(s.a(x) * s.g(x))), POINTS,
        {"g": "aten::mul applies each of them to all channels of another layer"},
    ),
    "weights of experts": (
        lambda: Experts(unbound), POINTS, {"gate": "aten::unbind takes these channels apart"}
    ),
    "experts in a stack": (
        lambda: Experts(lambda s, x: (torch.stack([e(x) for e in s.experts], 1) * s.gate(x)[..., None]).sum(1)), POINTS,
        {"gate": "aten::mul applies each of them to all channels of another layer"},
    ),
    "outer product": (
        lambda: Net(
            lambda s, x: s.head((s.a(x)[:, :, None] * s.g(x)[:, None, :]).flatten(1)),
            a=nn.Linear(5, 4), g=nn.Linear(5, 3), head=nn.Linear(12, 2),
        ),
        POINTS,
        dict.fromkeys("ag", "aten::mul applies each of them to all channels of another layer"),
    ),
    "a width that is written down": (
        lambda: on_points(lambda s, x: s.head(s.a(x) * s.g(x).expand(-1, 12))), POINTS, {"a": "does not run without"}
    ),
    "one of many channels": (
        lambda: on_points(lambda s, x: s.head((y := s.a(x)) * y[:, 3:4])), POINTS, {"a": "takes these channels apart"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAY)
def test_what_stays_says_why(case: str) -> None:
    build, shape, expected = STAY[case]
    torch.manual_seed(0)
    reasons = cut_everywhere(build(), torch.randn(shape))
    for name, reason in expected.items():
        assert reason in reasons[name]


def test_it_is_pruned_while_it_trains() -> None:
    torch.manual_seed(0)
    model, x = AttentionGate(), torch.randn(2, 3, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = GumbelGroupPruner(model, x, pruning_ratio=0.5)
    optimizer.add_param_group({"params": pruner.gate_parameters()})
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        pruner.regularize(model, loss)
        optimizer.step()
    masked = torch.empty(0)
    for group in pruner.step(interactive=True) or ():
        masked = masked if masked.numel() else model.eval()(x).detach()
        group.prune()
    torch.testing.assert_close(model.eval()(x), masked, atol=1e-5, rtol=1e-5)
    assert (model.skip.out_channels, model.w_up.out_channels, model.psi.out_channels) == (4, 3, 1)
