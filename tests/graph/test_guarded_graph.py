"""One group that cannot be read costs no more than itself: neither the network nor the time of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.graph.dependency_groups import DependencyGroups
from gumbel_plugin.graph.exactness import layer_rules, propagation
from gumbel_plugin.graph.guarded_graph import GuardedGraph
from gumbel_plugin.sparsity.counting import count_parameters
from gumbel_torch_pruning import find_groups
from tests.graph.exact_steps import exact_step

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Between(nn.Module):
    """A plain convolution, any block on 16 channels, and a plain convolution."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.before, self.stem = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1)
        self.block, self.after, self.head = block, nn.Conv2d(16, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.block(self.stem(self.before(x).relu()))).relu())


class Modulation(nn.Module):
    """FocalNet's: pieces of one convolution are multiplied with each other, shifted by one channel a level."""

    def __init__(self, levels: int = 2, order: str = "first", c: int = 16) -> None:
        super().__init__()
        self.sizes = [c, c, levels + 1] if order == "first" else [levels + 1, c, c]
        self.order, self.levels = order, levels
        self.f, self.h, self.proj = nn.Conv2d(c, 2 * c + levels + 1, 1), nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.focal = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1, groups=c) for _ in range(levels))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.f(x), self.sizes, 1)
        q, ctx, gates = parts if self.order == "first" else (parts[1], parts[2], parts[0])
        total = ctx.mean((2, 3), keepdim=True) * gates[:, self.levels :]
        for level, layer in enumerate(self.focal):
            ctx = F.gelu(layer(ctx))
            total = total + ctx * gates[:, level : level + 1]
        return x + self.proj(q * self.h(total))


class Separable(nn.Module):
    """MobileViTv2's attention: scores of one channel weigh keys, values come from the same layer."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.c, self.qkv, self.out = c, nn.Conv2d(c, 1 + 2 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).flatten(2).split([1, self.c, self.c], 1)
        context = (key * query.softmax(-1)).sum(-1, keepdim=True)
        return x + self.out((value.relu() * context).view_as(x))


class Windows(nn.Module):
    """Hiera's and Twins' windows, in which Torch-Pruning divides by zero."""

    def __init__(self, c: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(c, 3 * c), nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).reshape(b, -1, 4, 3, self.heads, c // self.heads).permute(3, 0, 4, 2, 1, 5)
        q, k, v = qkv.unbind(0)
        q = q.unflatten(3, (4, -1)).amax(dim=3)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 3).reshape(b, -1, c)
        return x + self.proj(y).mean(1)[..., None, None]


class Rotated(nn.Module):
    """GPT-NeoX's attention: queries, keys and values of each head, positions on a part of them."""

    def __init__(self, c: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(c, 3 * c), nn.Linear(c, c)

    def turned(self, x: Tensor) -> Tensor:
        part, rest = x[..., :2], x[..., 2:]
        half = torch.cat((-part[..., 1:], part[..., :1]), -1)
        return torch.cat((part * 0.6 + half * 0.8, rest), -1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x.flatten(2).mT).view(b, h * w, self.heads, -1).transpose(1, 2).chunk(3, dim=-1)
        y = (self.turned(q) @ self.turned(k).mT).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(b, h * w, c)).mT.reshape(x.shape)


