"""Whole heads of attention layers that Torch-Pruning's ``num_heads`` names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.layers.weights import plain_copy
from gumbel_plugin.sparsity.counting import count_macs, count_parameters
from tests.graph.exact_steps import exact_step, set_gates

import torch_pruning as tp  # isort: skip  (after gumbel_plugin, which makes torchvision importable)
import torchvision  # isort: skip

INPUTS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
HEADS, SIZE = 6, 4


class Separate(nn.Module):
    """Queries, keys and values by layers of their own; notes its number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v = (nn.Linear(12, HEADS * SIZE) for _ in range(3))
        self.proj = nn.Linear(HEADS * SIZE, 12)

    def named(self) -> list[nn.Module]:
        return [self.q, self.k, self.v]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(layer(x)) for layer in (self.q, self.k, self.v))
        return self.proj(_attend(q, k, v))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, SIZE).transpose(1, 2)


class Fused(nn.Module):
    """One layer for all three."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 3 * HEADS * SIZE, bias=False), nn.Linear(HEADS * SIZE, 12)

    def named(self) -> list[nn.Module]:
        return [self.qkv]

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, dim=-1)
        return self.proj(_attend(*(part.reshape(*x.shape[:2], -1, SIZE).transpose(1, 2) for part in parts)))


class Unbound(Fused):
    """The packing of timm: (three, heads, size)."""

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(x).reshape(*x.shape[:2], 3, -1, SIZE).permute(2, 0, 3, 1, 4)
        return self.proj(_attend(*packed.unbind(0)))


class Normed(Separate):
    """A norm over all heads before the projection: removing one changes the others."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.LayerNorm(HEADS * SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(layer(x)) for layer in (self.q, self.k, self.v))
        return self.proj(self.between(_attend(q, k, v)))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-2, -1) * SIZE**-0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Transformer(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attentions = nn.ModuleList(kind() for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(4))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        for place, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * place](x))
            x = x + mlp(self.norms[2 * place + 1](x))
        return self.head(x.mean(1))

    def heads(self) -> dict[nn.Module, int]:
        return {layer: HEADS for attention in self.attentions for layer in attention.named()}


def prune(model: Transformer, steps: int = 1, **arguments: Any) -> GumbelGroupPruner:
    arguments = {"num_heads": model.heads(), "prune_num_heads": True, "ignored_layers": [model.head], **arguments}
    pruner = GumbelGroupPruner(model, INPUTS, iterative_steps=steps, **arguments)
    for number in range(steps):
        exact_step(pruner, INPUTS, number)
    return pruner


def left(model: Transformer) -> list[int]:
    return [attention.proj.in_features // SIZE for attention in model.attentions]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Separate, Fused, Unbound])
def test_whole_heads_leave(kind):
    model = Transformer(kind)
    pruner = prune(model, pruning_ratio=0.25, head_pruning_ratio=0.5)
    assert left(model) == [3, 3]
    assert [mlp[0].out_features for mlp in model.mlps] == [15, 15]
    for attention in model.attentions:
        width = 3 * SIZE
        assert attention.named()[0].out_features == width * (1 if kind is Separate else 3)
        assert all(pruner.num_heads[layer] == pruner.out_channel_groups[layer] == 3 for layer in attention.named())
    assert all(group.safety == "exact" for group in pruner.groups() if group.name.startswith("attentions"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Separate, Fused])
def test_heads_that_leave_are_whole_in_the_weights(kind):
    model = Transformer(kind)
    whole = copy.deepcopy(model)
    masks = prune(model, pruning_ratio=0.0, head_pruning_ratio=0.5).masks()
    for name, layer in whole.named_modules():
        if name in masks:
            kept = masks[name]["weight"].any(1)
            assert torch.equal(layer.weight[kept], model.get_submodule(name).weight)
            per_head = kept.view(-1, SIZE)
            assert torch.equal(per_head.any(1), per_head.all(1))
    assert len(masks) == (6 if kind is Separate else 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Separate, Fused])
