"""Sessions on every network of the table: sampling, extraction, detaching, copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.layers.geometry import columns_view
from gumbel_plugin.layers.weights import GATES, plain_copy
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.training.session import MaskingSession
from gumbel_torch_pruning import find_groups


def column_masked(plain: nn.Module, session: MaskingSession, gates: dict[str, Tensor]) -> nn.Module:
    """Mask a plain copy's consumers by hand: each column's weight times the gate of its unit."""
    model = copy.deepcopy(plain)
    with torch.no_grad():
        for name, group in session.plan.groups.items():
            for part in group.consumers:
                layer = model.get_submodule(part.module)
                columns = torch.ones(getattr(layer, "in_channels", getattr(layer, "in_features", 0)))
                columns[part.positions] = gates[name][part.units]
                layer.weight.mul_(columns_view(layer, columns).to(layer.weight))
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# Sampling and extraction --------------------------------------------------------------------------------------------


def test_one_sample_a_forward_acts_at_all_consumers(network: Any, group_session: Any) -> None:
    plain, inputs = copy.deepcopy(network.model), network.batch(16)
    session = group_session(network)
    outputs = []
    for _ in range(2):
        outputs.append(network.model(inputs))
        gates = {name: mask.gates().detach() for name, mask in session.plan.masks.items()}
        assert all(set(g.unique().tolist()) <= {0.0, 1.0} for g in gates.values())
        torch.testing.assert_close(outputs[-1], column_masked(plain, session, gates)(inputs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1])


def test_eval_is_hard_and_deterministic(network: Any, group_session: Any) -> None:
    plain, inputs = copy.deepcopy(network.model).eval(), network.batch(4)
    session = group_session(network)
    network.model.eval()
    before = session.plan.noise.forward
    first, second = network.model(inputs), network.model(inputs)
    assert torch.equal(first, second)
    assert session.plan.noise.forward == before
    hard = {name: (mask.logit >= 0).float() for name, mask in session.plan.masks.items()}
    assert all(0 < g.sum() < g.numel() for g in hard.values())
    torch.testing.assert_close(first, column_masked(plain, session, hard)(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gradients_reach_every_gate_and_every_weight(network: Any, group_session: Any) -> None:
    session = group_session(network)
    with torch.no_grad():
        for parameter in session.gate_parameters():
            parameter.fill_(2.0)
    inputs = network.batch(64)
    for _ in range(8):  # a gate whose readers were all closed in one sample has its turn in another
        output = network.model(inputs)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    for parameter in session.gate_parameters():
        assert bool((parameter.grad != 0).all())
    weights = [(n, p) for n, p in network.model.named_parameters() if GATES not in n]
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in weights if n.endswith("weight"))


def test_extraction_zeroes_the_closed_columns_and_nothing_else(network: Any, group_session: Any) -> None:
    before = copy.deepcopy(network.model).eval()
    session = group_session(network)
    network.model.eval()
    inputs = network.batch(4)
    hard_output = network.model(inputs)
    masks = session.extract()
    assert session.phase is Phase.FIXED
    hard = {name: mask.hard for name, mask in session.plan.masks.items()}
    assert equal_states(
        {n: t for n, t in network.model.state_dict().items() if GATES not in n},
        column_masked(before, session, {n: h.float() for n, h in hard.items()}).state_dict(),
    )
    torch.testing.assert_close(network.model(inputs), hard_output, rtol=1e-5, atol=1e-6)
    session.detach()
    torch.testing.assert_close(network.model(inputs), hard_output, rtol=1e-5, atol=1e-6)

    producers = {part.module for group in session.plan.groups.values() for part in group.producers}
    assert set(masks) == producers
    for name, group in session.plan.groups.items():
        for part in group.producers:
            layer = network.model.get_submodule(part.module)
            assert masks[part.module]["weight"].shape == layer.weight.shape
            assert set(masks[part.module]) == {n for n, p in layer.named_parameters(recurse=False) if p is not None}
            dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            rows = masks[part.module]["weight"].movedim(dim, 0).reshape(layer.weight.shape[dim], -1)[part.positions]
            assert torch.equal(rows, hard[name][part.units].float()[:, None].expand_as(rows))
            if "bias" in masks[part.module]:
                assert torch.equal(masks[part.module]["bias"][part.positions], rows[:, 0])


def test_a_budget_is_met_exactly(network: Any, group_session: Any) -> None:
    session = group_session(network, sparse_ratio=0.5)
    session.extract()
    for group, mask in zip(session.plan.groups.values(), session.plan.masks.values(), strict=True):
        assert int((~mask.hard).sum()) == group.size // 2


def test_masks_go_round_through_fix_masks(network: Any, group_session: Any) -> None:
    second = copy.deepcopy(network)
    session, other = group_session(network), group_session(second)
    masks = session.extract()
    with torch.no_grad():
        for parameter in other.gate_parameters():
            parameter.fill_(1.0)
    other.fix_masks(masks)
    assert other.phase is Phase.FIXED
    for name, mask in session.plan.masks.items():
        assert torch.equal(other.plan.masks[name].hard, mask.hard)
    for name, targets in other.extract().items():
        assert all(torch.equal(mask, masks[name][target]) for target, mask in targets.items())
    for (name, ours), theirs in zip(network.model.named_parameters(), second.model.parameters(), strict=True):
        assert GATES in name or torch.equal(ours, theirs)


def test_producers_of_a_part_have_their_part_of_the_mask(pruning: Any, randomize_logits: Any, parts: Any) -> None:
    torch.manual_seed(0)
    model, inputs = parts, torch.randn(2, 3, 4, 4)
    groups = [group for group in find_groups(model, inputs) if group.safety == "exact"]
    assert [group.size for group in groups] == [10]
    session, other = (
        MaskingSession(duplicate, pruning({"op_names": ["whole"]}), groups)
        for duplicate in (model, copy.deepcopy(model))
    )
    session.start()
    randomize_logits(session)
    masks = session.extract()
    rows = {name: targets["weight"].flatten(1)[:, 0] for name, targets in masks.items()}
    assert torch.equal(torch.cat([rows["left"], rows["right"]]), rows["whole"])
    hard = session.plan.masks[groups[0].name].hard
    assert torch.equal(rows["whole"] == 1, hard)
    for given in (masks, {name: masks[name] for name in ("left", "right")}, {"whole": masks["whole"]}):
        other.fix_masks(given)
        assert torch.equal(other.plan.masks[groups[0].name].hard, hard)
        other.fix_masks({"whole": {"weight": torch.ones(10, 3, 1, 1)}})


# Detaching and copies -----------------------------------------------------------------------------------------------


def test_detaching_leaves_no_trace(network: Any, group_session: Any) -> None:
    model = network.model
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    session = group_session(network)
    assert any(GATES in key for key in model.state_dict())
    model(network.inputs).sum().backward()
    session.detach()
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    for name, module in model.named_modules():
        assert set(vars(module)) == attributes[name]
        hooks = (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called)
        assert not any(hooks), name
    session.detach()  # a second time does no harm


def test_a_plain_copy_has_no_gates_and_takes_nothing_from_the_original(network: Any, group_session: Any) -> None:
    keys = list(network.model.state_dict())
    group_session(network)
    network.model(network.inputs).sum().backward()
    duplicate = plain_copy(network.model)
    assert list(duplicate.state_dict()) == keys
    for module in duplicate.modules():
        assert not any((module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called))
    assert any(GATES in key for key in network.model.state_dict())
    duplicate.eval()(network.inputs)


def train(model: nn.Module, parameters: Iterable[nn.Parameter], inputs: Tensor, steps: int = 3) -> list[Tensor]:
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    outputs = []
    for _ in range(steps):
        outputs.append(model(inputs))
        loss = outputs[-1].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [output.detach() for output in outputs]


def test_a_copy_of_an_attached_model_trains_by_itself(network: Any, group_session: Any) -> None:
    session = group_session(network)
    network.model(network.inputs).sum().backward()  # there is a sample with a graph to copy
    network.model.zero_grad()
    duplicate = copy.deepcopy(network.model)
    before = state_of(network.model)
    mine = {id(tensor) for tensor in network.model.parameters()}
    assert not any(id(parameter) in mine for parameter in duplicate.parameters())
    counter = session.plan.noise.forward
    copied = train(duplicate, duplicate.parameters(), network.batch(8))
    assert equal_states(before, state_of(network.model))
    assert session.plan.noise.forward == counter
    assert not equal_states(before, state_of(duplicate))
    original = train(network.model, network.model.parameters(), network.batch(8))
    for ours, theirs in zip(original, copied, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_copied_session_lets_go_of_its_own_model(mlp: Any, element_session: Any) -> None:
    torch.manual_seed(0)
    session = element_session(mlp(4, 8, 3))
    duplicate = copy.deepcopy(session)
    duplicate.detach()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in duplicate.model.modules())
    assert not any(GATES in key for key in duplicate.model.state_dict())
    assert any(GATES in key for key in session.model.state_dict())
    assert session.model[0]._forward_pre_hooks


def test_an_attached_model_can_be_pickled(mlp: Any, element_session: Any, randomize_logits: Any) -> None:
    torch.manual_seed(0)
    model, inputs = mlp(4, 8, 3), torch.randn(3, 4)
    randomize_logits(element_session(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(loaded.eval()(inputs), model.eval()(inputs))
