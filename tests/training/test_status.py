from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin import MaskingSession
from gumbel_plugin.training.loop import MaskingLoop

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)
STEPS = 40


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3))


def session_of(network: nn.Module, ratio: float = 0.75, budget: dict[str, Any] | None = None) -> MaskingSession:
    rule: dict[str, Any] = {"op_names": ["0", "2"], "granularity": "out_channel"}
    pruning: dict[str, Any] = {
        "config_list": [rule if budget else {**rule, "sparse_ratio": ratio}],
        "phases": {"dense": 0.1, "fixed": 0.25},
        "gate_optimizer": {"name": "adam", "lr": 0.3},
        **({"budget": budget} if budget else {}),
    }
    return MaskingSession(network, {"pruning": pruning, "seed": 1}, example_inputs=X[:2])


def train(session: MaskingSession, steps: int = STEPS) -> list[Any]:
    """Train, and return the status after every step."""
    loop = MaskingLoop(session)
    loop.start(STEPS)
    optimizer = torch.optim.SGD(session.weight_parameters(), 0.05)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loop.guard(nn.functional.cross_entropy(session.model(X), Y)).backward()
        loop.before_step()
        optimizer.step()
        loop.after_step()
        found.append(session.status())
    return found


def kept_macs(network: nn.Module, gates: dict[str, Tensor]) -> float:
    """Return the MACs of the two gated layers and the head with these gates, in parts of the dense ones."""
    first, second = (float(gates[name].sum()) for name in ("0", "2"))
    return (8 * first + first * second + second * 3) / (8 * 24 + 24 * 16 + 16 * 3)


def test_target_hard_and_expected_cost_of_a_mac_budget() -> None:
    network = model()
    session = session_of(network, budget={"metric": "macs", "ratio": 0.5})
    found = train(session, steps=12)
    (budget,) = found[-1].budgets
    masks = session.plan.masks
    hard = {name: mask.decide(None).float() for name, mask in masks.items()}
    expected = {name: mask.probability(None).detach() for name, mask in masks.items()}
    assert budget.hard == pytest.approx(kept_macs(network, hard))
    assert budget.expected == pytest.approx(kept_macs(network, expected))
    probabilities = torch.cat([own.flatten() for own in expected.values()])
    assert found[-1].undecided == pytest.approx(float(((probabilities > 0.05) & (probabilities < 0.95)).float().mean()))
    assert budget.end == 0.5
    assert budget.end < budget.target < 1
    assert budget.cut == pytest.approx(max(0.0, budget.hard - 0.5))


def test_it_goes_from_whole_over_the_target_to_the_end() -> None:
    found = train(session_of(model(), budget={"metric": "macs", "ratio": 0.5}))
    opened, learning, fixed = ([each for each in found if each.phase == name] for name in ("open", "learning", "fixed"))
    assert opened
    assert all(each.furthest.hard == each.furthest.target == 1 and each.undecided == 0 for each in opened)
    targets = [each.furthest.target for each in learning]
    assert targets == sorted(targets, reverse=True)
    assert max(each.undecided for each in learning) > 0.2
    assert learning[-1].undecided == 0
    assert all(each.furthest.hard <= each.furthest.target + 1e-6 for each in learning)
    assert all(each.furthest.cut == 0 and each.furthest.target == 0.5 for each in fixed)


def test_of_several_budgets_the_furthest_is_told() -> None:
    session = session_of(model())
    status = train(session, steps=20)[-1]
    assert [budget.name for budget in status.budgets] == ["2", "0"]
    distances = [abs(budget.hard - budget.target) for budget in status.budgets]
    assert abs(status.furthest.hard - status.furthest.target) == max(distances)
    assert "the furthest of 2 budgets" in str(status)
    assert status.numbers()["target_density"] == status.furthest.target


def test_one_line_says_it_all() -> None:
    status = train(session_of(model(), budget={"metric": "macs", "ratio": 0.5}), steps=20)[-1]
    own = status.budgets[0]
    line = str(status)
    assert line.startswith("step 20, gates learning: ")
    for part in (
        f"{own.hard:.1%} of the dense cost stay", f"{own.expected:.1%} expected", f"target {own.target:.1%}",
        f"{status.undecided:.1%} of the gates undecided", f"a cut to 50.0% now would take {own.cut:.1%}",
    ):  # fmt: skip
        assert part in line
    assert "\n" not in line


def test_gates_without_a_budget() -> None:
    rules = [{"op_types": ["Linear"], "granularity": "element"}]
    session = MaskingSession(model(), {"pruning": {"config_list": rules}})
    session.start(10)
    status = session.status()
    assert status.budgets == ()
    assert status.furthest is None
    assert set(status.numbers()) == {"sparsity", "soft_sparsity", "undecided_gates"}
    assert str(status).startswith("step 0, gates learning: 0.0% of the gated weights closed")


@pytest.mark.parametrize(("steps", "warned"), [(25, True), (40, False)])  # 0.65 of them learn masks
def test_too_few_steps_are_said_before_the_training(steps: int, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        session_of(model()).start(steps)
    assert ("lower pruning.phases.dense or pruning.phases.fixed" in caplog.text) == warned
    later = session_of(model())
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        later.start(None)
        assert not caplog.text
        later.expect(steps)
    assert ("will be learned in 17 steps" in caplog.text) == warned