def test_steps_are_counted_from_the_original_and_the_layers_know(kind):
    model = Transformer(kind)
    prune(model, 2, pruning_ratio=0.2, head_pruning_ratio=0.7)
    assert left(model) == [2, 2]
    assert [getattr(attention, "num_heads", 2) for attention in model.attentions] == [2, 2]
    assert model(INPUTS).shape == (2, 3)


def test_global_pruning_ranks_all_heads_together():
    model = Transformer(Fused)
    prune(model, pruning_ratio=0.5, head_pruning_ratio=0.5, global_pruning=True)
    assert sum(left(model)) == HEADS
    assert sum(mlp[0].out_features for mlp in model.mlps) == 20


@pytest.mark.slow
def test_a_layer_has_a_head_ratio_of_its_own():
    model = Transformer(Fused)
    ratios = {model.attentions[0].qkv: 0.0, model.attentions[1].qkv: 0.5}
    prune(model, pruning_ratio=0.5, head_pruning_ratio=0.2, head_pruning_ratio_dict=ratios)
    assert left(model) == [6, 3]


@pytest.mark.slow
def test_without_prune_num_heads_or_a_ratio_all_heads_stay():
    for arguments in ({"prune_num_heads": False, "head_pruning_ratio": 0.5}, {"head_pruning_ratio": 0.0}):
        model = Transformer(Fused)
        prune(model, pruning_ratio=0.5, **arguments)
        assert left(model) == [6, 6]
        assert [mlp[0].out_features for mlp in model.mlps] == [10, 10]


@pytest.mark.slow
def test_torch_pruning_removes_as_many_heads():
    ours, theirs = Transformer(Fused), Transformer(Fused)
    prune(ours, pruning_ratio=0.0, head_pruning_ratio=0.5)
    importance = tp.importance.MagnitudeImportance()
    pruner = tp.pruner.BasePruner(
        theirs, INPUTS, importance, pruning_ratio=0.5, prune_num_heads=True, prune_head_dims=False,
        head_pruning_ratio=0.5, num_heads=theirs.heads(), ignored_layers=[theirs.head, *theirs.norms],
    )  # fmt: skip
    pruner.step()
    assert left(ours) == left(theirs) == [3, 3]


@pytest.mark.slow
def test_a_norm_over_all_heads_is_found_out():
    model = Transformer(Normed)
    pruner = GumbelGroupPruner(model, INPUTS, num_heads=model.heads(), prune_num_heads=True, head_pruning_ratio=0.5)
    reasons = [group.reason for group in pruner.groups() if group.name.startswith("attentions.0.")]
    assert "something mixes" in reasons[0]
    pruner.step()
    assert left(model) == [6, 6]


def test_grouped_queries_are_refused():
    model = Transformer(Separate)
    heads = {layer: 3 if layer is model.attentions[0].k else HEADS for layer in model.heads()}
    pruner = GumbelGroupPruner(model, INPUTS, num_heads=heads, prune_num_heads=True, head_pruning_ratio=0.5)
    reasons = [group.reason for group in pruner.groups() if group.name.startswith("attentions.0.")]
    assert "grouped queries" in reasons[0]


@pytest.mark.slow
def test_heads_count_in_a_budget_of_parameters():
    model = Transformer(Separate)
    total = count_parameters(model)
    prune(model, target="parameters", pruning_ratio=0.4)
    assert 0.95 < count_parameters(model) / (0.6 * total) <= 1
    assert sum(left(model)) < 2 * HEADS


