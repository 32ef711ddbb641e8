"""What is no state of a session is refused with its key, and the session stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.errors import LifecycleError, TargetError
from gumbel_plugin.shrinking.pruned_file import save_pruned
from gumbel_plugin.training.loop import MaskingLoop
from gumbel_plugin.training.session import MaskingSession

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def trained(steps: int = 3, width: int = 8, **pruning: Any) -> MaskingLoop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
    rules = [{"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 0.5}]
    pruning = {"rescale": "learned", "gate_optimizer": {"name": "adam", "lr": 0.1}, **pruning}
    loop = MaskingLoop(MaskingSession(model, {"pruning": {"config_list": rules, **pruning}}))
    loop.start(10)
    for _ in range(steps):
        model(X).square().mean().backward()
        loop.before_step()
        loop.after_step()
    return loop


def leaves(value: Any) -> list[Any]:
    """Return all numbers of a state, tensors as lists."""
    if isinstance(value, Tensor):
        return [value.tolist()]
    if isinstance(value, dict):
        return [leaf for key in value for leaf in (key, *leaves(value[key]))]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]


def drop(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.pop(key)


def put(*path: Any) -> Callable[[dict[str, Any]], Any]:
    *way, last, value = path

    def change(state: dict[str, Any]) -> None:
        for key in way:
            state = state[key]
        state[last] = value

    return change


SESSION_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{
        f"no {key}": (drop(key), f"a session's state lacks '{key}'")
        for key in ("masks", "phases", "folded", "scales", "steps", "total_steps", "forward")
    },
    "masks are no mapping": (put("masks", [1, 2]), r"^masks is \[1, 2\]; it must be a mapping"),
    "another layer's mask": (put("masks", "7", {}), "of another plan: mask '7' is in only one of them"),
    "a mask is no mapping": (put("masks", "2", 3), r"masks\['2'\] is 3; it must be a mapping"),
    "a mask lacks its logits": (lambda state: state["masks"]["2"].pop("logit"), r"masks\['2'\] lacks 'logit'"),
    "another method's mask": (put("masks", "2", "score", X), r"masks\['2'\]\['score'\] is unknown here"),
    "logits of another shape": (
        put("masks", "2", "logit", X),
        r"masks\['2'\]\['logit'\] has shape \(8, 4\); .* \(3, 8\)",
    ),
    "logits that are none": (put("masks", "2", "logit", "x"), r"masks\['2'\]\['logit'\] is 'x'; it must be a tensor"),
    "logits of whole numbers": (put("masks", "2", "logit", torch.ones(3, 8).int()), "has dtype torch.int32; here"),
    "logits that are NaN": (put("masks", "2", "logit", torch.full((3, 8), torch.nan)), "no finite numbers"),
    "phases of another plan": (lambda state: state["phases"].pop("2"), "of another plan: mask '2'"),
    "an unknown phase": (put("phases", {"0": "done", "2": "done"}), "phases is .*'done'.*one of open, learning, fixed"),
    "two phases": (put("phases", "2", "fixed"), "all masks are in one phase"),
    "folded that is a word": (put("folded", "0"), "folded is '0'; it must list layers that are gated"),
    "folded of another layer": (put("folded", ["7"]), r"folded is \['7'\]"),
    "a scale too few": (lambda state: state["scales"].pop(), "the scales of 2 layers"),
    "a scale that is a number": (put("scales", 1, 1.0), r"scales\[1\] is 1.0; it must be a tensor"),
    "steps below 0": (put("steps", -1), "steps is -1; it must be a whole number of at least 0"),
    "steps that are a word": (put("steps", "3"), "steps is '3'"),
    "a total of 0": (put("total_steps", 0), "total_steps is 0; it must be a whole number of at least 1"),
    "half a forward": (put("forward", 0.5), "forward is 0.5"),
}


@pytest.mark.parametrize("fault", SESSION_FAULTS)
def test_a_damaged_state_of_a_session(fault: str) -> None:
    damage, message = SESSION_FAULTS[fault]
    state = copy.deepcopy(trained(5).session.state_dict())
    damage(state)
    loop = trained()
    refused(loop, loop.session.load_state_dict, state, message)


@pytest.mark.parametrize("state", [None, 3, "state.pt", [1]])
def test_what_is_no_state_at_all(state: Any) -> None:
    loop = trained()
    refused(loop, loop.session.load_state_dict, state, "^a session's state is .*must be a mapping")
    refused(loop, loop.load_state_dict, state, "^the state is .*must be a mapping")


LOOP_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no session": (drop("session"), "the state lacks 'session'"),
    "no optimizers": (drop("optimizers"), "the state lacks 'optimizers'"),
    "an optimizer too few": (lambda state: state["optimizers"].pop(), "has 1 optimizers, the session 2"),
    "an optimizer that is none": (put("optimizers", 1, 3), r"optimizers\[1\] is 3; it must be a mapping"),
    "an optimizer of other parameters": (
        lambda state: state["optimizers"].reverse() or state["optimizers"][0]["param_groups"][0]["params"].pop(),
        r"optimizers\[0\] has groups of \[1\] parameters; the optimizer's have \[2\]",
    ),
    "moments of another shape": (
        put("optimizers", 0, "state", 0, "exp_avg", torch.zeros(2, 2)),
        r"optimizers\[0\]\['state'\]\[0\]\['exp_avg'\] has shape \(2, 2\), its parameter \(8, 4\)",
    ),
}


@pytest.mark.parametrize("fault", LOOP_FAULTS)
def test_a_damaged_state_with_optimizers(fault: str) -> None:
    damage, message = LOOP_FAULTS[fault]
    state = copy.deepcopy(trained(5).state_dict())
    damage(state)
    loop = trained()
    refused(loop, loop.load_state_dict, state, message)


@pytest.mark.parametrize("keys", [{"width": 9}, {"method": "edge_popup"}, {"rescale": "none"}])
def test_a_state_of_another_session(keys: dict[str, Any]) -> None:
    loop, state = trained(), trained(5, **keys).session.state_dict()
    refused(loop, loop.session.load_state_dict, state, r"has shape|is unknown here|lacks|the scales of")


def refused(loop: MaskingLoop, load: Callable[[Any], None], state: Any, message: str) -> None:
    """Assert that a state is refused and changes nothing."""
    before = leaves(copy.deepcopy(loop.state_dict()))
    with pytest.raises(TargetError, match=message):
        load(state)
    assert leaves(loop.state_dict()) == before


@pytest.mark.parametrize("phases", [{}, {"dense": 0.9}, {"fixed": 0.7}])
def test_a_state_of_any_phase_is_taken_over(phases: dict[str, float]) -> None:
    state = trained(5, phases=phases).state_dict()
    loop = trained(1, phases=phases)
    loop.load_state_dict(copy.deepcopy(state))
    assert leaves(loop.state_dict()) == leaves(state)


def test_a_gated_model_is_not_saved_as_a_pruned_one(tmp_path: Any) -> None:
    loop = trained()
    with pytest.raises(LifecycleError, match=r"still gated.*extract\(\) and detach\(\)"):
        save_pruned(tmp_path / "small.safetensors", loop.session.model)
    assert not list(tmp_path.iterdir())
    loop.finish()
    save_pruned(tmp_path / "small.safetensors", loop.session.model)
