"""Gates of samples through `GumbelGroupPruner`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gumbel_plugin.config import PruningSection
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.sparsity.counting import count_macs
from gumbel_torch_pruning import GumbelGroupPruner


def train(pruner: GumbelGroupPruner, model: nn.Module, inputs: torch.Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    known = {id(p) for p in model.parameters()}
    others = [p for p in pruner.gate_parameters() if id(p) not in known]
    if others:
        optimizer.add_param_group({"params": others})
    for _ in range(steps):
        loss = model(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        pruner.regularize(model, loss)
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["channels", "macs"])
@pytest.mark.parametrize("name", ["residual", "concat", "flatten_linear"])
def test_channels_leave_at_their_consensus(name: str, target: Any, make_network: Any) -> None:
    network = make_network(name, torch.float64)
    model, inputs = network.model, network.batch(6)
    macs = count_macs(model, network.inputs)
    keys = list(model.state_dict())
    pruner = GumbelGroupPruner(
        model, network.inputs, pruning_ratio=0.4, target=target, pruning=PruningSection(method="consensus")
    )
    train(pruner, model, inputs)
    sizes = {group.name: group.size for group in network.groups().values()} if target == "channels" else {}
    pruner.session.decide()
    expected = copy.deepcopy(model).eval()(inputs)
    pruner.step()
    model.eval()
    torch.testing.assert_close(model(inputs), expected, rtol=1e-10, atol=1e-10)
    assert list(model.state_dict()) == keys
    left = {group.name: group.size for group in pruner.groups()}
    assert all(left[group] == size - int(size * 0.4) for group, size in sizes.items() if group in left)
    if target == "macs":
        assert count_macs(model, network.inputs) <= 0.6 * macs


def test_gates_go_on_where_they_were_in_the_next_step(make_network: Any) -> None:
    network = make_network("residual")
    model = network.model
    pruner = GumbelGroupPruner(
        model, network.inputs, pruning_ratio=0.5, iterative_steps=2, pruning=PruningSection(method="consensus")
    )
    train(pruner, model, network.batch(6))
    before = {name: copy.deepcopy(mask) for name, mask in pruner.session.plan.masks.items()}
    pruner.step()
    for name, mask in pruner.session.plan.masks.items():
        kept = before[name].shape[0] - int(before[name].shape[0] * 0.25)
        assert mask.shape == (kept,)
        assert {tuple(row) for row in mask.output.tolist()} <= {tuple(row) for row in before[name].output.tolist()}
    train(pruner, model, network.batch(6))
    pruner.step()
    assert model(network.batch(3)).shape[0] == 3


def test_blocks_are_no_channel_groups(make_network: Any) -> None:
    network = make_network("residual")
    with pytest.raises(ConfigError, match=r"options\.unit 'block'"):
        GumbelGroupPruner(
            network.model,
            network.inputs,
            pruning_ratio=0.5,
            pruning=PruningSection(method="consensus", options={"unit": "block"}),
        )
