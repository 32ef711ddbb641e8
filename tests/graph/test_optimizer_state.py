"""An optimizer's state follows the parameters that pruning replaces."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.errors import LifecycleError
from gumbel_plugin.graph.optimizer_state import ParameterChanges, tracked
from gumbel_plugin.layers.weights import GATES

import torch_pruning as tp  # isort: skip  (after gumbel_plugin, which makes torchvision importable)

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], set[str]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}, {"momentum_buffer"}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}, {"exp_avg", "exp_avg_sq"}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True}, {"square_avg", "grad_avg"}),
}


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if GATES not in name}


def train(pruner: GumbelGroupPruner, optimizer: torch.optim.Optimizer, inputs: Tensor, steps: int) -> None:
    """Train a few steps; the last gradients stay."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(pruner.model(inputs).flatten(1)[:, :4], torch.arange(len(inputs)) % 4)
        loss.backward()
        pruner.regularize(pruner.model, loss)
        optimizer.step()


def cut(value: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    value = value if rows is None else value[rows]
    return value if columns is None else value[:, columns]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_and_gradients_are_those_of_the_kept_indices(make_network, name):
    kind, settings, keys = OPTIMIZERS[name]
    network = make_network("residual")
    pruner = GumbelGroupPruner(network.model, network.inputs, pruning_ratio=0.5)
    optimizer = kind([{"params": weights_of(network.model).values()}, {"params": pruner.gate_parameters()}], **settings)
    train(pruner, optimizer, network.batch(8), 3)
    before = {
        name: (p, p.grad.clone(), copy.deepcopy(optimizer.state[p])) for name, p in weights_of(network.model).items()
    }
    gates = pruner.gate_parameters()
    pruner.step()
    pruner.update_optimizer(optimizer)

    kept = {name: own["weight"].flatten(1).any(1) if own["weight"].dim() > 1 else own["weight"] != 0
            for name, own in pruner.masks().items()}  # fmt: skip
    reads = {"conv1": None, "conv2": kept["conv1"], "conv3": kept["conv2"], "head": kept["conv1"]}
    assert int(kept["conv2"].sum()) == 4
    for parameter_name, new in network.model.named_parameters():
        layer, _, tensor = parameter_name.partition(".")
        rows = kept.get(layer)
        columns = reads[layer] if tensor == "weight" and layer in reads else None
        old, gradient, state = before[parameter_name]
        assert torch.equal(new.grad, cut(gradient, rows, columns))
        assert torch.equal(old.grad, gradient)
        for key in keys:
            assert torch.equal(optimizer.state[new][key], cut(state[key], rows, columns))
        if "step" in state:
            assert torch.equal(optimizer.state[new]["step"], state["step"])
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in network.model.parameters()]
    assert optimizer.param_groups[1]["params"] == []
    assert not any(gate in optimizer.state for gate in gates)
    assert len(optimizer.state) == len(list(network.model.parameters()))


def test_an_optimizer_with_sums_over_rows_and_columns_goes_on(make_network):
    network = make_network("conv_bn_relu")
    pruner = GumbelGroupPruner(network.model, network.inputs, pruning_ratio=0.5)
    optimizer = torch.optim.Adafactor(weights_of(network.model).values(), lr=0.01)
    train(pruner, optimizer, network.batch(8), 2)
    second = network.model[3].weight
    state = {key: value.clone() for key, value in optimizer.state[second].items()}
    pruner.step()
    pruner.update_optimizer(optimizer)
    rows, columns = pruner.masks()["3"]["bias"] != 0, pruner.masks()["1"]["bias"] != 0
    new = optimizer.state[network.model[3].weight]
    assert torch.equal(new["row_var"], state["row_var"][rows][:, columns])  # the sums run over the kernel's sides
    assert torch.equal(new["col_var"], state["col_var"][rows][:, columns])
    train(pruner, optimizer, network.batch(8), 2)


