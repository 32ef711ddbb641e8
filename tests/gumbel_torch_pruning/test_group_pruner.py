"""What leaves the network changes nothing; masks, copies, resuming and training on."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin import GumbelGroupPruner, load_pruned, save_pruned, verify_equivalence
from gumbel_plugin.errors import LifecycleError, NonFiniteLossError, TargetError
from gumbel_plugin.graph.record import kept_of
from gumbel_plugin.layers.weights import GATES, plain_copy
from tests.graph.exact_steps import set_gates

import torch_pruning as tp  # isort: skip  (after gumbel_plugin, which makes torchvision importable)

SETTINGS: dict[str, dict[str, Any]] = {
    "each group": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
    "round_to": {"round_to": 2},
    "macs": {"target": "macs"},
    "parameters": {"target": "parameters"},
}


def step(pruner: GumbelGroupPruner) -> nn.Module:
    """Make an interactive step; return the masked model, before anything was removed."""
    groups = pruner.step(interactive=True)
    first = next(groups, None)
    masked = plain_copy(pruner.model)
    if first is not None:
        first.prune()
    for group in groups:
        group.prune()
    return masked


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters() if GATES not in name}


def train(pruner: GumbelGroupPruner, optimizer: torch.optim.Optimizer, inputs: Tensor, steps: int) -> list[float]:
    """Train a model to tell its own inputs apart; return the losses."""
    losses = []
    targets = torch.arange(len(inputs)) % 4
    pruner.model.train()
    for _ in range(steps):
        outputs = pruner.model(inputs).flatten(1)[:, :4]
        loss = F.cross_entropy(outputs, targets)
        optimizer.zero_grad()
        loss.backward()
        pruner.regularize(pruner.model, loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def optimizer_of(pruner: GumbelGroupPruner, kind: type[torch.optim.Optimizer] = torch.optim.SGD, **own: Any) -> Any:
    weights = [parameter for name, parameter in pruner.model.named_parameters() if GATES not in name]
    keys = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    return kind([{"params": weights}, {"params": pruner.gate_parameters(), "lr": 0.05}], lr=0.01, **keys, **own)


# Exactness ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_small_model_computes_what_the_masked_one_computes(network, setting):
    before = sum(parameter.numel() for parameter in network.model.parameters())
    pruner = GumbelGroupPruner(network.model, network.inputs, pruning_ratio=0.5, **SETTINGS[setting])
    set_gates(pruner, 0)
    masked = step(pruner)
    verify_equivalence(masked, network.model, network.inputs).raise_for_failure()
    assert sum(parameter.numel() for parameter in network.model.parameters()) < 0.75 * before
    assert not any(GATES in name for name in network.model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["channels", "macs"])
def test_every_iterative_step_is_exact(network, target):
    pruner = GumbelGroupPruner(network.model, network.inputs, target=target, iterative_steps=3, pruning_ratio=0.6)
    sizes = []
    for number in range(3):
        set_gates(pruner, number)
        masked = step(pruner)
        verify_equivalence(masked, plain_copy(network.model), network.inputs).raise_for_failure()
        sizes.append(sum(size.numel() for size in shapes(network.model).values()))
    assert sizes[0] > sizes[1] > sizes[2]


def test_after_the_first_group_the_masks_are_in_the_weights(network):
    pruner = GumbelGroupPruner(network.model, network.inputs, pruning_ratio=0.5)
    set_gates(pruner, 0)
    pruner.session.decide()
    network.model.eval()
    inputs = network.batch(5)
    gated = network.model(inputs)
    groups = pruner.step(interactive=True)
    next(groups)
    folded = copy.deepcopy(network.model).eval()
    assert torch.equal(folded(inputs), gated)
    assert not all(bool(mask.hard.all()) for mask in pruner.session.plan.masks.values())


def test_interactive_or_not_the_same_leaves(make_network):
    one, two = make_network("residual"), make_network("residual")
    for network, interactive in ((one, False), (two, True)):
        pruner = GumbelGroupPruner(network.model, network.inputs, pruning_ratio=0.5)
        set_gates(pruner, 0)
        if interactive:
            for group in pruner.step(interactive=True):
                assert isinstance(group, tp.dependency.Group)
                group.prune()
        else:
            assert pruner.step() is None
    assert shapes(one.model) == shapes(two.model)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_the_step_leaves_no_trace_but_the_cut(network):
    frozen = next(network.model.parameters())
    frozen.requires_grad_(False)
    name = next(name for name, _ in network.model.named_parameters())
    keys, modes = list(network.model.state_dict()), [module.training for module in network.model.modules()]
    random_state = torch.get_rng_state()
    GumbelGroupPruner(network.model, network.inputs, pruning_ratio=0.5).step()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(network.model.state_dict()) == keys
    assert [module.training for module in network.model.modules()] == modes
    assert [n for n, parameter in network.model.named_parameters() if not parameter.requires_grad] == [name]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.model.modules())


# Masks ----------------------------------------------------------------------------------------------------------------


def test_masks_say_which_rows_will_go(make_network):
    network = make_network("residual")
    pruner = GumbelGroupPruner(network.model, network.inputs, pruning_ratio=0.5)
    assert all(bool((mask == 1).all()) for own in pruner.masks().values() for mask in own.values())
    set_gates(pruner, 0)
    pruner.session.decide()
    masks = pruner.masks()
    assert set(masks) == {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3"}
    assert masks["conv1"]["weight"].shape == network.model.conv1.weight.shape
    assert int(masks["conv2"]["weight"].flatten(1).any(1).sum()) == 4
    assert torch.equal(masks["conv1"]["weight"].flatten(1).any(1), masks["bn3"]["bias"] != 0)
    whole = copy.deepcopy(network.model)
    pruner.step()
    for name, own in masks.items():
        kept = own["bias"] != 0 if "bias" in own else own["weight"].flatten(1).any(1)
        assert torch.equal(pruner.masks()[name]["weight"], own["weight"])
        if name.startswith("bn"):
            assert torch.equal(whole.get_submodule(name).weight[kept], network.model.get_submodule(name).weight)


@pytest.mark.slow
def test_masks_of_several_steps_are_in_the_original_numbers(network):
    whole = copy.deepcopy(network.model)
    pruner = GumbelGroupPruner(network.model, network.inputs, iterative_steps=3, pruning_ratio=0.6)
    closed = []
    for number in range(3):
        set_gates(pruner, number)
        step(pruner)
        closed.append(sum(int((mask == 0).sum()) for own in pruner.masks().values() for mask in own.values()))
    assert closed[0] < closed[1] < closed[2]
    for name, own in pruner.masks().items():
        before, after = whole.get_submodule(name), network.model.get_submodule(name)
        assert own["weight"].shape == before.weight.shape
        kept = own["bias"] != 0 if "bias" in own else own["weight"].flatten(1).any(1)
        if before.bias is not None:
            assert torch.equal(before.bias[kept], after.bias)
        else:  # the untouched rows: what is left of one is part of what it was
            rows = [set(row.tolist()) for row in before.weight[kept].flatten(1)]
            left = [set(row.tolist()) - {0.0} for row in after.weight.flatten(1)]
            assert all(part <= row for part, row in zip(left, rows, strict=True))


# Copies, states, histories --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_copy_of_the_pruner_goes_its_own_way(network):
    pruner = GumbelGroupPruner(network.model, network.inputs, pruning_ratio=0.5)
    before = shapes(network.model)
    set_gates(pruner, 0)
    twin = copy.deepcopy(pruner)
    masked = step(twin)
    verify_equivalence(masked, twin.model, network.inputs).raise_for_failure()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.model.modules())
    assert shapes(network.model) == before
    pruner.step()
    assert shapes(network.model) == shapes(twin.model) != before


def test_a_copy_of_the_model_has_gates_of_its_own(make_network):
    network = make_network("conv_bn_relu")
    pruner = GumbelGroupPruner(network.model, network.inputs)
    twin = copy.deepcopy(network.model).eval()
    inputs, reference = network.batch(3), plain_copy(network.model).eval()(network.batch(3))
    for parameter in pruner.gate_parameters():
        parameter.data.fill_(-3.0)
    assert torch.equal(twin(inputs), reference)
    network.model.eval()
    assert not torch.equal(network.model(inputs), reference)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_resumed_run_goes_on_bit_for_bit(make_network, kind, steps_before):
    arguments = {"pruning_ratio": 0.5, "iterative_steps": 2, "total_steps": 6}
    network = make_network("residual")
    original, inputs = copy.deepcopy(network.model), network.batch(8)
    pruner = GumbelGroupPruner(network.model, network.inputs, **arguments)
    optimizer = optimizer_of(pruner, kind)
    for _ in range(steps_before):
        train(pruner, optimizer, inputs, 4)
        pruner.step()
        pruner.update_optimizer(optimizer)
    train(pruner, optimizer, inputs, 3)
    file = io.BytesIO()
    torch.save([pruner.state_dict(), network.model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)

    resumed = GumbelGroupPruner(original, network.inputs, **arguments)
    resumed.load_state_dict(states[0])
    resumed.model.load_state_dict(states[1])
    again = optimizer_of(resumed, kind)
    again.load_state_dict(states[2])
    for one, other in ((pruner, optimizer), (resumed, again)):
        train(one, other, inputs, 3)
        step(one)
        one.update_optimizer(other)
    assert resumed.current_step == pruner.current_step == steps_before + 1
    expected = network.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in original.state_dict().items())
    assert list(expected) == list(original.state_dict())
    masks = resumed.masks()
    assert all(torch.equal(mask, masks[name][key]) for name, own in pruner.masks().items() for key, mask in own.items())


def test_a_finished_pruner_can_be_saved_too(make_network):
    network, fresh = make_network("residual"), make_network("residual")
    pruner = GumbelGroupPruner(network.model, network.inputs)
    set_gates(pruner, 0)
    pruner.step()
    again = GumbelGroupPruner(fresh.model, fresh.inputs)
    again.load_state_dict(pruner.state_dict())
    again.model.load_state_dict(network.model.state_dict())
    assert shapes(again.model) == shapes(network.model)
    assert again.masks().keys() == pruner.masks().keys()
    with pytest.raises(LifecycleError, match="1 of 1 iterative_steps"):
        again.step()


@pytest.mark.slow
def test_a_history_gives_a_fresh_model_the_same_shapes(network, make_network):
    pruner = GumbelGroupPruner(network.model, network.inputs, iterative_steps=2, pruning_ratio=0.6)
    for number in range(2):
        set_gates(pruner, number)
        pruner.step()
    history = pruner.pruning_history()
    plain = make_network(network.name).model
    tp.DependencyGraph().build_dependency(plain, network.inputs).load_pruning_history(copy.deepcopy(history))
    assert shapes(plain) == shapes(network.model)
    own = make_network(network.name)
    GumbelGroupPruner(own.model, own.inputs).load_pruning_history(history)
    assert shapes(own.model) == shapes(network.model)
    own.model.load_state_dict(network.model.state_dict())
    assert torch.equal(own.model.eval()(network.inputs), network.model.eval()(network.inputs))


def test_states_and_histories_of_others_are_refused(make_network):
    network, other = make_network("residual"), make_network("conv_bn_relu")
    pruner = GumbelGroupPruner(network.model, network.inputs)
    stranger = GumbelGroupPruner(other.model, other.inputs)
    with pytest.raises(TargetError, match="of another plan"):
        pruner.load_state_dict(stranger.state_dict())
    with pytest.raises(TargetError, match="lacks"):
        pruner.load_state_dict({"step": 0})
    stranger.step()
    with pytest.raises(TargetError, match="layer '3' is not in the graph"):
        pruner.load_pruning_history(stranger.pruning_history())
    pruner.step()
    with pytest.raises(LifecycleError, match="unpruned"):
        pruner.load_state_dict(pruner.state_dict())


def test_what_was_returned_does_not_change_with_later_steps():
    def pruner() -> GumbelGroupPruner:
        model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
        return GumbelGroupPruner(model, torch.randn(2, 3), pruning_ratio=0.75, iterative_steps=3)

    first, second = pruner(), pruner()
    first.step()
    state, masks = first.state_dict(), first.masks()
    first.step()
    assert int(masks["0"]["bias"].sum()) == 12
    second.load_state_dict(state)
    second.step()
    assert second.model[0].out_features == int(second.masks()["0"]["bias"].sum()) == 8
    assert [len(positions) for _, _, positions in state["history"]] == [4]


def test_the_model_knows_what_it_kept(tmp_path):
    dense = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    model = copy.deepcopy(dense)
    pruner = GumbelGroupPruner(model, torch.randn(2, 3), pruning_ratio=0.5, iterative_steps=2)
    for number in range(2):
        set_gates(pruner, number)
        pruner.step()
    kept = kept_of(model)
    rows = kept["0.weight"][0]
    assert torch.equal(kept["2.weight"][1], rows)
    assert torch.equal(kept["0.bias"][0], rows)
    assert torch.equal(dense[0].weight[rows], model[0].weight)
    save_pruned(tmp_path / "small", model)
    again = load_pruned(tmp_path / "small", lambda: copy.deepcopy(dense))
    assert torch.equal(again(torch.ones(1, 3)), model(torch.ones(1, 3)))


def test_a_reset_needs_something_to_gate():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))
    pruner = GumbelGroupPruner(model, torch.randn(2, 3))
    pruner.step()
    with pytest.raises(TargetError, match="can be gated"):
        pruner.reset()
    assert pruner.current_step == 1


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("target", ["channels", "macs"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_gates_close_towards_the_target_while_training(make_network, kind, target):
    network = make_network("residual")
    pruner = GumbelGroupPruner(network.model, network.inputs, target=target, pruning_ratio=0.5, total_steps=200)
    train(pruner, optimizer_of(pruner, kind), network.batch(16), 200)
    pruner.update_regularizer()
    for budget in pruner.session.plan.budgets:
        kept = float(budget.usage([term.mask.decide(None).float() for term in budget.terms]))
        assert 0.5 - 1 / 6 - 1e-6 <= kept <= 0.5 + 1e-6  # the smallest group has six units


@pytest.mark.slow
def test_training_goes_on_after_the_step(network):
    pruner = GumbelGroupPruner(network.model, network.inputs, pruning_ratio=0.3, total_steps=10)
    optimizer = optimizer_of(pruner)
    inputs = network.batch(8)
    train(pruner, optimizer, inputs, 10)
    pruner.step()
    pruner.update_optimizer(optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in network.model.parameters()}
    before = [parameter.detach().clone() for parameter in network.model.parameters()]
    losses = train(pruner, optimizer, inputs, 20)
    assert losses[-1] < losses[0]
    moved = [not torch.equal(old, new) for old, new in zip(before, network.model.parameters(), strict=True)]
    assert all(moved[place] for place, old in enumerate(before) if old.dim() > 1)  # a bias before a norm has no effect
    assert float(pruner.regularize(network.model)) == 0.0


def test_a_loss_that_is_not_finite_gives_the_model_its_state_back(make_network):
    network = make_network("conv_bn_relu")
    pruner = GumbelGroupPruner(network.model, network.inputs)
    optimizer = optimizer_of(pruner)
    train(pruner, optimizer, network.inputs, 1)
    with torch.no_grad():
        next(network.model.parameters()).fill_(torch.nan)
    loss = network.model(network.inputs).sum()
    loss.backward()
    with pytest.raises(NonFiniteLossError, match="nan at step 1"):
        pruner.regularize(network.model, loss)
    assert all(bool(parameter.isfinite().all()) for parameter in network.model.parameters())


def test_regularize_knows_its_model(make_network):
    network, other = make_network("conv_bn_relu"), make_network("conv_bn_relu")
    pruner = GumbelGroupPruner(network.model, network.inputs)
    with pytest.raises(LifecycleError, match="another model"):
        pruner.regularize(other.model)
    assert float(pruner.regularize(nn.Sequential(network.model))) == 0  # as DistributedDataParallel wraps it
    pruner.update_regularizer()
