"""Layers with a forward of their own: those that only pad, cast or scale are exact, others say what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.shrinking.shrink import shrink
from gumbel_torch_pruning import find_groups
from tests.graph.exact_cuts import Net, cut_everywhere, exact_groups

IMAGES, POINTS, TOKENS, SIGNALS = (2, 3, 7, 7), (4, 5), (2, 4, 5), (2, 5, 9)
Forward = Callable[[Any, Tensor], Tensor]


def own(kind: type[nn.Module], forward: Forward) -> Callable[..., nn.Module]:
    """Return a class of layers with this forward."""
    return type(f"Own{kind.__name__}", (kind,), {"forward": forward})


def padded(layer: Any, x: Tensor) -> Tensor:
    """Of TensorFlow: as many zeros as are needed, more of them at the end."""
    sizes = zip(x.shape[2:], layer.stride, layer.kernel_size, strict=True)
    total = [max((math.ceil(size / step) - 1) * step + kernel - size, 0) for size, step, kernel in sizes]
    pads = [each for size in reversed(total) for each in (size // 2, size - size // 2)]
    return F.conv2d(F.pad(x, pads), layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)


def in_half(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x.bfloat16(), layer.weight.to(torch.bfloat16), layer.bias.to(torch.bfloat16)).to(x.dtype)


def bias_apart(layer: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups) + layer.bias.view(
        1, -1, 1, 1
    )


def equalized(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight * 0.7, layer.bias) * 1.3


def with_residual(layer: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias) + x


def cropped(layer: Any, x: Tensor) -> Tensor:
    return F.conv1d(F.pad(x, (4, 0)), layer.weight, layer.bias)[..., : x.shape[-1]].clone()


def by_matmul(layer: Any, x: Tensor) -> Tensor:
    return torch.matmul(x, layer.weight.transpose(0, 1)) + layer.bias


def through_parent(layer: Any, x: Tensor) -> Tensor:
    return nn.Conv2d._conv_forward(layer, x.contiguous(), layer.weight.contiguous(), layer.bias).relu()


def rectified(layer: Any, x: Tensor) -> Tensor:
    return F.linear(F.gelu(x), layer.weight, layer.bias)


def blurred(layer: Any, x: Tensor) -> Tensor:
    return F.conv2d(F.avg_pool2d(x, 2, 1), layer.weight, layer.bias)


def rounded(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, (layer.weight * 16).round().clamp(-8, 7) / 16, layer.bias)


def layers(kind: Any, before: int, width: int, *sizes: int) -> nn.Module:
    return nn.Sequential(kind(before, width, *sizes), nn.ReLU(), kind(width, 6, *sizes), nn.ReLU(), kind(6, 2, *sizes))


SamePadded = own(nn.Conv2d, padded)


def inverted() -> nn.Module:
    """As in EfficientNet lite: the depthwise layer has a forward of its own, too."""
    return nn.Sequential(
        SamePadded(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), SamePadded(8, 8, 3, groups=8),
        nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 6, 1), SamePadded(6, 12, 3, groups=2), nn.ReLU(),
        nn.Conv2d(12, 2, 1),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "padded": (lambda: layers(SamePadded, 3, 8, 3), IMAGES, {"0", "2"}),
    "padded depthwise and grouped": (inverted, IMAGES, {"3", "6", "7"}),
    "plain linear": (
        lambda: layers(own(nn.Linear, lambda s, x: F.linear(x, s.weight, s.bias)), 5, 8), TOKENS, {"0", "2"}
    ),
    "no bias": (
        lambda: layers(lambda a, b: own(nn.Linear, lambda s, x: F.linear(x, s.weight))(a, b, bias=False), 5, 8), TOKENS,
        {"0", "2"},
    ),
    "bias apart": (lambda: layers(own(nn.Conv2d, bias_apart), 3, 8, 3), IMAGES, {"0", "2"}),
    "equalized": (lambda: layers(own(nn.Linear, equalized), 5, 8), POINTS, {"0", "2"}),
    "by matmul": (lambda: layers(own(nn.Linear, by_matmul), 5, 8), TOKENS, {"0", "2"}),
    "cropped": (lambda: layers(own(nn.Conv1d, cropped), 5, 8, 3), SIGNALS, {"0", "2"}),
    "through the parent": (lambda: layers(own(nn.Conv2d, through_parent), 3, 8, 3), IMAGES, {"0", "2"}),
    "activated before": (lambda: layers(own(nn.Linear, rectified), 5, 8), POINTS, {"0", "2"}),
    "blurred before": (lambda: layers(own(nn.Conv2d, blurred), 3, 8, 1), IMAGES, {"0", "2"}),
    "a rounded weight": (lambda: layers(own(nn.Linear, rounded), 5, 8), POINTS, {"0", "2"}),
    "transposed": (
        lambda: layers(own(nn.ConvTranspose2d, lambda s, x: F.conv_transpose2d(x, s.weight, s.bias)), 3, 8, 2), IMAGES,
        {"0", "2"},
    ),
    "a residual inside": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), own(nn.Conv2d, with_residual)(8, 8, 1), nn.Conv2d(8, 2, 1)),
        IMAGES,
        set(),
    ),
    "one sample, no batch": (
        lambda: layers(own(nn.Linear, lambda s, x: F.linear(x, s.weight, s.bias)), 5, 8), (5,), set()
    ),
    "used twice": (
        lambda: Net(
            lambda s, x: s.head(s.twice(s.twice(s.stem(x)).relu())),
            stem=nn.Linear(5, 8), twice=own(nn.Linear, equalized)(8, 8), head=nn.Linear(8, 2),
        ),
        POINTS,
        {"twice"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_pads_casts_and_scales_is_exact(case: str) -> None:
    build, shape, exact = CASES[case]
    torch.manual_seed(0)
    assert exact_groups(build(), torch.randn(shape)) >= exact


def test_a_bias_of_another_shape_stops_nothing_but_its_layer() -> None:
    class Row(nn.Linear):
        def __init__(self, before: int, after: int) -> None:
            super().__init__(before, after)
            self.bias = nn.Parameter(torch.zeros(1, after))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) + self.bias

    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), Row(6, 4), nn.ReLU(), nn.Linear(4, 2))
    assert exact_groups(model, torch.randn(POINTS)) == {"0", "2"}


def test_lower_precision_inside_is_no_hindrance() -> None:
    model = layers(own(nn.Linear, in_half), 5, 8)
    safety = {group.name: group.safety for group in find_groups(model, torch.randn(POINTS))}
    assert safety == {"0": "exact", "2": "exact", "4": "unsupported"}


def standardized(layer: Any, x: Tensor) -> Tensor:
    weight = layer.weight - layer.weight.mean((1, 2, 3), keepdim=True)
    return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), layer.bias)


def batch_normed(layer: Any, x: Tensor) -> Tensor:
    """As in timm's `ScaledStdConv2d`."""
    weight = F.batch_norm(layer.weight.reshape(1, len(layer.weight), -1), None, None, training=True)
    return F.conv2d(x, weight.reshape_as(layer.weight), layer.bias)


