"""A loop from which the gates learn nothing, or too little, is told so once, with the remedy."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gumbel_plugin import MaskingSession, PruningConfig
from gumbel_plugin.errors import ConfigError, LifecycleError, TargetError

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def planned(ratio: float | None = 0.5, **pruning: Any) -> MaskingSession:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    rule = {"op_types": ["Linear"], "granularity": "element"} | ({} if ratio is None else {"sparse_ratio": ratio})
    return MaskingSession(model, PruningConfig.load({"pruning": {"config_list": [rule], **pruning}}).pruning)


def train(session: MaskingSession, steps: int, *, loss: bool = True, step: bool = True, optimize: bool = True) -> None:
    optimizers = [torch.optim.SGD(session.weight_parameters(), 0.01), *(session.optimizers() if optimize else [])]
    for _ in range(steps):
        total = session.model(X).square().mean() + (session.loss() if loss else 0.0)
        total.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step:
            session.step()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_training_that_reaches_its_budget_warns_of_nothing(
    train_gates: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session = planned()
    session.start(20)
    weights = torch.optim.SGD(session.weight_parameters(), 0.01)
    train_gates(session, lambda: session.model(X).square().mean(), 20, weights)
    session.extract()
    assert warnings(caplog) == []


def test_gates_far_from_their_budget(caplog: pytest.LogCaptureFixture) -> None:
    session = planned()
    session.start(40)
    train(session, 4)  # while the budget is still falling
    session.extract()
    (said,) = warnings(caplog)
    assert said.startswith("masks decided at step 4 of 40 far from the budget: the gates of '0' had kept")
    assert "the budget is 50 %" in said
    assert "train to the end, say the real total_steps, or lower pruning.budget.ramp" in said
    assert "2 of 2 budgets" in said


@pytest.mark.parametrize("method", ["magnitude", "edge_popup"])
def test_methods_that_meet_their_ratio_by_construction_are_not_far(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    session = planned(method=method)
    session.start(2)
    session.extract()
    assert warnings(caplog) == []


def test_without_a_ratio_there_is_no_budget_to_be_far_from(caplog: pytest.LogCaptureFixture) -> None:
    session = planned(ratio=None)
    session.start(2)
    train(session, 2, loss=False)
    session.extract()
    assert warnings(caplog) == []


def test_a_forgotten_loss_is_told_at_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    session = planned(method="reparametrization")
    session.start(4)
    train(session, 3, loss=False)
    (said,) = warnings(caplog)
    assert "a training step was made without session.loss()" in said


def test_a_loss_is_not_missed_while_the_gates_are_open(caplog: pytest.LogCaptureFixture) -> None:
    session = planned(phases={"dense": 0.5})
    session.start(50)
    train(session, 3, loss=False)
    assert warnings(caplog) == []


def test_a_forgotten_step(caplog: pytest.LogCaptureFixture) -> None:
    session = planned()
    session.start(4)
    train(session, 4, step=False)
    session.extract()
    assert any("after 4 training forwards, but session.step() was never called" in said for said in warnings(caplog))


def test_gates_in_no_optimizer(caplog: pytest.LogCaptureFixture) -> None:
    session = planned()
    session.start(4)
    train(session, 4, optimize=False)
    session.extract()
    assert any("the gates did not move" in said and "parameter_groups" in said for said in warnings(caplog))


@pytest.mark.parametrize("keys", [{"fused": True}, {"foreach": True}, {}])
def test_gates_that_any_kind_of_optimizer_moves_are_seen_to_move(
    keys: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    session = planned()
    session.start(2)
    optimizer = torch.optim.Adam(session.gate_parameters(), **keys)
    for _ in range(2):
        (session.model(X).square().mean() + session.loss()).backward()
        optimizer.step()
        session.step()
    session.extract()
    assert not any("did not move" in said for said in warnings(caplog))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients(context: Any, caplog: pytest.LogCaptureFixture) -> None:
    session = planned()
    session.start(4)
    for _ in range(4):
        with context():
            session.model(X)
            session.loss()
        session.step()
    session.extract()
    assert any("all training forwards ran without gradients" in said for said in warnings(caplog))


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "10", float("nan"), [3], torch.ones(2)])
@pytest.mark.parametrize("verb", ["start", "expect"])
def test_a_training_has_a_whole_number_of_steps(verb: str, steps: object) -> None:
    session = planned()
    if verb == "expect":
        session.start()
    with pytest.raises(ConfigError, match=r"^total_steps = .*a whole number of at least 1, or None"):
        getattr(session, verb)(steps)


@pytest.mark.parametrize("steps", [1, np.int64(7), torch.tensor(3)])
def test_any_kind_of_whole_number_will_do(steps: Any) -> None:
    session = planned()
    session.start(steps)
    assert session.total_steps == int(steps)
    assert type(session.total_steps) is int


@pytest.mark.parametrize("verb", ["step", "decide", "extract", "attach", "loss"])
def test_start_comes_first(verb: str) -> None:
    with pytest.raises(LifecycleError, match=rf"^{verb}\(\) of a session that was not started; start\(total_steps\)"):
        getattr(planned(), verb)()


@pytest.mark.parametrize("weights", ["frozen", "trained"])
def test_attached_twice_is_refused_and_detached_leaves_nothing(weights: str) -> None:
    session = planned(weights=weights)
    session.start(3)
    with pytest.raises(LifecycleError, match=r"attached to its model already; detach\(\) comes before attach\(\)"):
        session.attach()
    session.detach()
    session.attach()
    session.detach()
    session.detach()
    assert all(parameter.requires_grad for parameter in session.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in session.model.modules())


def test_a_session_leaves_another_ones_gates_alone() -> None:
    first = planned()
    second = MaskingSession(first.model, first.config)
    first.start(3)
    first.detach()
    second.start(3)
    with pytest.raises(LifecycleError, match="another masking session holds layers of this one; detach that one first"):
        first.attach()
    first.detach()
    assert second.gate_parameters()[0] in set(first.model.parameters())
    second.detach()
    first.attach()


def test_a_length_that_comes_too_late() -> None:
    session = planned()
    session.start()
    session.step()
    with pytest.raises(LifecycleError, match=r"expect\(\) comes before the first step; the session is at step 1"):
        session.expect(10)
    fixed = planned()
    fixed.start()
    fixed.extract()
    with pytest.raises(LifecycleError, match="its masks are fixed"):
        fixed.expect(10)
    assert fixed.status().phase == "fixed"


def test_gates_are_not_made_in_inference_mode() -> None:
    model, config = nn.Sequential(nn.Linear(3, 3)), planned().config
    with torch.inference_mode(), pytest.raises(LifecycleError, match=r"outside of torch\.inference_mode\(\)"):
        MaskingSession(model, config)


def test_masks_may_be_decided_in_inference_mode() -> None:
    session = planned()
    session.start(3)
    with torch.inference_mode():
        session.extract()
    assert session.status().phase == "fixed"
    assert all(float((layer.weight == 0).float().mean()) == 0.5 for layer in (session.model[0], session.model[2]))
    session.model(X).sum().backward()


@pytest.mark.parametrize("name", ["0", "2"])
def test_a_layer_without_weights(name: str) -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(6, 0), nn.ReLU(), nn.Linear(0, 3))
    rules = PruningConfig.load([{"op_names": [name], "granularity": "element", "sparse_ratio": 0.5}]).pruning
    with pytest.raises(TargetError, match=rf"^'{name}' has a weight of shape \(.*, with nothing to mask: exclude it"):
        MaskingSession(model, rules)
