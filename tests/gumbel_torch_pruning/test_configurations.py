"""What a configuration says to a `GumbelGroupPruner`: the seed, what is gated, and who steps the gates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.config import PruningConfig, PruningSection
from gumbel_plugin.errors import ConfigError, TargetError
from tests.graph.exact_steps import set_gates

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
RULES = [{"op_names": ["0"], "sparse_ratio": 0.25}, {"op_names": ["2"], "sparse_ratio": 0.5}]
LEARNED = {"gate_optimizer": {"name": "adam", "lr": 0.3}}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))


def train(pruner: GumbelGroupPruner, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = pruner.model(X).square().mean()
        loss.backward()
        pruner.regularize(pruner.model, loss)
        optimizer.step()


def test_the_seed_decides_the_samples() -> None:
    def outputs(**keys: Any) -> torch.Tensor:
        section = {"options": {"initial_logit": 0.0}}
        pruner = GumbelGroupPruner(network(), X, pruning={"pruning": section, **keys.pop("config", {})}, **keys)
        found: torch.Tensor = pruner.model(X).detach()
        return found

    default, seeded = outputs(), outputs(seed=3)
    assert torch.equal(default, outputs(seed=0))
    assert torch.equal(seeded, outputs(config={"seed": 3}))
    assert torch.equal(seeded, outputs(config={"seed": 8}, seed=3))
    assert not torch.equal(default, seeded)


@pytest.mark.parametrize("form", ["list", "dict", "config", "section"])
def test_a_config_list_selects_what_goes(form: str) -> None:
    config: Any = {"pruning": {"config_list": RULES}}
    config = {"list": RULES, "dict": config, "config": PruningConfig.load(config)}.get(
        form, PruningSection(config_list=RULES)
    )
    pruner = GumbelGroupPruner(network(), X, pruning=config)
    pruner.step()
    assert [layer.out_features for layer in pruner.model if isinstance(layer, nn.Linear)] == [12, 6, 3]


def test_layers_that_no_entry_names_stay() -> None:
    pruner = GumbelGroupPruner(network(), X, pruning=RULES[1:])
    masked = set(pruner.masks())
    pruner.step()
    assert [layer.out_features for layer in pruner.model if isinstance(layer, nn.Linear)] == [16, 6, 3]
    assert set(pruner.masks()) == masked == {"2"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pruning_ratio": 0.5}, "pruning_ratio beside pruning.config_list"),
        ({"pruning_ratio_dict": {"0": 0.5}}, "pruning_ratio_dict beside"),
        ({"iterative_steps": 3}, "iterative_steps beside"),
        ({"global_pruning": True}, "global_pruning beside"),
        ({"target": "macs"}, "target beside"),
        ({"inexact": True}, "inexact beside"),
    ],
)
def test_what_is_said_twice_is_refused(keys: dict[str, Any], message: str) -> None:
    model = network()
    with pytest.raises(ConfigError, match=message):
        GumbelGroupPruner(model, X, pruning=RULES, **keys)
    assert not list(model.buffers())


@pytest.mark.parametrize(
    ("budget", "said", "same"),
    [
        ({"metric": "macs", "ratio": 0.4}, {}, {"target": "macs", "pruning_ratio": 0.4}),
        ({"metric": "parameters"}, {"pruning_ratio": 0.4}, {"target": "parameters", "pruning_ratio": 0.4}),
        ({"ratio": 0.4}, {"target": "macs"}, {"target": "macs", "pruning_ratio": 0.4}),
        ({"metric": "macs", "ratio": 0.4}, {"target": "macs", "pruning_ratio": 0.4}, {"target": "macs"}),
        ({"metric": "macs", "ratio": 0.4}, {"iterative_steps": 2}, {"target": "macs", "pruning_ratio": 0.4}),
        ({"metric": "channels", "ratio": 0.4}, {}, {"pruning_ratio": 0.4, "global_pruning": True}),
        ({"metric": "channels", "ratio": 0.4, "scope": "layer"}, {}, {"pruning_ratio": 0.4}),
        ({"metric": "channels", "ratio": 0.4}, {"global_pruning": False}, {"pruning_ratio": 0.4}),
    ],
)
def test_a_budget_without_a_config_list_says_what_the_arguments_say(
    budget: dict[str, Any], said: dict[str, Any], same: dict[str, Any]
) -> None:
    def widths(pruner: GumbelGroupPruner) -> list[int]:
        for number in range(pruner.iterative_steps):
            set_gates(pruner, number)
            pruner.step()
        return [layer.out_features for layer in pruner.model if isinstance(layer, nn.Linear)]

    ours = widths(GumbelGroupPruner(network(), X, pruning={"pruning": {"budget": budget}}, **said))
    assert ours == widths(GumbelGroupPruner(network(), X, **{"pruning_ratio": 0.4, **said, **same}))
    assert ours != widths(GumbelGroupPruner(network(), X, pruning_ratio=0.5))


@pytest.mark.parametrize(
    ("budget", "said", "message"),
    [
        (
            {"metric": "macs"},
            {"target": "channels"},
            r"target = 'channels' and pruning.budget.metric = 'macs' disagree",
        ),
        ({"metric": "macs", "ratio": 0.5}, {"pruning_ratio": 0.4}, r"pruning_ratio = 0.4 and .*budget.ratio = 0.5 dis"),
        ({"metric": "macs", "ratio": 0.5}, {"ch_sparsity": 0.4}, r"ch_sparsity = 0.4 and pruning.budget.ratio = 0.5"),
        (
            {"metric": "channels", "scope": "layer"},
            {"global_pruning": True},
            r"global_pruning = True and pruning.budget.scope = 'layer' disagree",
        ),
        ({"scope": "layer"}, {"target": "macs"}, r"scope 'layer': macs are budgeted for the whole network"),
        ({"ratio": 0.5}, {}, r"counts weights unless .*config_list is empty.*one of the metrics channels, macs"),
        ({"metric": "weights", "ratio": 0.5}, {}, r"counts weights unless"),
        ({"metric": "macs", "ratio": 0.99}, {}, r"pruning_ratio 0.99 of the macs cannot be met"),
    ],
)
def test_a_budget_that_the_arguments_contradict_or_that_cannot_be_is_refused(
    budget: dict[str, Any], said: dict[str, Any], message: str
) -> None:
    model = network()
    with pytest.raises(ConfigError, match=message):
        GumbelGroupPruner(model, X, pruning={"pruning": {"budget": budget}}, **said)
    assert not list(model.buffers())


def test_entries_that_this_pruner_cannot_do() -> None:
    with pytest.raises(ConfigError, match="granularity 'element' masks weights of one layer"):
        GumbelGroupPruner(network(), X, pruning=[{"op_names": ["0"], "granularity": "element"}])
    with pytest.raises(TargetError, match="'9' matches no module"):
        GumbelGroupPruner(network(), X, pruning=[{"op_names": ["9"], "sparse_ratio": 0.5}])


def test_a_gate_optimizer_steps_the_gates_and_leaves_no_gradient() -> None:
    pruner = GumbelGroupPruner(network(), X, pruning={"pruning": LEARNED})
    before = [gate.detach().clone() for gate in pruner.gate_parameters()]
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1, weight_decay=0.5)  # it holds the gates too
    optimizer.zero_grad()
    loss = pruner.model(X).square().mean()
    loss.backward()
    pruner.regularize(pruner.model, loss)
    after = [gate.detach().clone() for gate in pruner.gate_parameters()]
    assert all(gate.grad is None for gate in pruner.gate_parameters())
    assert all(float((a - b).abs().max()) == pytest.approx(0.3, rel=1e-3) for a, b in zip(before, after, strict=True))
    optimizer.step()
    assert all(torch.equal(gate, own) for gate, own in zip(pruner.gate_parameters(), after, strict=True))


def test_without_one_they_are_the_optimizers() -> None:
    pruner = GumbelGroupPruner(network(), X)
    before = [gate.detach().clone() for gate in pruner.gate_parameters()]
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1)
    optimizer.add_param_group({"params": []})
    train(pruner, optimizer, 2)
    assert not any(torch.equal(gate, own) for gate, own in zip(pruner.gate_parameters(), before, strict=True))


def test_a_step_is_complete_with_the_next_training_forward() -> None:
    """After the optimizer's step, which comes after `regularize`: masks that read weights are decided on new ones."""
    pruner = GumbelGroupPruner(network(), X, total_steps=4)
    optimizer = torch.optim.SGD(pruner.model.parameters(), 0.1)
    train(pruner, optimizer, 1)
    assert pruner.session.steps == 0
    pruner.model.eval()(X)
    assert pruner.session.steps == 0
    pruner.model.train()(X)
    assert pruner.session.steps == 1
    train(pruner, optimizer, 3)
    assert pruner.session.steps == 3
    pruner.masks()
    assert pruner.session.steps == 4
    train(pruner, optimizer, 1)
    assert pruner.state_dict()["session"]["steps"] == 5
    pruner.step()
    assert not pruner.model._forward_pre_hooks


def test_its_own_optimizer_goes_on_from_a_state() -> None:
    whole = GumbelGroupPruner(network(), X, pruning={"pruning": LEARNED}, total_steps=8)
    optimizer = torch.optim.SGD(whole.model.parameters(), 0.1)
    train(whole, optimizer)
    state, weights = copy.deepcopy((whole.state_dict(), whole.model.state_dict()))
    resumed = GumbelGroupPruner(network(), X, pruning={"pruning": LEARNED}, total_steps=8)
    resumed.load_state_dict(state)
    resumed.model.load_state_dict(weights)
    train(whole, optimizer)
    train(resumed, torch.optim.SGD(resumed.model.parameters(), 0.1))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
