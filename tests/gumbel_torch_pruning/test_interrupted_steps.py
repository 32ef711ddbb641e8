"""A step is made whole or not at all, and what the record says is what really left."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin import GumbelGroupPruner, verify_equivalence
from gumbel_plugin.errors import LifecycleError, TargetError
from gumbel_plugin.graph.record import kept_of
from gumbel_plugin.layers.weights import plain_copy
from tests.graph.exact_steps import set_gates


class Interrupted(Exception):
    """What the caller of a step raises."""


def everything(pruner: GumbelGroupPruner) -> dict[str, Any]:
    """Return all of a pruner and its model that a step may change; identities as ids."""
    model = pruner.model
    return {
        "objects": [(name, id(each)) for name, each in [*model.named_modules(), *model.named_parameters()]],
        "sizes": [sorted((k, v) for k, v in vars(m).items() if isinstance(v, int)) for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "gradients": [(id(p.grad), p.requires_grad) for p in model.parameters()],
        "gates": [id(parameter) for parameter in pruner.gate_parameters()],
        "history": copy.deepcopy(list(pruner.pruning_history())),
        "step": pruner.current_step,
        "heads": dict(pruner.num_heads),
        "safety": [(group.name, group.size, group.safety) for group in pruner.groups()],
        "kept": list(kept_of(model)),
        "numbers": {name: value.clone() for name, value in model.state_dict().items()},
        "masks": {f"{name}.{key}": mask for name, own in pruner.masks().items() for key, mask in own.items()},
        "session": id(pruner.session),
    }


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    for key in ("numbers", "masks"):
        assert now[key].keys() == before[key].keys()
        assert all(torch.equal(value, before[key][name]) for name, value in now[key].items()), key
    rest = [key for key in before if key not in ("numbers", "masks")]
    assert {key: now[key] for key in rest} == {key: before[key] for key in rest}


def break_off(pruner: GumbelGroupPruner) -> None:
    for group in pruner.step(interactive=True):
        group.prune()
        break


def break_off_before_pruning(pruner: GumbelGroupPruner) -> None:
    for _ in pruner.step(interactive=True):
        break


def close(pruner: GumbelGroupPruner) -> None:
    groups = pruner.step(interactive=True)
    next(groups).prune()
    next(groups).prune()
    groups.close()


def never_begin(pruner: GumbelGroupPruner) -> None:
    pruner.step(interactive=True)


def raise_in_the_loop(pruner: GumbelGroupPruner) -> None:
    for group in pruner.step(interactive=True):
        group.prune()
        raise Interrupted


def throw_in(pruner: GumbelGroupPruner) -> None:
    groups = pruner.step(interactive=True)
    next(groups).prune()
    groups.throw(Interrupted)


def fail_while_pruning(pruner: GumbelGroupPruner) -> None:
    _fail_at(pruner, lambda number: number == 2)
    pruner.step()


def fail_after_pruning(pruner: GumbelGroupPruner) -> None:
    pruner._attach = _raise  # of the gates of the next step
    try:
        pruner.step()
    finally:
        pruner.__dict__.pop("_attach", None)


def _raise() -> None:
    raise Interrupted


def _fail_at(pruner: GumbelGroupPruner, chosen: Callable[[int], bool]) -> None:
    """Let Torch-Pruning's function for one of the layers fail, once."""
    pruners = pruner.DG.REGISTERED_PRUNERS.values()
    calls = []
    for each in {id(type(each)): each for each in pruners if hasattr(each, "_prune_parameter_and_grad")}.values():
        original = type(each)._prune_parameter_and_grad

        def cut(*args: Any, original: Any = original, own: Any = each) -> Any:
            calls.append(1)
            if chosen(len(calls)):
                raise Interrupted
            return original(own, *args)

        each._prune_parameter_and_grad = cut


WAYS = [
    break_off,
    break_off_before_pruning,
    close,
    never_begin,
    raise_in_the_loop,
    throw_in,
    fail_while_pruning,
    fail_after_pruning,
]


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_not_finished_changes_nothing(make_network: Any, way: Callable[[Any], None]) -> None:
    network, twin = make_network("residual"), make_network("residual")
    pruners = [
        GumbelGroupPruner(each.model, each.inputs, pruning_ratio=0.6, iterative_steps=2) for each in (network, twin)
    ]
    for pruner in pruners:
        set_gates(pruner, 0)
        pruner.model(network.batch(3)).sum().backward()
    pruner, untouched = pruners
    optimizer = torch.optim.SGD(network.model.parameters(), lr=0.1, momentum=0.9)
    before = everything(pruner)
    with contextlib.suppress(Interrupted):
        way(pruner)
    assert_same(everything(pruner), before)
    pruner.update_optimizer(optimizer)  # nothing was replaced
    if way is fail_while_pruning:
        return  # its failure is still in place
    for each in pruners:
        each.step()
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(network.model.parameters(), twin.model.parameters(), strict=True))
    assert pruner.pruning_history() == untouched.pruning_history()


def test_a_step_left_open_is_taken_back_by_the_next_verb(make_network: Any) -> None:
    network = make_network("residual")
    pruner = GumbelGroupPruner(network.model, network.inputs, pruning_ratio=0.5)
    set_gates(pruner, 0)
    before = everything(pruner)
    held = pruner.step(interactive=True)
    next(held).prune()
    with pytest.raises(LifecycleError, match="in the middle of a step"):
        copy.deepcopy(pruner)
    pruner.reset()
    assert pruner.current_step == 0
    assert {n: p.shape for n, p in network.model.named_parameters()} == {
        n: before["numbers"][n].shape for n, _ in network.model.named_parameters()
    }
    assert next(held, None) is None
    set_gates(pruner, 0)
    pruner.step()
    assert network.model.conv2.out_channels == 4