def normed(layer: Any, x: Tensor) -> Tensor:
    return F.linear(F.normalize(x, dim=-1), F.normalize(layer.weight, dim=-1))


class Masked(nn.Linear):
    """As in autoregressive networks."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after)
        self.register_buffer("mask", torch.ones(after, before).tril())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def channels_last(layer: Any, x: Tensor) -> Tensor:
    return F.conv2d(x.movedim(-1, 1), layer.weight, layer.bias).movedim(1, -1)


def second_input(layer: Any, first: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias) + first


OWN = "another weight from its own"

STAY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "standardized": (lambda: layers(own(nn.Conv2d, standardized), 3, 8, 1), IMAGES, f"{OWN} (aten::mean)"),
    "batch-normed": (lambda: layers(own(nn.Conv2d, batch_normed), 3, 8, 1), IMAGES, f"{OWN} (aten::native_batch"),
    "normed": (lambda: layers(own(nn.Linear, normed), 5, 8), POINTS, "another weight from its own (aten::linalg"),
    "masked": (lambda: layers(Masked, 5, 8), POINTS, "another weight from its own (aten::mul)"),
    "shifted before": (
        lambda: layers(own(nn.Linear, lambda s, x: F.linear(x + 1, s.weight)), 5, 8), POINTS,
        "something else of the zeros",
    ),
    "padded with ones": (
        lambda: layers(own(nn.Conv2d, lambda s, x: F.conv2d(F.pad(x, (1, 1), value=1.0), s.weight)), 3, 8, 3), IMAGES,
        "something else of the zeros",
    ),
    "where it is zero": (
        lambda: layers(own(nn.Linear, lambda s, x: F.linear(x, (s.weight == 0).float() + s.weight)), 5, 8), POINTS,
        "another weight from its own",
    ),
    "by einsum": (
        lambda: layers(own(nn.Linear, lambda s, x: torch.einsum("bi,oi->bo", x, s.weight)), 5, 8), POINTS,
        "uses its weight in aten::bmm, not as a Linear does",
    ),
    "channels last": (
        lambda: layers(own(nn.Conv2d, channels_last), 3, 8, 1), (2, 6, 6, 3), "along another dimension"
    ),
    "the second input": (
        lambda: Net(
            lambda s, x: s.head(s.a(s.b(x), s.c(x))),
            a=own(nn.Linear, second_input)(6, 8), b=nn.Linear(5, 8), c=nn.Linear(5, 6), head=nn.Linear(8, 2),
        ),
        POINTS,
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAY)
def test_what_does_something_else_says_what(case: str) -> None:
    build, shape, reason = STAY[case]
    torch.manual_seed(0)
    reasons = cut_everywhere(build(), torch.randn(shape))
    assert any(reason in each for each in reasons.values() if each), reasons
    assert all(reasons.values())


def test_layers_of_others_do_not_lend_their_weight() -> None:
    class Borrowing(nn.Linear):
        def __init__(self, other: nn.Linear) -> None:
            super().__init__(8, 8)
            self.__dict__["other"] = other

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weight), self.other.weight)

    first = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(5, 8), first, nn.ReLU(), Borrowing(first), nn.Linear(8, 2))
    assert "1" not in exact_groups(model, torch.randn(POINTS))


def test_gates_train_and_leave() -> None:
    torch.manual_seed(0)
    model, x = inverted(), torch.randn(IMAGES)
    pruner = GumbelGroupPruner(model, x, pruning_ratio=0.5)
    masked = torch.empty(0)
    for group in pruner.step(interactive=True) or ():
        masked = masked if masked.numel() else model.eval()(x).detach()
        group.prune()
    torch.testing.assert_close(model.eval()(x), masked, atol=1e-5, rtol=1e-5)
    assert (model[0].out_channels, model[3].groups, model[7].out_channels) == (4, 4, 6)


@pytest.mark.parametrize("case", ["padded", "activated before", "equalized", "bias apart"])
def test_constants_of_masked_rows_are_not_folded_where_they_are_not_read_as_they_are(case: str) -> None:
    build, shape, _ = CASES[case]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    weight = torch.ones_like(model[0].weight)
    weight[[0, 3, 5]] = 0
    with torch.no_grad():
        model[0].bias[0] = -1.0  # zero behind the ReLU; the others are constants
        model[0].bias[[3, 5]] = 0.7
    small = shrink(model, {"0": {"weight": weight, "bias": torch.ones_like(model[0].bias)}}, x)
    assert len(small[0].weight) == 7
