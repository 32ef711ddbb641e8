"""Parts of a layer's output: cut by chunk, split or slice, read more than once, joined with what no layer computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin import GumbelGroupPruner, verify_equivalence
from gumbel_torch_pruning import find_groups
from tests.graph.exact_steps import exact_step


class Net(nn.Module):
    """A network whose forward is given, over named layers."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def conv(before: int, after: int, size: int = 1, **keys: Any) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2, **keys)


def unit(before: int, after: int, size: int = 1, **keys: Any) -> nn.Module:
    return nn.Sequential(conv(before, after, size, **keys), nn.BatchNorm2d(after), nn.SiLU())


def c2f(net: Any, x: Tensor) -> Tensor:
    parts = list(net.before(x).chunk(2, 1))
    for block in net.blocks:
        parts.append(block(parts[-1]) + parts[-1])
    return net.end(net.after(torch.cat(parts, 1)))


def c2f_of(before: nn.Module, blocks: list[nn.Module], after: nn.Module, end: nn.Module) -> Net:
    return Net(c2f, before=before, blocks=nn.ModuleList(blocks), after=after, end=end)


def split_attention(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    parts = y.split(y.shape[1] // 2, 1)
    gates = net.fc(sum(parts).mean((2, 3), keepdim=True)).chunk(2, 1)
    return net.end(sum(gate.sigmoid() * part for gate, part in zip(gates, parts, strict=True)))


def gru(net: Any, x: Tensor) -> Tensor:
    h = net.start(x).tanh()
    for _ in range(2):
        r, z = net.gates(torch.cat([h, x], 1)).sigmoid().chunk(2, 1)
        h = (1 - z) * h + z * net.new(torch.cat([r * h, x], 1)).tanh()
    return net.end(h)


def res2net(net: Any, x: Tensor) -> Tensor:
    parts = net.a(x).chunk(4, 1)
    done = [parts[0]]
    for layer, part in zip(net.layers, parts[1:], strict=True):
        done.append(layer(part + done[-1] if len(done) > 1 else part))
    return net.end(torch.cat(done, 1))


def selective_kernel(net: Any, x: Tensor) -> Tensor:
    a, b = net.a(x), net.b(x)
    scores = torch.stack(net.fc((a + b).mean((2, 3), keepdim=True)).chunk(2, 1)).softmax(0)
    return net.end(a * scores[0] + b * scores[1])


def halves_by_slices(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    half = y.shape[-1] // 2
    return net.end(F.silu(y[..., :half]) * y[..., half:])


def optical_flow(net: Any, one: Tensor, two: Tensor) -> Tensor:
    a, b = net.f(torch.cat([one, two], 0)).chunk(2, 0)
    return net.end(net.m(torch.cat([a * b, one], 1)))


def with_cache(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.end(torch.cat([y.new_zeros(len(y), 0, *y.shape[2:]), y], 1))


def with_statistics(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).relu()
    return net.end(net.b(torch.cat([x.std(1, keepdim=True), y, x.mean(1, keepdim=True), net.c(x)], 1)))


def cheap(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.end(torch.cat([y, net.cheap(y)], 1)[:, : 2 * y.shape[1]])


IMAGES, TOKENS, POINTS = [(2, 3, 8, 8)], [(2, 6, 5)], [(4, 6)]

# Network: (build, shapes of the inputs, layers whose outputs can leave).
EXACT: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], str]] = {
    "C2f": (
        lambda: c2f_of(unit(3, 16), [unit(8, 8, 3), unit(8, 8, 3)], unit(32, 6), conv(6, 2)),
        IMAGES,
        "before.0 blocks.0.0 blocks.1.0 after.0",
    ),
    "C2f with bottlenecks, grouped": (
        lambda: c2f_of(
            unit(3, 16), [nn.Sequential(unit(8, 6), conv(6, 8, 3, groups=2))], unit(24, 6), conv(6, 2)
        ),
        IMAGES,
        "before.0 blocks.0.0.0 blocks.0.1 after.0",
    ),
    "C2f over points": (
        lambda: c2f_of(nn.Linear(6, 16), [nn.Linear(8, 8)], nn.Linear(24, 5), nn.Linear(5, 2)),
        POINTS,
        "before blocks.0 after",
    ),
    "C2f over volumes": (
        lambda: c2f_of(nn.Conv3d(2, 8, 1), [nn.Conv3d(4, 4, 3, padding=1)], nn.Conv3d(12, 4, 1), nn.Conv3d(4, 2, 1)),
        [(1, 2, 4, 4, 4)],
        "before blocks.0 after",
    ),
    "split attention": (
        lambda: Net(split_attention, a=unit(3, 16), fc=conv(8, 16), end=conv(8, 2)), IMAGES, "a.0 fc"
    ),
    "recurrent gates": (
        lambda: Net(gru, start=conv(3, 6), gates=conv(9, 12), new=conv(9, 6, 3), end=conv(6, 2)),
        IMAGES,
        "start gates new",
    ),
    "partial stages": (
        lambda: Net(
            lambda s, x: s.end(torch.cat([s.b((y := s.a(x).chunk(2, 1))[0]), y[1]], 1)),
            a=unit(3, 12), b=unit(6, 10, 3), end=conv(16, 2),
        ),
        IMAGES,
        "a.0 b.0",
    ),
    "Res2Net": (
        lambda: Net(res2net, a=unit(3, 16), layers=nn.ModuleList(unit(4, 4, 3) for _ in range(3)), end=conv(16, 2)),
        IMAGES,
        "a.0 layers.0.0 layers.2.0",
    ),
    "selective kernels": (
        lambda: Net(selective_kernel, a=unit(3, 8, 3), b=unit(3, 8, 5), fc=conv(8, 16), end=conv(8, 2)),
        IMAGES,
        "a.0 b.0 fc",
    ),
    "SwiGLU": (
        lambda: Net(
            lambda s, x: s.end(F.silu((y := s.a(x).chunk(2, -1))[0]) * y[1]), a=nn.Linear(5, 24), end=nn.Linear(12, 2)
        ),
        TOKENS,
        "a",
    ),
    "GLU": (lambda: Net(lambda s, x: s.end(F.glu(s.a(x), -1)), a=nn.Linear(5, 24), end=nn.Linear(12, 2)), TOKENS, "a"),
    "GLU of maps": (lambda: Net(lambda s, x: s.end(F.glu(s.a(x), 1)), a=unit(3, 12), end=conv(6, 2)), IMAGES, "a.0"),
    "halves by slices": (lambda: Net(halves_by_slices, a=nn.Linear(5, 24), end=nn.Linear(12, 2)), TOKENS, "a"),
    "a third read three times": (
        lambda: Net(
            lambda s, x: s.end(torch.cat([(y := s.a(x).chunk(3, 1))[2], y[2] * y[0], s.b(y[2]), y[1]], 1)),
            a=unit(3, 15), b=conv(5, 7), end=conv(22, 2),
        ),
        IMAGES,
        "a.0 b",
    ),
    "two layers joined and cut elsewhere": (
        lambda: Net(
            lambda s, x: s.end(torch.mul(*torch.cat([s.a(x), s.b(x)], 1).chunk(2, 1))),
            a=conv(3, 4), b=conv(3, 12), end=conv(8, 2),
        ),
        IMAGES,
        "b",
    ),
    "halves flattened": (
        lambda: Net(
            lambda s, x: s.end(torch.sub(*s.a(x).relu().chunk(2, 1)).flatten(1)), a=conv(3, 8), end=nn.Linear(256, 2)
        ),
        IMAGES,
        "a",
    ),
    "halves without weights between": (
        lambda: Net(
            lambda s, x: s.end(torch.cat([s.n((y := s.a(x).chunk(2, 1))[0]), s.d(y[1]), s.p(y[0])], 1)),
            a=conv(3, 12), n=nn.BatchNorm2d(6, affine=False), d=conv(6, 6, 3, groups=6), p=nn.PReLU(6), end=conv(18, 2),
        ),
        IMAGES,
        "a d",
    ),
    "a cheap copy beside": (
        lambda: Net(cheap, a=unit(3, 8), cheap=unit(8, 8, 3, groups=8), end=conv(16, 2)), IMAGES, "a.0"
    ),
    "images in a batch": (
        lambda: Net(optical_flow, f=unit(3, 8), m=conv(11, 6), end=conv(6, 2)), [*IMAGES, *IMAGES], "f.0 m"
    ),
    "frames in a batch": (
        lambda: Net(
            lambda s, x: s.end(torch.cat([(y := s.a(x.repeat(3, 1, 1, 1)).split(len(x)))[0] * y[2], y[1], y[1]], 1)),
            a=conv(3, 6), end=conv(18, 2),
        ),
        IMAGES,
        "a",
    ),
    "tokens apart": (
        lambda: Net(
            lambda s, x: s.end(torch.cat([(y := s.a(x).split([2, 4], 1))[1], y[0] * 2], 1)).sum(1) + s.b(y[1][:, 0]),
            a=nn.Linear(5, 8), b=nn.Linear(8, 2), end=nn.Linear(8, 2),
        ),
        TOKENS,
        "a",
    ),
    "the input first": (
        lambda: Net(
            lambda s, x: s.end(s.b(torch.cat([x, s.a(x).relu()], -1)).relu()),
            a=nn.Linear(6, 16), b=nn.Linear(22, 8), end=nn.Linear(8, 3),
        ),
        POINTS,
        "a b",
    ),
    "statistics before, between and behind": (
        lambda: Net(with_statistics, a=conv(3, 8), b=unit(15, 6), c=conv(3, 5), end=conv(6, 2)), IMAGES, "a b.0 c"
    ),
    "an empty cache": (lambda: Net(with_cache, a=unit(3, 8), end=conv(8, 2)), IMAGES, "a.0"),
    "padded channels added": (
        lambda: Net(
            lambda s, x: s.end(s.a(x) + F.pad(s.b(x), (0, 0, 0, 0, 0, 4))), a=unit(3, 12), b=unit(3, 8), end=conv(12, 2)
        ),
        IMAGES,
        "a.0 b.0",
    ),
}  # fmt: skip

WHOLE: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], str, str]] = {
    "a size in the code": (
        lambda: Net(lambda s, x: s.end(torch.mul(*s.a(x).split(4, 1))), a=conv(3, 8), end=conv(4, 2)),
        IMAGES, "a", "does not run without some of its units",
    ),
    "a half that is an output": (
        lambda: Net(lambda s, x: (s.end((y := s.a(x).chunk(2, 1))[0]), y[1]), a=conv(3, 8), end=conv(4, 2)),
        IMAGES, "a", "it reaches the network's output",
    ),
    "a half that is normalized": (
        lambda: Net(
            lambda s, x: s.end(s.n((y := s.a(x).chunk(2, -1))[0]) * y[1]),
            a=nn.Linear(5, 16), n=nn.LayerNorm(8), end=nn.Linear(8, 2),
        ),
        TOKENS, "a", "LayerNorm n computes statistics",
    ),
    "unequal parts": (
        lambda: Net(
            lambda s, x: s.end((y := s.a(x).split([2, 6], 1))[0]) + s.b(y[1]),
            a=conv(3, 8), b=conv(6, 2), end=conv(2, 2),
        ),
        IMAGES, "a", "takes these channels apart",
    ),
    "cut together with the input": (
        lambda: Net(
            lambda s, x: s.end(torch.mul(*torch.cat([s.a(x), x], 1).chunk(2, 1))), a=conv(3, 5), end=conv(4, 2)
        ),
        IMAGES, "a", "together with what no layer computes",
    ),
}  # fmt: skip