@pytest.mark.slow
def test_a_history_of_heads_can_be_replayed():
    model, fresh = Transformer(Separate), Transformer(Separate)
    pruner = prune(model, pruning_ratio=0.25, head_pruning_ratio=0.5)
    again = GumbelGroupPruner(
        fresh,
        INPUTS,
        num_heads=fresh.heads(),
        prune_num_heads=True,
        head_pruning_ratio=0.5,
        ignored_layers=[fresh.head],
    )
    again.load_state_dict(pruner.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert left(fresh) == [3, 3]
    assert torch.equal(fresh(INPUTS), model(INPUTS))
    assert [attention.num_heads for attention in fresh.attentions] == [3, 3]


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
class TestKnownHeads:
    """Heads of attention layers of a known class, which need no naming."""

    @staticmethod
    def vit() -> nn.Module:
        torch.manual_seed(0)
        return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 128, num_classes=10)

    def test_they_stay_unless_asked_for(self) -> None:
        model = self.vit()
        pruner = GumbelGroupPruner(model, IMAGES, pruning_ratio=0.5, ignored_layers=[model.heads])
        assert all("attention" not in name for name in pruner.session.plan.masks)

    @pytest.mark.slow
    @pytest.mark.parametrize("target", ["channels", "macs", "parameters"])
    def test_two_steps_are_exact_and_meet_the_budget(self, target: Any) -> None:
        model = self.vit()
        dense = {"macs": count_macs(model, IMAGES), "parameters": count_parameters(model)}
        pruner = self.pruner(model, target, iterative_steps=2)
        for number in range(2):
            exact_step(pruner, IMAGES, number)
        if target == "channels":
            assert [layer.self_attention.num_heads for layer in model.encoder.layers] == [2, 2]
        else:
            left = {"macs": count_macs(model, IMAGES), "parameters": count_parameters(model)}[target]
            assert 0.9 <= left / (0.5 * dense[target]) <= 1.0

    def test_the_optimizer_follows_into_the_compact_layers(self) -> None:
        model = self.vit()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        pruner = self.pruner(model, "channels")
        model(IMAGES).square().mean().backward()
        optimizer.step()
        attention = model.encoder.layers[0].self_attention
        momentum = optimizer.state[attention.in_proj_weight]["momentum_buffer"].clone()
        set_gates(pruner, 0)
        pruner.step()
        pruner.update_optimizer(optimizer)
        compact = model.encoder.layers[0].self_attention
        kept = [head for head in range(4) if head in compact.mask_heads]
        for number, linear in enumerate((compact.q_proj, compact.k_proj, compact.v_proj)):
            expected = momentum.chunk(3)[number].reshape(4, 8, 32)[kept].flatten(0, 1)
            assert torch.equal(optimizer.state[linear.weight]["momentum_buffer"], expected)
        held = {id(each) for group in optimizer.param_groups for each in group["params"]}
        assert held == {id(parameter) for parameter in model.parameters()}

    @pytest.mark.slow
    def test_a_state_and_a_history_are_replayed_on_a_fresh_model(self) -> None:
        model = self.vit()
        pruner = self.pruner(model, "channels", iterative_steps=2)
        set_gates(pruner, 0)
        pruner.step()
        state, weights = pruner.state_dict(), plain_copy(model).state_dict()
        other = self.vit()
        self.pruner(other, "channels", iterative_steps=2).load_state_dict(state)
        third = self.vit()
        self.pruner(third, "channels").load_pruning_history(pruner.pruning_history())
        for again in (plain_copy(other), third):
            again.load_state_dict(weights)
            assert torch.equal(again.eval()(IMAGES), plain_copy(model).eval()(IMAGES))

    def test_ignored_attention_keeps_its_heads(self) -> None:
        model = self.vit()
        first = model.encoder.layers[0].self_attention
        pruner = self.pruner(model, "channels", ignored_layers=[model.heads, first])
        set_gates(pruner, 0)
        pruner.step()
        assert [layer.self_attention.num_heads for layer in model.encoder.layers] == [4, 2]

    @staticmethod
    def pruner(model: nn.Module, target: Any, **arguments: Any) -> GumbelGroupPruner:
        arguments = {"ignored_layers": [model.heads], **arguments}
        ratios = {"pruning_ratio": 0.5, "head_pruning_ratio": 0.5, "prune_num_heads": True}
        return GumbelGroupPruner(model, IMAGES, target=target, **ratios, **arguments)