def test_training_goes_on_as_it_would_in_the_masked_network(make_network):
    """Steps of the small network are those of the masked one, where rows and columns of closed units stay zero."""
    network = make_network("no_bn")
    pruner = GumbelGroupPruner(network.model, network.inputs, pruning_ratio=0.5)
    optimizer = torch.optim.SGD(weights_of(network.model).values(), lr=0.01, momentum=0.9)
    inputs = network.batch(8)
    train(pruner, optimizer, inputs, 3)
    groups = pruner.step(interactive=True)
    first = next(groups)
    masked, masked_optimizer = copy.deepcopy((network.model, optimizer))
    first.prune()
    for group in groups:
        group.prune()
    pruner.update_optimizer(optimizer)
    masks = pruner.masks()

    def close(name: str, tensor: Tensor) -> None:
        layer, _, target = name.partition(".")
        before = str(int(layer) - 2)  # the linear layer whose units this one reads
        tensor.mul_(masks[layer][target] if layer in masks else 1.0)
        tensor.mul_(masks[before]["bias"] if target == "weight" and before in masks else 1.0)

    for model, own in ((network.model, optimizer), (masked, masked_optimizer)):
        for _ in range(3):
            own.zero_grad()
            F.cross_entropy(model(inputs), torch.arange(8) % 4).backward()
            for name, parameter in model.named_parameters() if model is masked else ():
                close(name, parameter.grad)
                close(name, own.state[parameter]["momentum_buffer"])
            own.step()
    torch.testing.assert_close(network.model(inputs), masked(inputs))


def test_what_was_not_changed_keeps_its_place_and_its_state(make_network):
    network = make_network("residual")
    other = nn.Linear(3, 3)
    pruner = GumbelGroupPruner(network.model, network.inputs, ignored_layers=[network.model.conv2])
    optimizer = torch.optim.SGD([*other.parameters(), *weights_of(network.model).values()], lr=0.1, momentum=0.9)
    other(torch.ones(1, 3)).sum().backward()
    train(pruner, optimizer, network.batch(8), 2)
    head, momentum = network.model.head.bias, optimizer.state[other.weight]
    pruner.step()
    pruner.update_optimizer(optimizer)
    assert optimizer.param_groups[0]["params"][0] is other.weight
    assert any(parameter is head for parameter in optimizer.param_groups[0]["params"])
    assert optimizer.state[other.weight] is momentum


def test_in_iterative_steps_the_gates_go_on_too(make_network):
    network = make_network("residual")
    pruner = GumbelGroupPruner(network.model, network.inputs, pruning_ratio=0.6, iterative_steps=2)
    optimizer = torch.optim.Adam(weights_of(network.model).values(), lr=0.01)
    gates = torch.optim.Adam(pruner.gate_parameters(), lr=0.05)
    for _ in range(2):
        train(pruner, optimizer, network.batch(8), 2)
        gates.step()
    pruner.update_regularizer()  # the gates are on budget
    name = "conv2"
    (bank,), own = pruner.gate_parameters(), pruner.session.plan.masks[name]
    before, moment = own.logit.detach().clone(), gates.state[bank]["exp_avg"][own.start : own.stop].clone()
    pruner.step()
    for each in (optimizer, gates):
        pruner.update_optimizer(each)
    kept = pruner.masks()[name]["weight"].flatten(1).any(1)
    (bank,), new = pruner.gate_parameters(), pruner.session.plan.masks[name]
    assert 0 < int(kept.sum()) < len(before)
    assert torch.equal(new.logit.detach(), before[kept])
    assert torch.equal(gates.state[bank]["exp_avg"][new.start : new.stop], moment[kept])
    assert [id(p) for p in gates.param_groups[0]["params"]] == [id(p) for p in pruner.gate_parameters()]
    pruner.step()
    pruner.update_optimizer(gates)
    assert gates.param_groups[0]["params"] == []
    assert not gates.state