def test_heads_that_were_removed_come_back() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(24, 4, 16, batch_first=True)
    pruner = GumbelGroupPruner(
        model, torch.randn(2, 5, 24), pruning_ratio=0.5, prune_num_heads=True, head_pruning_ratio=0.5
    )
    before, attention = everything(pruner), model.self_attn
    groups = pruner.step(interactive=True)
    for group in groups:
        group.prune()
        if model.self_attn is not attention:  # the compact layer is there
            groups.close()
    assert model.self_attn is attention
    assert_same(everything(pruner), before)


# What is skipped ------------------------------------------------------------------------------------------------------


def masks_fit(pruner: GumbelGroupPruner, dense: nn.Module) -> None:
    """Check the masks against the layers that are left."""
    for name, own in pruner.masks().items():
        rows = own["bias"] != 0 if "bias" in own else own["weight"].flatten(1).any(1)
        layer: Any = pruner.model.get_submodule(name)
        assert own["weight"].shape == dense.get_submodule(name).weight.shape
        assert int(rows.sum()) == len(layer.weight)
        kept = kept_of(pruner.model).get(f"{name}.weight", (None,))[0]
        assert torch.equal(torch.nonzero(rows).flatten(), torch.arange(len(rows)) if kept is None else kept)


@pytest.mark.parametrize("skipped", [0, 1])
def test_skipped_groups_stay_in_every_account(make_network: Any, skipped: int) -> None:
    network, fresh, resumed = (make_network("residual") for _ in range(3))
    dense = copy.deepcopy(network.model)
    pruner = GumbelGroupPruner(network.model, network.inputs, pruning_ratio=0.6, iterative_steps=2)
    set_gates(pruner, 0)
    weights = [parameter for parameter in network.model.parameters() if parameter.dim() != 0]
    optimizer = torch.optim.Adam(weights, lr=0.01)
    network.model(network.batch(4)).square().sum().backward()
    optimizer.step()
    masked = pruner.model
    for number, group in enumerate(pruner.step(interactive=True)):
        masked = plain_copy(pruner.model) if number == 0 else masked
        if number != skipped:
            group.prune(record_history=False)
    pruner.update_optimizer(optimizer)
    verify_equivalence(masked, plain_copy(network.model), network.inputs).raise_for_failure()
    masks_fit(pruner, dense)
    assert len(pruner.pruning_history()) == 1
    gates = {id(parameter) for parameter in pruner.gate_parameters()}
    held = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert gates <= held  # those of the group that was skipped go on, too
    assert all(
        optimizer.state[p]["exp_avg"].shape == p.shape
        for p in optimizer.param_groups[0]["params"]
        if p.grad is not None
    )

    again = GumbelGroupPruner(resumed.model, resumed.inputs, pruning_ratio=0.6, iterative_steps=2)
    again.load_state_dict(pruner.state_dict())
    again.model.load_state_dict(network.model.state_dict())
    pruner.step()
    again.step()
    masks_fit(pruner, dense)
    masks_fit(again, dense)
    assert all(torch.equal(a, b) for a, b in zip(network.model.parameters(), resumed.model.parameters(), strict=True))
    replayed = GumbelGroupPruner(fresh.model, fresh.inputs)
    replayed.load_pruning_history(pruner.pruning_history())
    masks_fit(replayed, dense)


def test_a_part_of_a_group_may_be_pruned() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    dense = copy.deepcopy(model)
    pruner = GumbelGroupPruner(model, torch.randn(2, 3), pruning_ratio=0.5)
    set_gates(pruner, 0)
    groups = pruner.step(interactive=True)
    first = next(groups)
    masked, idxs = plain_copy(model), list(first[0].idxs)
    first.prune(idxs[1:3])
    for group in groups:
        group.prune()
    assert torch.equal(torch.nonzero(pruner.masks()["2"]["bias"] == 0).flatten(), torch.tensor(idxs[1:3]))
    assert ["2", True, idxs[1:3]] in pruner.pruning_history()
    assert (model[0].out_features, model[2].out_features) == (4, 4)
    verify_equivalence(masked, model, torch.randn(2, 3)).raise_for_failure()
    masks_fit(pruner, dense)


# Histories ------------------------------------------------------------------------------------------------------------


def test_a_history_of_another_network_leaves_the_pruner_as_it_was(make_network: Any) -> None:
    network = make_network("residual")
    pruner = GumbelGroupPruner(network.model, network.inputs)
    set_gates(pruner, 0)
    before = everything(pruner)
    with pytest.raises(TargetError, match="not in the graph"):
        pruner.load_pruning_history([("conv2", True, [1, 3]), ("nothing", True, [0])])
    assert_same(everything(pruner), before)


def test_a_loaded_history_is_in_the_masks(make_network: Any) -> None:
    network = make_network("residual")
    dense = copy.deepcopy(network.model)
    pruner = GumbelGroupPruner(network.model, network.inputs)
    pruner.load_pruning_history([("conv2", True, [1, 3])])
    masks_fit(pruner, dense)
    assert torch.nonzero(pruner.masks()["conv2"]["weight"].flatten(1).sum(1) == 0).flatten().tolist() == [1, 3]


class Unusual(nn.Module):
    """Keeps a list and a plain tensor that the forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)
        self.log: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(float(x.sum()))
        return self.second(torch.relu(self.first(x)))


def test_what_a_failed_constructor_ran_is_taken_back() -> None:
    model = Unusual()
    before = [id(parameter) for parameter in model.parameters()]
    with pytest.raises(TargetError):
        GumbelGroupPruner(model, torch.randn(2, 3), ignored_layers=[model.first])
    assert model.log == []
    assert [id(parameter) for parameter in model.parameters()] == before
