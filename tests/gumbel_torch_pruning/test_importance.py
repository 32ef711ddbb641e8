"""Learned gates as an importance for Torch-Pruning's own pruners."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from gumbel_plugin import GumbelGroupPruner, MaskingSession
from gumbel_torch_pruning import GateImportance, find_groups

import torch_pruning as tp  # isort: skip  (after gumbel_plugin, which makes torchvision importable)


def trained(network, section) -> MaskingSession:
    """Return a session whose gates have distinct logits, detached."""
    session = MaskingSession(
        network.model, section(network.model, sparse_ratio=0.5), find_groups(network.model, network.inputs)
    )
    session.start()
    generator = torch.Generator().manual_seed(0)
    for mask in session.plan.masks.values():
        mask.logit.data.copy_(torch.randn(mask.shape, generator=generator))
    session.detach()
    return session


def logits_of(session: MaskingSession, layer: str) -> Tensor:
    """Return the logits of the group that a layer's output channels belong to."""
    groups = session.plan.groups.items()
    name = next(name for name, group in groups if any(part.module == layer for part in group.producers))
    return session.plan.masks[name].logit.detach()


@pytest.mark.parametrize("kind", [tp.pruner.MagnitudePruner, tp.pruner.BNScalePruner, tp.pruner.GroupNormPruner])
@pytest.mark.parametrize("copied", [False, True])
def test_the_channels_with_the_lowest_probability_go(make_network, section, kind, copied):
    network = make_network("residual")
    session = trained(network, section)
    whole = copy.deepcopy(network.model)
    model = copy.deepcopy(network.model) if copied else network.model
    pruner = kind(model, network.inputs, importance=GateImportance(session), pruning_ratio=0.5)
    pruner.step()
    for name, width in (("conv1", 3), ("conv2", 4)):
        kept = torch.sort(torch.topk(logits_of(session, name), width).indices).values
        norm = name.replace("conv", "bn")
        assert torch.equal(model.get_submodule(norm).bias, whole.get_submodule(norm).bias[kept])


def test_all_groups_are_ranked_together(make_network, section):
    network = make_network("residual")
    session = trained(network, section)
    importance = GateImportance(session)
    tp.pruner.BasePruner(network.model, network.inputs, importance, global_pruning=True, pruning_ratio=0.5).step()
    first, second = logits_of(session, "conv1"), logits_of(session, "conv2")
    threshold = torch.cat([first, second]).sort().values[7]  # 14 channels in all
    assert network.model.conv1.out_channels == int((first >= threshold).sum())
    assert network.model.conv2.out_channels == int((second >= threshold).sum())


def test_every_channel_of_a_group_has_its_gates_probability(network, section):
    session = trained(network, section)
    importance = GateImportance(session)
    graph = tp.DependencyGraph().build_dependency(network.model, network.inputs)
    seen = set()
    for group in graph.get_all_groups():
        name = graph._module2name[group[0].dep.target.module]
        scores = importance(group)
        if name not in session.plan.masks:
            assert scores is None  # the layer that returns the output
            continue
        seen.add(name)
        probability = torch.sigmoid(session.plan.masks[name].logit)
        torch.testing.assert_close(scores, probability.repeat(len(scores) // len(probability)))
    assert seen == set(session.plan.masks)


def test_readers_are_scored_by_what_they_read(make_network, section):
    """Torch-Pruning takes the reader as the root of attention's groups; in a concatenation it reads several groups."""
    network = make_network("concat")
    session = trained(network, section)
    graph = tp.DependencyGraph().build_dependency(network.model, network.inputs)
    group = graph.get_pruning_group(network.model.mix, tp.prune_conv_in_channels, list(range(10)))
    expected = torch.cat([torch.sigmoid(session.plan.masks[name].logit) for name in ("left", "right")])
    assert torch.equal(GateImportance(session)(group), expected)
    part = graph.get_pruning_group(network.model.mix, tp.prune_conv_in_channels, [1, 7])
    assert torch.equal(GateImportance(session)(part), expected[[1, 7]])


def test_a_pruners_own_importance_is_that_of_its_present_gates(make_network):
    network = make_network("conv_bn_relu")
    pruner = GumbelGroupPruner(network.model, network.inputs, iterative_steps=2, pruning_ratio=0.6)
    for _ in range(2):
        for mask in pruner.session.plan.masks.values():
            mask.logit.data.copy_(torch.randn(mask.shape))
        found = {
            pruner.DG._module2name[group[0].dep.target.module]: pruner.estimate_importance(group)
            for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types)
        }
        for name, mask in pruner.session.plan.masks.items():
            assert torch.equal(found[name], torch.sigmoid(mask.logit.detach()))
        pruner.step()