def test_a_foreign_optimizer_is_refused_and_left_alone(make_network):
    network, other = make_network("residual"), nn.Linear(2, 2)
    pruner = GumbelGroupPruner(network.model, network.inputs)
    optimizer, foreign = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (network.model, other))
    pruner.update_optimizer(foreign)  # before the step there is nothing to carry over
    pruner.step()
    with pytest.raises(LifecycleError, match="no parameter that the last step changed"):
        pruner.update_optimizer(foreign)
    assert foreign.param_groups[0]["params"] == list(other.parameters())
    pruner.update_optimizer(optimizer)
    pruner.update_optimizer(optimizer)  # twice does no harm
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in network.model.parameters()]


def test_an_optimizer_that_missed_a_step_is_refused(make_network):
    network = make_network("conv_bn_relu")
    pruner = GumbelGroupPruner(network.model, network.inputs, iterative_steps=2, pruning_ratio=0.6)
    optimizer = torch.optim.SGD([network.model[0].weight], lr=0.1)
    pruner.step()
    pruner.step()
    with pytest.raises(LifecycleError, match="was not called after an earlier step"):
        pruner.update_optimizer(optimizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_positions_survive_in_every_dtype(dtype):
    """2 bytes hold 65,536 positions: the linear layer has exactly as many weights."""
    model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2)).to(dtype)
    graph = tp.DependencyGraph().build_dependency(model.float(), torch.randn(1, 8))
    model.to(dtype)
    old = dict(model.named_parameters())
    old["2.weight"].grad = torch.randn(256, 256).to(dtype)
    gradient = old["2.weight"].grad.clone()
    old["0.weight"].requires_grad_(False)
    model.train()[1].eval()
    with tracked(model) as changes:
        graph.get_pruning_group(model[0], tp.prune_linear_out_channels, [0, 3, 200]).prune()
        graph.get_pruning_group(model[2], tp.prune_linear_out_channels, [7, 255]).prune()
    rows = torch.tensor([row for row in range(256) if row not in (7, 255)])
    columns = torch.tensor([column for column in range(256) if column not in (0, 3, 200)])
    found = {name: change for change in changes.changes for name, parameter in old.items() if change.old is parameter}
    assert set(found) == {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight"}
    assert all(map(torch.equal, found["2.weight"].kept, (rows, columns)))
    assert torch.equal(model[2].weight.grad, gradient[rows][:, columns])
    assert torch.equal(old["2.weight"].grad, gradient)
    assert model[0].weight.grad is None
    assert not model[0].weight.requires_grad
    assert [module.training for module in model] == [True, False, True, True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_large_parameters_keep_their_state(dtype):
    """More weights than 16 bits can number."""
    model = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 257), nn.ReLU(), nn.Conv1d(257, 300, 3))
    graph = tp.DependencyGraph().build_dependency(model[:3], torch.randn(1, 8))
    model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape).to(dtype)
    optimizer.step()
    before = {name: optimizer.state[parameter]["momentum_buffer"] for name, parameter in model.named_parameters()}
    rows = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:150].sort().values
    removed = sorted(set(range(300)) - set(rows.tolist()))
    with tracked(model) as changes:
        graph.get_pruning_group(model[0], tp.prune_linear_out_channels, removed).prune()
        tp.prune_conv_in_channels(model[4], [0, 5])
        tp.prune_conv_out_channels(model[4], removed)
    changes.apply_to(optimizer)
    expected = {"0.weight": before["0.weight"][rows], "2.weight": before["2.weight"][:, rows],
                "4.weight": before["4.weight"][rows][:, [c for c in range(257) if c not in (0, 5)]]}  # fmt: skip
    for name, value in expected.items():
        parameter = model.get_parameter(name)
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], value)
        assert parameter.grad.shape == parameter.shape
    assert torch.equal(changes.kept()["2.weight"][1], rows)


def test_state_starts_anew_where_nothing_tells_what_was_cut(caplog):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with tracked(model) as changes:
        model[1].weight = nn.Parameter(torch.zeros(4, 5))
    changes.apply_to(optimizer)
    assert model[1].weight not in optimizer.state
    assert model[0].weight in optimizer.state
    assert "starts anew" in caplog.text


def test_nothing_is_carried_where_nothing_changed():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    ParameterChanges().apply_to(optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 2
