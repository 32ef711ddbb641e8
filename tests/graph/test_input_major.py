"""Linear layers whose weight is (in, out), the ``Conv1D`` of transformers: a layer kind like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from gumbel_plugin import GumbelGroupPruner, load_pruned, save_pruned
from gumbel_plugin.layers.geometry import column_sums, columns_view, layer_channels, read_channels, rows_view
from gumbel_plugin.shrinking.shrink import shrink
from gumbel_plugin.sparsity.counting import count_macs, count_parameters
from gumbel_plugin.sparsity.latency import measure_table
from gumbel_torch_pruning import find_groups
from tests.graph.exact_cuts import Net, exact_groups

POINTS, TOKENS, IMAGES = (4, 5), (2, 4, 5), (2, 3, 4, 4)


def linear(before: int, after: int) -> Any:
    return Conv1D(after, before)


class Sub(Conv1D):
    """A subclass that computes the same."""


class Scaled(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous()) * 0.5


class Shifted(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1)


def chain(kind: Callable[[int, int], nn.Module] = linear) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(kind(5, 8), nn.GELU(), kind(8, 6), nn.ReLU(inplace=True), kind(6, 2))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "points": (chain, POINTS, {"0", "2"}),
    "tokens": (chain, TOKENS, {"0", "2"}),
    "read by a linear layer": (
        lambda: nn.Sequential(linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), linear(6, 2)), TOKENS, {"0", "2"}
    ),
    "a residual": (
        lambda: Net(
            lambda s, x: s.head((y := s.a(x).relu()) + s.c(s.b(y).relu())),
            a=nn.Linear(5, 8), b=linear(8, 12), c=linear(12, 8), head=linear(8, 2),
        ),
        TOKENS,
        {"b", "c"},
    ),
    "joined": (
        lambda: Net(
            lambda s, x: s.head(torch.cat([s.a(x), s.b(x)], -1).relu()), a=linear(5, 8), b=nn.Linear(5, 4),
            head=linear(12, 2),
        ),
        POINTS,
        {"a", "b"},
    ),
    "behind images": (
        lambda: Net(
            lambda s, x: s.head(s.b(s.a(x).relu().flatten(2).transpose(1, 2).contiguous()).relu()),
            a=nn.Conv2d(3, 8, 1), b=linear(8, 6), head=nn.Linear(6, 2),
        ),
        IMAGES,
        {"a", "b"},
    ),
    "a subclass": (lambda: chain(lambda before, after: Sub(after, before)), POINTS, {"0", "2"}),
    "a forward of its own": (lambda: chain(lambda before, after: Scaled(after, before)), TOKENS, {"0", "2"}),
    "one that shifts": (lambda: chain(lambda before, after: Shifted(after, before)), POINTS, set()),
    "a norm between": (
        lambda: nn.Sequential(linear(5, 8), nn.LayerNorm(8), linear(8, 6), nn.ReLU(), linear(6, 2)), POINTS, {"2"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_cut_like_a_linear_layer(case: str) -> None:
    build, shape, exact = CASES[case]
    torch.manual_seed(0)
    assert exact_groups(build(), torch.randn(shape)) == exact


def test_its_geometry_is_that_of_a_linear_layer() -> None:
    layer, twin = linear(5, 8), nn.Linear(5, 8)
    twin.weight.data = layer.weight.detach().T.clone()
    columns, rows = torch.randn(5), torch.randn(8)
    assert layer_channels(layer) == layer_channels(twin) == (5, 8)
    assert torch.equal((layer.weight * columns_view(layer, columns)).T, twin.weight * columns_view(twin, columns))
    assert torch.equal((layer.weight * rows_view(layer, rows)).T, twin.weight * rows_view(twin, rows))
    torch.testing.assert_close(column_sums(layer, layer.weight), column_sums(twin, twin.weight))
    layer.weight.data[2] = 0
    assert read_channels(layer).tolist() == [True, True, False, True, True]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


WORDS = {"input_ids": torch.arange(12).reshape(2, 6)}


@pytest.mark.parametrize("target", ["channels", "macs", "parameters"])
def test_gpt2_loses_units_of_its_mlps(target: Any, tmp_path: Path) -> None:
    model = gpt2()
    dense = count_parameters(model), count_macs(model, WORDS)
    ratio = 0.5 if target == "channels" else 0.15
    pruner = GumbelGroupPruner(model, WORDS, pruning_ratio=ratio, target=target)
    masked = torch.empty(0)
    for group in pruner.step(interactive=True) or ():
        masked = masked if masked.numel() else model(**WORDS).logits.detach()
        group.prune()
    torch.testing.assert_close(model(**WORDS).logits, masked, atol=1e-5, rtol=1e-5)
    now = count_parameters(model), count_macs(model, WORDS)
    assert all(after < before for after, before in zip(now, dense, strict=True))
    mlp: Any = model.transformer.h[0].mlp
    assert mlp.c_fc.nf == mlp.c_fc.weight.shape[1] == mlp.c_proj.nx == mlp.c_proj.weight.shape[0]
    assert int(pruner.masks()["transformer.h.0.mlp.c_fc"]["bias"].sum()) == mlp.c_fc.nf
    save_pruned(tmp_path / "small.safetensors", model)
    again = load_pruned(tmp_path / "small.safetensors", gpt2)
    torch.testing.assert_close(again.eval()(**WORDS).logits, model(**WORDS).logits)


def test_its_latency_is_measured_at_smaller_widths() -> None:
    grid = measure_table(gpt2(), WORDS, min_run_time=1e-4).layers["transformer.h.0.mlp.c_fc"]
    assert (grid.inputs[-1], grid.outputs[-1]) == (16, 64)
    assert min(len(grid.inputs), len(grid.outputs)) > 1


def test_root_module_types_speak_of_it_with_linear_layers() -> None:
    x = torch.randn(POINTS)
    assert {group.name for group in find_groups(chain(), x) if group.safety == "exact"} == {"0", "2"}
    pruner = GumbelGroupPruner(chain(), x, pruning_ratio=0.5, root_module_types=[nn.Linear], isomorphic=True)
    assert {group.name for group in pruner.groups() if group.safety == "exact"} == {"0", "2"}


def test_it_trains_with_gates_and_ignores_what_is_ignored() -> None:
    model, x = chain(), torch.randn(8, 5)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    pruner = GumbelGroupPruner(model, x, pruning_ratio=0.5, ignored_layers=["2"], global_pruning=True)
    optimizer.add_param_group({"params": pruner.gate_parameters()})
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        pruner.regularize(model, loss)
        optimizer.step()
    pruner.step()
    assert [layer_channels(model[place]) for place in (0, 2, 4)] == [(5, 4), (4, 6), (6, 2)]


def test_constants_of_masked_rows_are_folded() -> None:
    model, x = chain(), torch.randn(POINTS)
    weight = torch.ones(5, 8)
    weight[:, [1, 4]] = 0
    model[0].bias.data += 0.3
    small: Any = shrink(model, {"0": {"weight": weight, "bias": torch.ones(8)}}, x)
    assert layer_channels(small[0]) == (5, 6)
    masked = copy.deepcopy(model)
    masked[0].weight.data *= weight
    torch.testing.assert_close(small(x), masked(x))