class Recurrent(nn.Module):
    """A recurrent layer over the rows of a map."""

    def __init__(self, kind: str, c: int = 16, layers: int = 1) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(c, 12), nn.Linear(6, c)
        self.rnn = getattr(nn, kind)(12, 6, num_layers=layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.inside(x.mean(3).mT)
        return x + self.out(self.rnn(rows)[0]).mT[..., None]


class RelativePositions(nn.Module):
    """BotNet's relative logits: a learned table is expanded over another dimension than the channels."""

    def __init__(self, c: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Conv2d(c, 3 * c, 1)
        self.rel = nn.Parameter(torch.randn(8, c // heads) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(b, 3 * self.heads, -1, h * w).mT.chunk(3, 1)
        rel = (q.reshape(b, self.heads, h, w, -1) @ self.rel.T)[:, :, :, None].expand(-1, -1, -1, h, -1, -1)
        scores = (q @ k.mT) + rel.permute(0, 1, 2, 4, 3, 5).reshape(b, self.heads, h * w, h * w)
        return x + (scores.softmax(-1) @ v).mT.reshape(b, c, h, w)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "modulation": Modulation,
    "modulation, gates first": lambda: Modulation(order="last"),
    "modulation of three levels": lambda: Modulation(levels=3),
    "two modulations": lambda: nn.Sequential(Modulation(), Modulation()),
    "separable attention": Separable,
    "two separable attentions": lambda: nn.Sequential(Separable(), nn.BatchNorm2d(16), Separable()),
    "windows": Windows,
    "windows of one head": lambda: Windows(heads=1),
    "rotated": Rotated,
    "rotated, four heads": lambda: Rotated(heads=4),
    "GRU": lambda: Recurrent("GRU"),
    "GRU of two layers": lambda: Recurrent("GRU", layers=2),
    "LSTM": lambda: Recurrent("LSTM"),
    "RNN": lambda: Recurrent("RNN"),
    "relative positions": RelativePositions,
}


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")  # Torch-Pruning's
@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_beside_an_unreadable_block_is_pruned_exactly(block: str) -> None:
    torch.manual_seed(0)
    model = Between(BLOCKS[block]()).eval()
    groups = {group.name: group for group in find_groups(model, IMAGES)}
    assert groups["before"].safety == groups["after"].safety == "exact"
    assert all(group.reason for group in groups.values() if group.safety != "exact")
    pruner = GumbelGroupPruner(model, IMAGES, pruning_ratio=0.5, ignored_layers=[model.head])
    exact_step(pruner, IMAGES)
    assert model.after.out_channels < 8


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")  # Torch-Pruning's
@pytest.mark.parametrize(
    "arguments",
    [
        {"isomorphic": True, "global_pruning": True},
        {"target": "macs", "pruning_ratio": 0.05},
        {"global_pruning": True, "iterative_steps": 2},
        {"num_heads": {"block.0.qkv": 1}, "prune_num_heads": True, "head_pruning_ratio": 0.5},
    ],
)
def test_other_arguments_pass_over_it_too(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Between(nn.Sequential(Separable(), Windows(), Modulation(), Separable()))
    pruner = GumbelGroupPruner(model, IMAGES, **{"pruning_ratio": 0.3, "ignored_layers": [model.head], **arguments})
    before = count_parameters(model)
    exact_step(pruner, IMAGES)
    assert count_parameters(model) < before


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_the_reason_is_what_reads_the_channels(kind: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), getattr(nn, kind)(8, 5))
    found = {group.name: group.reason for group in find_groups(model, torch.randn(3, 2, 6))}
    assert found["0"] == "1 is a recurrent layer over these channels"


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: torchvision.models.resnet18(weights=None),
    "depthwise": lambda: torchvision.models.mobilenet_v3_small(weights=None),
    "concatenations": lambda: torchvision.models.squeezenet1_1(weights=None),
    "dense": lambda: torchvision.models.DenseNet(4, (2, 2, 2, 2), 8),
    "flattened": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 8), nn.Linear(8, 2)),
    "splits": lambda: torchvision.models.shufflenet_v2_x0_5(weights=None),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_walk_finds_what_torch_pruning_finds(network: str) -> None:
    graph = DependencyGroups(NETWORKS[network]().eval(), torch.randn(1, 3, 32, 32)).graph
    assert isinstance(graph, GuardedGraph)
    ours = [_spelled(group) for group in graph.get_all_groups([], (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR))]
    graph.__class__ = tp.DependencyGraph
    theirs = [_spelled(group) for group in graph.get_all_groups([], (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR))]
    assert ours == theirs


def _spelled(group: Any) -> list[tuple[Any, ...]]:
    return [(item.dep.target, item.dep.handler, item.idxs, item.root_idxs) for item in group.items]


class TestGuards:
    """Whatever fails in one place is noted there."""

    @pytest.mark.parametrize("function", ["update_concat_index_mapping", "update_split_index_mapping"])
    def test_an_operation_that_cannot_be_numbered(self, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)

            def forward(self, x: Tensor) -> Tensor:
                one, two = x.split([8, 8], 1)
                return torch.cat([self.one(x) + one, self.two(x) + two], 1)

        def broken(graph: Any, node: Any) -> None:
            raise ZeroDivisionError("integer division")

        monkeypatch.setattr(tp.dependency.index_mapping, function, broken)
        model = Between(Block())
        groups = {group.name: group for group in find_groups(model, IMAGES)}
        assert groups["before"].safety == groups["after"].safety == "exact"
        others = groups.keys() - {"before", "after"}  # the parts are of a size that the code says
        assert {groups[name].safety for name in others} == {"unsupported"}
        assert "stem" in others
        assert all(group.reason for group in groups.values() if group.safety != "exact")

    def test_an_operation_whose_rule_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(step: Any) -> None:
            raise IndexError("out of range")

        monkeypatch.setitem(propagation._RULE_OF, "roll", broken)
        groups = self._groups(lambda x: x.roll(1, 2))
        assert groups["stem"].reason.startswith("aten::roll does something unexpected to these channels (IndexError")
        assert groups["before"].safety == groups["after"].safety == "exact"

    def test_a_layer_whose_rule_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(self: Any, *args: Any) -> None:
            raise IndexError("out of range")

        monkeypatch.setattr(layer_rules.Layers, "_normalize_over", broken)
        groups = self._groups(nn.GroupNorm(4, 16))
        assert "GroupNorm block.inside is called is not understood (IndexError" in groups["stem"].reason
        assert groups["before"].safety == groups["after"].safety == "exact"

    def test_a_group_whose_description_fails_is_read_from_its_labels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = DependencyGroups._coupled

        def coupled(self: DependencyGroups, group: Any) -> int:
            if group[0].dep.target.module.out_channels == 16:
                raise ZeroDivisionError
            return original(self, group)

        monkeypatch.setattr(DependencyGroups, "_coupled", coupled)
        groups = self._groups(nn.ReLU())
        assert {groups[name].safety for name in ("before", "stem", "after")} == {"exact"}

    def _groups(self, function: Any) -> dict[str, Any]:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inside = function

            def forward(self, x: Tensor) -> Tensor:
                return self.inside(x)

        return {group.name: group for group in find_groups(Between(Block()), IMAGES)}
