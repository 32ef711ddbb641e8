"""The session's verbs in order: phases, lifecycle, the guard, masks from outside, what it hands out."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.config import OptimizerConfig, PruningConfig
from gumbel_plugin.errors import ConfigError, LifecycleError, NonFiniteLossError, TargetError
from gumbel_plugin.layers.weights import GATES
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.sparsity.controller import USUAL_LENGTH
from gumbel_plugin.training.optimizers import make_optimizer
from gumbel_plugin.training.session import MaskingSession
from gumbel_plugin.training.snapshot import Snapshot

METHOD_A = OptimizerConfig(name="sgd", lr=50.0, momentum=0.9)  # Dupont et al. 2022


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# Phases -------------------------------------------------------------------------------------------------------------


def test_the_steps_lead_through_dense_learning_and_fixed(mlp: Any, element_session: Any) -> None:
    model = mlp(4, 8, 3)
    session = element_session(
        model,
        10,
        sparse_ratio=0.5,
        phases={"dense": 0.2, "fixed": 0.3},
        options={"temperature": {"start": 2.0, "end": 1.0, "shape": "linear"}},
    )
    seen = []
    for _ in range(10):
        mask = session.plan.masks["0"]
        seen.append((session.phase.value, round(session.progress, 3), round(mask.temperature, 3)))
        assert float(session.loss().detach()) == 0  # no loss drives gates that are kept on budget
        session.step()
    assert [phase for phase, _, _ in seen] == ["open"] * 2 + ["learning"] * 5 + ["fixed"] * 3
    assert [progress for _, progress, _ in seen] == [0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1]
    assert [t for _, _, t in seen] == [2, 2, 2, 1.8, 1.6, 1.4, 1.2, 1, 1, 1]
    assert session.status().phase == "fixed"
    assert session.status().sparsity == session.status().soft_sparsity == 0.5


def test_before_the_gates_act_the_model_is_dense(mlp: Any, element_session: Any) -> None:
    torch.manual_seed(0)
    model, inputs = mlp(4, 8, 3), torch.randn(5, 4)
    expected = model(inputs)
    element_session(model, 10, phases={"dense": 0.5}, options={"initial_logit": 0.0}, rescale="learned")
    assert torch.equal(model(inputs), expected)


def test_once_decided_the_gates_stay_and_the_weights_go_on(mlp: Any, element_session: Any) -> None:
    torch.manual_seed(0)
    model, inputs = mlp(4, 8, 3), torch.randn(5, 4)
    session = element_session(model, 4, sparse_ratio=0.5, phases={"fixed": 0.5})
    session.step()
    session.step()
    assert session.phase is Phase.FIXED
    hard = session.plan.masks["0"].hard.clone()
    model(inputs).sum().backward()
    assert all(parameter.grad is None for parameter in session.gate_parameters())
    assert torch.equal(model[0].weight.grad != 0, (model[0].weight.grad != 0) & hard)
    assert bool(model[0].weight.grad.any())
    session.step()
    assert torch.equal(session.plan.masks["0"].hard, hard)


def test_without_a_length_the_gates_learn_at_once_in_the_usual_number_of_steps(mlp: Any, element_session: Any) -> None:
    session = element_session(mlp(4, 8, 3), sparse_ratio=0.75)
    assert session.phase is Phase.LEARNING
    for progress, target in ((0.0, 1.0), (1.0, 0.25), (1.0, 0.25)):
        assert session.progress == progress
        assert session.controller.targets(session.progress) == [target, target]
        for _ in range(USUAL_LENGTH):
            session.step()
    assert session.phase is Phase.LEARNING
    assert session.status().sparsity == 0.75


def test_the_status_counts_weights(caplog: pytest.LogCaptureFixture, mlp: Any, element_session: Any) -> None:
    model = mlp(4, 8, 3)
    session = element_session(model)
    with torch.no_grad():
        session.plan.masks["0"].logit.fill_(-1.0)
        session.plan.masks["2"].logit.fill_(1.0)
    status = session.status()
    assert status.sparsity == pytest.approx(32 / 56)
    closed = torch.sigmoid(torch.tensor(1.0))
    assert status.soft_sparsity == pytest.approx(float((32 * closed + 24 * (1 - closed)) / 56))
    assert (status.phase, status.step) == ("learning", 0)
    with caplog.at_level(logging.INFO):
        session.decide()
    assert "the cut changed 1 of 56 gates" in caplog.text  # layer 0 keeps one unit


def test_a_method_may_add_a_penalty(monkeypatch: pytest.MonkeyPatch, mlp: Any, element_session: Any) -> None:
    session = element_session(mlp(4, 8, 3))
    for mask in session.plan.masks.values():
        monkeypatch.setattr(mask, "penalty", lambda weight: weight.detach().square().sum())
    weights = [gated.weight for gated in session.plan.gated_layers.values()]
    torch.testing.assert_close(session.loss(), sum(w.detach().square().sum() for w in weights))


# Lifecycle ----------------------------------------------------------------------------------------------------------


def test_a_session_starts_once(mlp: Any, element_session: Any) -> None:
    model = mlp(4, 8, 3)
    session = element_session(model)
    with pytest.raises(LifecycleError, match="was started before"):
        session.start()
    session.detach()
    with pytest.raises(LifecycleError, match="was started before"):
        session.start()


def test_a_model_has_one_session_at_a_time(mlp: Any, pruning: Any) -> None:
    model = mlp(4, 8, 3)
    config = pruning({"op_types": ["Linear"], "granularity": "element"})
    first, second = MaskingSession(model, config), MaskingSession(model, config)
    first.start()
    with pytest.raises(LifecycleError, match="has a masking session already; detach that one first"):
        second.start()
    with pytest.raises(LifecycleError, match="has a masking session already; detach that one first"):
        MaskingSession(model, config)
    first.detach()
    second.start()


@pytest.mark.parametrize("name", ["values", "items", "keys", "pop", "update"])
def test_a_layer_may_have_any_name(name: str, element_session: Any) -> None:
    model = nn.Module()
    model.add_module(name, nn.Linear(3, 3))
    session = element_session(model)
    assert session.extract().keys() == {name}
    session.detach()


def test_the_users_flags_survive(mlp: Any, element_session: Any) -> None:
    model = mlp(4, 8, 3)
    model[0].weight.requires_grad_(False)
    model[2].eval()
    flags = [module.training for module in model.modules()]
    session = element_session(model, weights="frozen")
    assert not any(p.requires_grad for n, p in model.named_parameters() if GATES not in n)
    assert all(p.requires_grad for p in session.gate_parameters())
    model(torch.randn(3, 4)).sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if GATES not in n)
    session.detach()
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert [module.training for module in model.modules()] == flags


def test_trained_weights_keep_their_flags(mlp: Any, element_session: Any) -> None:
    model = mlp(4, 8, 3)
    model[0].weight.requires_grad_(False)
    session = element_session(model)
    assert [p.requires_grad for n, p in model.named_parameters() if GATES not in n] == [False, True, True, True]
    session.detach()
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


def test_weights_are_initialised_once_by_the_seed(mlp: Any, pruning: Any) -> None:
    def weights(seed: int, how: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = mlp(4, 8, 3)
        entry = {"op_types": ["Linear"], "granularity": "element"}
        session = MaskingSession(model, pruning(entry, weights="frozen", weight_init=how), seed=seed)
        session.start()
        return [model[0].weight.detach(), model[2].weight.detach()]

    first, again, other = weights(1, "signed_constant"), weights(1, "signed_constant"), weights(2, "signed_constant")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert all(w.abs().unique().numel() == 1 for w in first)
    torch.manual_seed(0)
    kept = mlp(4, 8, 3)
    assert torch.equal(weights(1, "keep")[0], kept[0].weight)


# A loss that is not finite ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_the_step_and_restores_the_model(bad: float, element_session: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    session = element_session(model)
    remembered = state_of(model)
    for _ in range(3):
        session.guard(model(torch.randn(5, 4)).sum()).backward()
        session.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model(torch.full((5, 4), math.nan))
    with pytest.raises(NonFiniteLossError, match=rf"became {bad:g} at step 3; the model keeps its state at step 0\."):
        session.guard(torch.tensor(bad))
    assert equal_states(remembered, state_of(model))


def test_the_first_loss_may_be_the_bad_one(element_session: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    session = element_session(model)
    before = state_of(model)
    output = model(torch.full((5, 4), math.nan))
    with pytest.raises(NonFiniteLossError, match="at step 0"):
        session.guard(output)
    assert equal_states(before, state_of(model))


def test_the_state_is_remembered_now_and_then(mlp: Any, element_session: Any) -> None:
    model = mlp(4, 8, 3)
    session = element_session(model)
    loss = torch.tensor(1.0)
    assert session.guard(loss) is loss
    for step in range(120):
        with torch.no_grad():
            model[0].bias.fill_(float(step))
        session.guard(loss)
        session.step()
    with pytest.raises(NonFiniteLossError, match="at step 120; the model keeps its state at step 100"):
        session.guard(torch.tensor(math.nan))
    assert bool((model[0].bias == 100).all())


def test_no_state_is_remembered_where_nobody_wants_it(mlp: Any) -> None:
    model = mlp(4, 8, 3)
    rules = [{"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 0.5}]
    session = MaskingSession(model, rules, snapshot_every=None)
    session.start(10)
    session.guard(torch.tensor(1.0))
    with torch.no_grad():
        model[0].bias.fill_(7.0)
    with pytest.raises(NonFiniteLossError, match=r"at step 0; no state was remembered \(snapshot_every=None\)"):
        session.guard(torch.tensor(math.nan))
    assert bool((model[0].bias == 7).all())
    with pytest.raises(ConfigError, match="snapshot_every = 0"):
        MaskingSession(mlp(4, 8, 3), rules, snapshot_every=0)


def test_losses_that_are_looked_at_together() -> None:
    """As on an accelerator, where every look waits: the first bad loss is named, and no bad state remembered."""
    layer = nn.Linear(2, 2)
    snapshot = Snapshot(layer, every=6, waiting=4)
    snapshot.take(0)
    good = layer.weight.detach().clone()
    for step, loss in enumerate([1.0, 1.0, 1.0, 1.0, 1.0, math.inf]):
        snapshot.guard(torch.tensor(loss), step)
        with torch.no_grad():
            layer.weight.fill_(loss)
    with pytest.raises(NonFiniteLossError, match="became inf at step 5; the model keeps its state at step 0"):
        snapshot.guard(torch.tensor(1.0), 6)  # whose state would be remembered
    assert torch.equal(layer.weight, good)
    snapshot.guard(torch.tensor(math.nan), 3)
    with pytest.raises(NonFiniteLossError, match="at step 3"):
        snapshot.check()


def test_a_bad_loss_is_seen_before_anything_is_decided_or_saved(mlp: Any, element_session: Any) -> None:
    for verb in ("decide", "state_dict"):
        session = element_session(mlp(4, 8, 3))
        session._snapshot._waiting = 10  # as on an accelerator
        session.guard(torch.tensor(math.nan))
        with pytest.raises(NonFiniteLossError):
            getattr(session, verb)()


# Configurations -----------------------------------------------------------------------------------------------------


def test_a_whole_configuration_brings_its_seed(mlp: Any) -> None:
    rules = [{"op_types": ["Linear"], "granularity": "element"}]
    config = {"pruning": {"config_list": rules}, "seed": 7}
    assert MaskingSession(mlp(4, 8, 3), config).plan.noise.seed == 7
    assert MaskingSession(mlp(4, 8, 3), PruningConfig.load(config)).seed == 7
    assert MaskingSession(mlp(4, 8, 3), config, seed=2).plan.noise.seed == 2
    assert MaskingSession(mlp(4, 8, 3), rules).seed == 0


def test_channel_groups_are_found_where_they_are_not_given(mlp: Any) -> None:
    rules = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    for session in (
        MaskingSession(mlp(4, 8, 3), rules, example_inputs=torch.zeros(2, 4)),
        MaskingSession(mlp(4, 8, 3), {"pruning": {"config_list": rules}, "example_shape": [2, 4]}),
    ):
        assert [mask.shape for mask in session.plan.masks.values()] == [(8,)]
    with pytest.raises(ConfigError, match="needs inputs to trace the model with: pass example_inputs="):
        MaskingSession(mlp(4, 8, 3), rules)


# Masks from outside -------------------------------------------------------------------------------------------------


def test_element_masks_leave_the_bias_alone(mlp: Any, element_session: Any, randomize_logits: Any) -> None:
    torch.manual_seed(0)
    model = mlp(4, 8, 3)
    biases = [model[0].bias.detach().clone(), model[2].bias.detach().clone()]
    session = element_session(model, sparse_ratio=0.75)
    randomize_logits(session)
    masks = session.extract()
    assert {name: set(targets) for name, targets in masks.items()} == {"0": {"weight"}, "2": {"weight"}}
    for name, bias in zip(("0", "2"), biases, strict=True):
        layer = model.get_submodule(name)
        assert torch.equal(layer.bias, bias)
        assert torch.equal(layer.weight != 0, masks[name]["weight"] != 0)
        assert int((masks[name]["weight"] == 0).sum()) == layer.weight.numel() * 3 // 4


def test_fixed_masks_fix_the_others_open_and_are_extracted_as_given(
    mlp: Any, element_session: Any, randomize_logits: Any
) -> None:
    model = mlp(4, 8, 3)
    session = element_session(model)
    randomize_logits(session)
    given = (torch.rand(8, 4) < 0.5).float()
    session.fix_masks({"0": {"weight": given}})
    assert {mask.phase for mask in session.plan.masks.values()} == {Phase.FIXED}
    masks = session.extract()
    assert torch.equal(masks["0"]["weight"], given)
    assert bool(masks["2"]["weight"].all())
    assert torch.equal(model[0].weight != 0, given != 0)
    second = (torch.rand(3, 8) < 0.5).float()
    session.fix_masks({"2": {"weight": second}})
    assert torch.equal(session.masks()["0"]["weight"], given)
    assert torch.equal(session.masks()["2"]["weight"], second)


def test_no_masks_fix_nothing(mlp: Any, element_session: Any) -> None:
    session = element_session(mlp(4, 8, 3))
    session.fix_masks({})
    assert session.phase is Phase.LEARNING


def test_masks_of_the_wrong_shape_or_of_producers_that_disagree_are_errors(
    make_network: Any, group_session: Any, mlp: Any, element_session: Any
) -> None:
    with pytest.raises(TargetError, match=r"0\.weight: mask \(4, 8\), weight \(8, 4\)"):
        element_session(mlp(4, 8, 3)).fix_masks({"0": {"weight": torch.ones(4, 8)}})
    network = make_network("residual")
    session = group_session(network)
    with pytest.raises(TargetError, match=r"conv1\.weight: mask \(6, 3\), weight"):
        session.fix_masks({"conv1": {"weight": torch.ones(6, 3)}})
    closed = torch.ones(6, 3, 3, 3)
    closed[0] = 0
    with pytest.raises(TargetError, match="its producers' masks close different units"):
        session.fix_masks({"conv1": {"weight": closed}, "conv3": {"weight": torch.ones(6, 8, 3, 3)}})
    assert session.phase is Phase.LEARNING


# What it hands out --------------------------------------------------------------------------------------------------


def test_parameters_are_handed_out_with_their_settings(mlp: Any, element_session: Any) -> None:
    session = element_session(mlp(4, 8, 3), rescale="learned", weights="frozen")
    gates, scales = session.optimizers()
    assert isinstance(gates, torch.optim.SGD)
    assert (gates.param_groups[0]["lr"], gates.param_groups[0]["momentum"]) == (METHOD_A.lr, METHOD_A.momentum)
    assert gates.param_groups[0]["params"] == session.gate_parameters()
    assert (scales.param_groups[0]["lr"], scales.param_groups[0]["momentum"]) == (1e-3, 0.9)
    assert [float(s.detach()) for s in session.scale_parameters()] == [1.0, 1.0]
    groups = session.parameter_groups()
    assert [group["lr"] for group in groups] == [50.0, 1e-3]
    registered = {id(p) for n, p in session.model.named_parameters() if GATES in n}
    assert registered == {id(p) for group in groups for p in group["params"]}


def test_settings_follow_the_optimizer_that_will_use_them(
    mlp: Any, element_session: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The rate 50 of frozen weights is SGD's: Adam would throw the gates about with it."""
    session = element_session(mlp(4, 8, 3), rescale="learned", weights="frozen")
    assert [group["lr"] for group in session.parameter_groups(torch.optim.SGD)] == [50.0, 1e-3]
    assert not caplog.text
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    for group in session.parameter_groups(optimizer):
        optimizer.add_param_group(group)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.05, 1e-3]
    assert "for AdamW they get 0.05" in caplog.text
    session.parameter_groups()
    assert "pass the optimizer that will use it" in caplog.text
    trained = element_session(mlp(4, 8, 3))
    assert [group["lr"] for group in trained.parameter_groups(torch.optim.RMSprop)] == [0.05]


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_optimizers_are_built_from_their_settings(name: str, kind: type[torch.optim.Optimizer]) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([parameter], OptimizerConfig(name=name, lr=0.3, weight_decay=0.2))
    assert type(optimizer) is kind
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.3, 0.2)


def test_a_state_dict_goes_on_where_it_was(mlp: Any, element_session: Any) -> None:
    def started() -> tuple[nn.Module, MaskingSession]:
        torch.manual_seed(0)
        model = mlp(6, 12, 3)
        return model, element_session(model, 20, sparse_ratio=0.5, rescale="learned", phases={"fixed": 0.25})

    def run(model: nn.Module, session: MaskingSession, steps: int) -> None:
        inputs = torch.linspace(-1, 1, 30).view(5, 6)
        parameters = [*session.gate_parameters(), *session.scale_parameters()]
        for _ in range(steps):
            loss = model(inputs).square().mean() + session.loss()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter -= 10 * gradient
            session.step()

    model, session = started()
    run(model, session, 8)
    saved = copy.deepcopy(session.state_dict())
    run(model, session, 10)
    other_model, other = started()
    other.load_state_dict(saved)
    assert (other.steps, other.phase, other.progress) == (8, Phase.LEARNING, 8 / 15)
    run(other_model, other, 10)
    assert other.phase is session.phase is Phase.FIXED
    assert equal_states(state_of(model), state_of(other_model))
    with pytest.raises(TargetError, match="another plan"):
        element_session(mlp(6, 12, 4, 3)).load_state_dict(saved)
