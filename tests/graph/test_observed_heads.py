"""Heads of attention layers of any class, which are observed."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from gumbel_plugin import GumbelGroupPruner, load_pruned, save_pruned
from gumbel_plugin.graph.dependency_groups import find_groups
from gumbel_plugin.graph.observed_kind import layout_of
from tests.graph.exact_steps import exact_step
from tests.graph.observed_layers import (
    HEADS,
    REFUSED,
    WIDTH,
    WORKING,
    Convolved,
    FixedForm,
    Grouped,
    Packed,
    Transformer,
    WithSharedBias,
    WithSlopes,
)

READERS = ("proj", "wo", "out_lin")
pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters")
INPUTS = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def prune(model: Transformer, steps: int = 1, **arguments: Any) -> GumbelGroupPruner:
    arguments = {"prune_num_heads": True, "head_pruning_ratio": 0.5, "ignored_layers": [model.head], **arguments}
    pruner = GumbelGroupPruner(model, INPUTS, pruning_ratio=0.25, iterative_steps=steps, **arguments)
    for number in range(steps):
        exact_step(pruner, INPUTS, number)
    return pruner


def columns(model: Transformer) -> list[int]:
    readers = [getattr(layer, name) for layer in model.attentions for name in READERS if hasattr(layer, name)]
    return [reader.weight.shape[1] for reader in readers]


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORKING)
def test_whole_heads_leave_in_two_steps(kind):
    model = Transformer(kind)
    before = sum(parameter.numel() for parameter in model.attentions.parameters())
    ratio = 2 / 3  # of three units with grouped queries, else of six
    pruner = prune(model, 2, head_pruning_ratio=ratio)
    assert columns(model) == [8, 8]
    found = {group.name: group for group in pruner.groups()}
    assert all(found[f"attentions.{number}"].safety == "exact" for number in range(2) if kind is not Grouped)
    after = sum(parameter.numel() for parameter in model.attentions.parameters())
    assert after < (0.55 if kind.__name__ == "MultiQuery" else 0.4) * before
    assert model(INPUTS[:1, :5]).shape == (1, 3)  # not only the example's batch size


@pytest.mark.parametrize("kind", WORKING)
def test_heads_are_found_and_exact(kind):
    groups = {group.name: group for group in find_groups(Transformer(kind), INPUTS)}
    heads = [groups[f"attentions.{number}"] for number in range(2)]
    assert [(group.safety, group.reason) for group in heads] == [("exact", "")] * 2
    assert [group.size for group in heads] == [HEADS // 2 if kind is Grouped else HEADS] * 2
    inside = {part.module for group in heads for part in group.producers}
    assert not inside & groups.keys()  # what computes heads is no group of its own


@pytest.mark.parametrize("kind", REFUSED)
def test_what_ties_heads_is_named(kind):
    groups = {group.name: group for group in find_groups(Transformer(kind), INPUTS)}
    assert groups["attentions.0"].safety == "unsupported"
    assert REFUSED[kind] in groups["attentions.0"].reason


def test_heads_that_others_compute_something_of_stay():
    groups = {group.name: group for group in find_groups(WithSlopes(), INPUTS)}
    assert "computed elsewhere" in groups["attentions.1"].reason


@pytest.mark.slow
def test_layers_that_share_position_biases_lose_the_same_heads():
    model = WithSharedBias()
    whole = copy.deepcopy(model)
    pruner = prune(model)
    assert [group.name for group in pruner.groups() if group.name.startswith("att")] == ["attentions.0"]
    assert columns(model) == [12, 12]
    assert model.attentions[0].table.weight.shape == (9, 3)
    rows = whole.attentions[0].table.weight.T
    kept = [int((rows == left).all(1).nonzero()) for left in model.attentions[0].table.weight.T]
    for old, new in zip(whole.attentions, model.attentions, strict=True):  # the same heads of both
        columns_left = old.proj.weight.unflatten(1, (HEADS, -1))[:, kept].flatten(1)
        assert torch.equal(new.proj.weight, columns_left)


@pytest.mark.parametrize("named", ["qkv", None])
def test_named_layers_are_enough_and_their_counts_follow(named):
    model = Transformer(Packed)
    heads = {attention.qkv: HEADS for attention in model.attentions} if named else {}
    pruner = prune(model, num_heads=heads)
    assert columns(model) == [12, 12]
    assert [(a.num_heads, a.attn_dim, a.head_dim) for a in model.attentions] == [(3, 12, 4)] * 2
    assert all(pruner.num_heads[layer] == pruner.out_channel_groups[layer] == 3 for layer in heads)


def test_only_named_layers_lose_heads():
    model = Transformer(Packed)
    prune(model, num_heads={model.attentions[1].qkv: HEADS})
    assert columns(model) == [24, 12]


def test_ignored_layers_keep_their_heads():
    model = Transformer(Convolved)
    prune(model, ignored_layers=[model.head, model.attentions[0]])
    assert columns(model) == [24, 12]


@pytest.mark.parametrize("kind", [FixedForm, None])
def test_heads_that_cannot_be_pruned_are_told_of(kind, caplog):
    model = Transformer(kind) if kind else nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 3))
    with caplog.at_level(logging.WARNING):
        GumbelGroupPruner(model, INPUTS, pruning_ratio=0.5, prune_num_heads=True, head_pruning_ratio=0.5)
    text = next(message for message in caplog.messages if message.startswith("prune_num_heads=True prunes no head"))
    assert ("attentions.0: the forward of FixedForm" if kind else "no attention layer") in text


@pytest.mark.slow
def test_a_state_and_a_file_rebuild_what_was_pruned(tmp_path):
    model, fresh = Transformer(Packed), Transformer(Packed)
    pruner = prune(model)
    arguments: Any = {"prune_num_heads": True, "head_pruning_ratio": 0.5, "ignored_layers": [fresh.head]}
    again = GumbelGroupPruner(fresh, INPUTS, pruning_ratio=0.25, **arguments)
    again.load_state_dict(pruner.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(INPUTS), model(INPUTS))
    save_pruned(tmp_path / "small.safetensors", model)
    rebuilt = load_pruned(tmp_path / "small.safetensors", lambda: Transformer(Packed))
    assert torch.equal(rebuilt(INPUTS), model(INPUTS))


def test_a_failing_model_bears_no_note():
    model = Transformer(Packed)
    find_groups(model, INPUTS)
    assert all(layout_of(layer) is None for layer in model.modules())
