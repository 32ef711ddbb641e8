"""The empirical check compares in float64, whatever the network computes in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin.graph.exactness import double_copy
from gumbel_plugin.graph.exactness.empirical_check import _convolve_by_taps
from gumbel_torch_pruning import find_groups

INPUTS = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


class Leaking(nn.Module):
    """Adds something that depends on how many channels there are, of a given size; its own dtype may be any."""

    def __init__(self, leak: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x).float()).to(self.second.weight.dtype)
        return self.second(x * (1 + self.leak * x.shape[-1] / 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("leak", "safety"), [(0.0, "exact"), (1e-6, "inexact"), (1e-9, "inexact"), (1e-3, "inexact")])
def test_the_smallest_leaks_show(leak: float, safety: str, dtype: torch.dtype) -> None:
    found = {group.name: group for group in find_groups(Leaking(leak).to(dtype), INPUTS.to(dtype))}
    assert found["first"].safety == safety
    assert ("mixes" in found["first"].reason) == (safety != "exact")


class Single(Leaking):
    """Runs in float32 only, as a kernel of one's own may."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("only float32")
        return super().forward(x)


def test_what_does_not_run_in_float64_is_left_whole() -> None:
    found = {group.name: group for group in find_groups(Single(0.0), INPUTS)}
    assert found["first"].safety == "unsupported"
    assert "does not run in float64" in found["first"].reason


def test_a_double_copy_has_nothing_in_another_precision() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).half()
    model.table, model[1].tied = torch.ones(3), model[0].weight
    double = double_copy(model)
    tensors = [*double.parameters(), *double.buffers(), double.table]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
    assert double[1].tied is double[0].weight
    assert double[1].num_batches_tracked.dtype == torch.int64
    assert torch.equal(double[0].weight.half(), model[0].weight)
    assert model[0].weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), (3, 2, 0, 1), ((5, 2), (1, 3), (2, 1), (2, 1)), (1, 1, 0, 1)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_depthwise_convolutions_tap_by_tap(kernel: Any, stride: Any, padding: Any, dilation: Any, bias: bool) -> None:
    layer = nn.Conv2d(6, 6, kernel, stride, padding, dilation, groups=6, bias=bias).double()
    x = torch.randn(2, 6, 13, 11, dtype=torch.float64)
    own = _convolve_by_taps(x, layer.weight.detach(), layer.bias, layer.stride, layer.padding, layer.dilation)
    assert torch.allclose(own, F.conv2d(x, layer.weight, layer.bias, stride, padding, dilation, 6), atol=1e-12)