def made(build: Callable[[], nn.Module], shapes: list[tuple[int, ...]]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert isinstance(module.running_mean, Tensor)
                assert isinstance(module.running_var, Tensor)
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model.eval(), tuple(map(torch.randn, shapes))


@pytest.mark.parametrize("case", EXACT)
def test_parts_can_leave(case: str) -> None:
    build, shapes, layers = EXACT[case]
    model, inputs = made(build, shapes)
    exact = [group for group in find_groups(model, inputs) if group.safety == "exact"]
    assert set(layers.split()) <= {part.module for group in exact for part in group.producers}
    assert len({group.name for group in exact}) == len(exact)


@pytest.mark.parametrize("case", EXACT)
def test_what_leaves_changes_nothing_and_is_removed_again_from_a_history(case: str) -> None:
    build, shapes, _ = EXACT[case]
    model, inputs = made(build, shapes)
    fresh = copy.deepcopy(model)
    pruner = GumbelGroupPruner(model, inputs, pruning_ratio=0.6, iterative_steps=2)
    before = sum(parameter.numel() for parameter in fresh.parameters())
    for seed in (1, 2):
        exact_step(pruner, inputs, seed)
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    again = GumbelGroupPruner(fresh, inputs, pruning_ratio=0.6)
    again.load_pruning_history(pruner.pruning_history())
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]
    fresh.load_state_dict(model.state_dict())
    verify_equivalence(model, fresh, inputs).raise_for_failure()


@pytest.mark.parametrize("case", WHOLE)
def test_what_stays_whole_says_why(case: str) -> None:
    build, shapes, layer, reason = WHOLE[case]
    model, inputs = made(build, shapes)
    (group,) = (each for each in find_groups(model, inputs) if layer in {part.module for part in each.producers})
    assert group.safety != "exact"
    assert reason in group.reason
