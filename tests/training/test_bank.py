"""The gate bank: one mask for all groups, in which every group finds what a mask of its own would be."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from gumbel_plugin.masks import Phase
from gumbel_plugin.masks.gumbel_softmax import GumbelSoftmaxMask
from gumbel_plugin.training.bank import joined_state


def test_all_groups_gates_are_one_parameter(network: Any, group_session: Any) -> None:
    session = group_session(network)
    (parameter,) = session.gate_parameters()
    parts = [mask.logit for mask in session.plan.masks.values()]
    assert torch.equal(torch.cat(parts), parameter)
    assert [part.numel() for part in parts] == [group.size for group in session.plan.groups.values()]


def test_a_forward_draws_once_and_every_group_sees_its_part(network: Any, group_session: Any) -> None:
    session = group_session(network)
    network.model(network.inputs)
    whole = session.plan.bank.mask.gates()
    parts = [mask.gates() for mask in session.plan.masks.values()]
    assert torch.equal(torch.cat(parts), whole)
    assert set(whole.unique().tolist()) <= {0.0, 1.0}
    network.model(network.inputs)
    assert session.plan.bank.mask.gates() is not whole


def test_fixing_one_group_leaves_the_others_open(make_network: Any, group_session: Any) -> None:
    session = group_session(make_network("residual"))
    first, second = session.plan.masks.values()
    first.fix(torch.arange(first.shape[0]) % 2)
    assert first.hard.tolist() == [bool(number % 2) for number in range(first.shape[0])]
    assert bool(second.hard.all())
    assert second.phase is Phase.FIXED


def test_the_state_of_a_slice_is_that_of_a_mask_of_its_own(make_network: Any, group_session: Any) -> None:
    session = group_session(make_network("residual"))
    for mask in session.plan.masks.values():
        alone = GumbelSoftmaxMask(mask.shape, session.config.method_options(), session.plan.noise, 7)
        alone.load_state_dict(mask.state_dict())
        assert torch.equal(alone.logit, mask.logit)
        with torch.no_grad():
            alone.logit.neg_()
        mask.load_state_dict(alone.state_dict())
        assert torch.equal(alone.logit, mask.logit)


def test_a_copy_of_a_gated_model_in_training_can_be_made(make_network: Any, group_session: Any) -> None:
    network = make_network("residual")
    session = group_session(network)
    network.model(network.inputs).sum().backward()
    assert copy.deepcopy(session.plan).bank.mask.shape == session.plan.bank.mask.shape


def test_an_optimizer_goes_on_from_a_state_of_one_parameter_a_group() -> None:
    torch.manual_seed(0)
    weights, gates = nn.Parameter(torch.randn(2, 2)), [nn.Parameter(torch.randn(size)) for size in (3, 4)]
    bank = nn.Parameter(torch.cat([gate.detach() for gate in gates]))
    optimizers = [
        torch.optim.Adam([{"params": [weights.detach().clone().requires_grad_()]}, {"params": parameters}], lr=0.1)
        for parameters in (gates, [bank])
    ]
    for step in range(3):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.cos(parameter.detach() + step)
        if step < 2:
            optimizers[0].step()
    with torch.no_grad():
        bank.copy_(torch.cat([gate.detach() for gate in gates]))
    bank.grad = torch.cos(bank.detach() + 2)
    for gate in gates:
        gate.grad = torch.cos(gate.detach() + 2)
    optimizers[1].load_state_dict(joined_state(optimizers[1], copy.deepcopy(optimizers[0].state_dict())))
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(bank.detach(), torch.cat([gate.detach() for gate in gates]))
