"""Priors against direct computations: where latents start, what a warm-up collects, and what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from gumbel_plugin import GumbelGroupPruner, MaskingSession
from gumbel_plugin.errors import ConfigError, TargetError
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.sparsity.budget import BudgetTerm
from gumbel_plugin.training.session_config import mask_learning_span

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)
BATCH = 8
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
PRIORS = ("magnitude", "group_norm", "bn_scale", "taylor")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))


def cnn() -> nn.Sequential:
    """Two groups: plain channels, and channels through a grouped convolution that are flattened, 4 columns each."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(48, 3),
    )  # fmt: skip
    for norm in (model[1], model[4]):
        nn.init.normal_(norm.weight)
    return model


def configuration(prior: str, granularity: str = "element", ratio: float = 0.5, **keys: Any) -> dict[str, Any]:
    rule = {"op_names": keys.pop("op_names", ["0", "2"]), "granularity": granularity}
    gates = {"prior": prior, "strength": 1.5, "warmup": keys.pop("warmup", 3)}
    pruning = {"config_list": [{**rule, "global_group_id": "all", "sparse_ratio": ratio}], "gates": gates, **keys}
    return {"pruning": pruning}


def session_of(model: nn.Module, *arguments: Any, **keys: Any) -> MaskingSession:
    if isinstance(model[0], nn.Conv2d):
        return MaskingSession(model, configuration(*arguments, op_names=["0", "3"], **keys), example_inputs=IMAGE)
    return MaskingSession(model, configuration(*arguments, **keys), example_inputs=X[:2])


def terms(session: MaskingSession) -> list[BudgetTerm]:
    """Return the terms of the one budget in the order of their layers; groups are found from the end."""
    (budget,) = session.plan.budgets
    return sorted(budget.terms, key=lambda term: term.name)


def latents(session: MaskingSession) -> Tensor:
    """Return the latents, less the number by which the budget shifts them all."""
    values = torch.cat([term.mask.scores(None).detach().flatten() for term in terms(session)])
    return values - values.mean()


def standardized(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / scores.std(correction=0)


def batches(step: int) -> tuple[Tensor, Tensor]:
    start = step * BATCH % len(X)
    return X[start : start + BATCH], Y[start : start + BATCH]


class Training:
    """Steps of a session by hand."""

    def __init__(self, session: MaskingSession) -> None:
        self.session = session
        self.weights = torch.optim.SGD(session.weight_parameters(), lr=0.1, momentum=0.9)
        self.gates = session.optimizers()

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            x, y = batches(step)
            loss = nn.functional.cross_entropy(self.session.model(x), y) + self.session.loss()
            for optimizer in (self.weights, *self.gates):
                optimizer.zero_grad()
            loss.backward()
            for optimizer in (self.weights, *self.gates):
                optimizer.step()
            self.session.step()


# Weights alone ----------------------------------------------------------------------------------------------------


def test_magnitude_of_single_weights_is_their_size() -> None:
    model = mlp()
    session = session_of(model, "magnitude")
    session.start(20)
    sizes = torch.cat([model[0].weight.abs().flatten(), model[2].weight.abs().flatten()]).detach()
    expected = 1.5 * standardized(sizes.clamp_min(1e-4 * sizes.square().mean().sqrt()).log())
    torch.testing.assert_close(latents(session), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(latents(session).argsort(), sizes.argsort())


def rows(layer: nn.Module) -> Tensor:
    return layer.weight.detach().flatten(1)


def columns(layer: nn.Module, units: int) -> Tensor:
    """Return the weights that read each unit, (units, weights)."""
    weight = layer.weight.detach()
    return weight.reshape(weight.shape[0], units, -1).transpose(0, 1).flatten(1)


def test_magnitude_of_channels_is_the_root_mean_square_of_their_rows() -> None:
    model = cnn()
    session = session_of(model, "magnitude", "out_channel")
    session.start(20)
    sizes = torch.cat([rows(layer).square().mean(1).sqrt() for layer in (model[0], model[3])])
    torch.testing.assert_close(latents(session), 1.5 * standardized(sizes.log()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prior", ["magnitude", "group_norm"])
def test_heads_of_packed_attention_are_scored_by_the_columns_that_read_them(prior: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), nn.Flatten(), nn.Linear(80, 3))
    rule = {"op_names": ["0.self_attn"], "sparse_ratio": 0.5}
    config = {"pruning": {"config_list": [rule], "gates": {"prior": prior, "strength": 1.5}}}
    session = MaskingSession(model, config, example_inputs=torch.randn(2, 5, 16))
    session.start(20)
    norms = columns(model[0].self_attn.out_proj, 4).norm(dim=1)
    expected = 1.5 * standardized(norms.log() if prior == "magnitude" else norms)
    torch.testing.assert_close(latents(session), expected, atol=1e-5, rtol=1e-5)


def test_group_norms_are_those_of_torch_pruning_standardized_within_each_group() -> None:
    model = cnn()
    session = session_of(model, "group_norm", "out_channel")
    expected = []
    graph = tp.DependencyGraph().build_dependency(copy.deepcopy(model), IMAGE)
    importance = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)
    for name, units in (("0", 8), ("3", 12)):
        layer = dict(graph.model.named_modules())[name]
        squares = importance(graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(units))))
        by_hand = rows(model[int(name)]).square().sum(1) + model[int(name) + 1].weight.detach().square()
        reader = model[3] if name == "0" else model[8]
        torch.testing.assert_close(squares, by_hand + columns(reader, units).square().sum(1))
        expected.append(standardized(squares.sqrt()))
    session.start(20)
    torch.testing.assert_close(latents(session), 1.5 * torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_bn_scale_is_the_size_of_the_batch_norms_weights() -> None:
    model = cnn()
    session = session_of(model, "bn_scale", "out_channel")
    session.start(20)
    scales = torch.cat([model[1].weight, model[4].weight]).detach().abs()
    torch.testing.assert_close(latents(session), 1.5 * standardized(scales), atol=1e-5, rtol=1e-5)


def test_equal_scores_are_no_ranking_but_are_told_apart() -> None:
    model = cnn()
    for norm in (model[1], model[4]):
        nn.init.constant_(norm.weight, 0.1)
    session = session_of(model, "bn_scale", "out_channel")
    session.start(20)
    values = latents(session)
    assert float(values.abs().max()) < 0.02
    assert len(values.unique()) == 20


def test_dead_units_leave_the_others_their_spread() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[:2] = 0.0
    session = session_of(model, "magnitude")
    session.start(20)
    values = latents(session)
    assert set(values.argsort()[:12].tolist()) == set(range(12))
    assert float(values[12:].std()) > 0.3


@pytest.mark.parametrize("method", ["gumbel_softmax", "supermask", "hard_concrete"])
@pytest.mark.parametrize("prior", PRIORS)
def test_gates_are_on_budget_from_the_start_and_close_from_the_lowest(prior: str, method: str) -> None:
    model = cnn()
    keys = {"method": method, "budget": {"ramp": 0.0}}
    session = session_of(model, prior, "out_channel", **keys)
    session.start(20)
    for _ in range(3 if prior == "taylor" else 0):  # gates that no optimizer holds: no gradients, but a message
        session.step()
    (budget,) = session.plan.budgets
    assert session.phase is Phase.LEARNING
    own = [term.mask.decide(None).float() for term in budget.terms]
    assert float(budget.usage(own)) == pytest.approx(0.5, abs=max(term.cost for term in budget.terms) / budget.total)
    before = latents(session)
    kept = torch.cat([term.mask.decide(None).flatten() for term in terms(session)])
    assert float(before[kept].min()) > float(before[~kept].max())


def test_a_dense_phase_trains_the_weights_that_are_ranked() -> None:
    model = mlp()
    session = session_of(model, "magnitude", phases={"dense": 0.5})
    session.start(12)
    training = Training(session)
    training.steps(0, 5)
    assert session.phase is Phase.OPEN
    assert float(latents(session).std()) == 0
    training.steps(5, 6)
    sizes = torch.cat([model[0].weight.abs().flatten(), model[2].weight.abs().flatten()]).detach()
    assert session.phase is Phase.LEARNING
    assert torch.equal(latents(session).argsort(), sizes.argsort())


# Taylor -----------------------------------------------------------------------------------------------------------


def taylor_by_hand(granularity: str, first: int, last: int) -> tuple[Tensor, nn.Sequential]:
    """Train with gates written as factors of 1; return Σ (∂L/∂g)² over the steps from `first` on, and the model."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    total: list[Tensor] = []
    for step in range(last):
        x, y = batches(step)
        element = granularity == "element"
        shapes = [model[0].weight.shape, model[2].weight.shape] if element else [(16,), (12,)]
        gates = [torch.ones(shape, requires_grad=True) for shape in shapes]
        linear = nn.functional.linear
        if element:
            hidden = torch.tanh(linear(x, model[0].weight * gates[0], model[0].bias))
            hidden = torch.tanh(linear(hidden, model[2].weight * gates[1], model[2].bias))
        else:
            hidden = torch.tanh(linear(x, model[0].weight, model[0].bias)) * gates[0]
            hidden = torch.tanh(linear(hidden, model[2].weight, model[2].bias)) * gates[1]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model[4](hidden), y).backward()
        if step >= first:
            total.append(torch.cat([gate.grad.flatten() for gate in gates]).square())
        optimizer.step()
    return torch.stack(total).sum(0), model


@pytest.mark.parametrize("dense", [0, 5])
@pytest.mark.parametrize("granularity", ["element", "out_channel"])
@pytest.mark.parametrize("method", ["gumbel_softmax", "supermask", "hard_concrete"])
def test_taylor_sums_the_squared_gradients_of_the_first_batches(method: str, granularity: str, dense: int) -> None:
    session = session_of(mlp(), "taylor", granularity, method=method, phases={"dense": dense / 20})
    session.start(20)
    training = Training(session)
    begin = max(3, dense)
    training.steps(0, begin - 1)
    assert session.phase is Phase.OPEN
    training.steps(begin - 1, begin)
    assert session.phase is Phase.LEARNING
    sums, plain = taylor_by_hand(granularity, begin - 3, begin)
    roots = sums.sqrt()
    expected = 1.5 * standardized(roots.clamp_min(1e-4 * sums.mean().sqrt()).log())
    torch.testing.assert_close(latents(session), expected, atol=2e-4, rtol=2e-4)
    for layer in (0, 2, 4):  # the warm-up is dense training
        torch.testing.assert_close(session.model[layer].weight, plain[layer].weight)
    assert not any(optimizer.state for optimizer in training.gates)
    training.steps(begin, 20)
    (budget,) = session.plan.budgets
    assert float(budget.usage([term.mask.decide(None).float() for term in budget.terms])) <= 0.5


@pytest.mark.parametrize(
    ("total", "dense", "expected"),
    [
        (None, 0, (10, 300)),
        (100, 0, (10, 100)),
        (30, 0, (6, 30)),
        (100, 0.5, (50, 100)),
        (100, 0.02, (10, 100)),
        (1, 0, (1, 1)),
    ],
)
def test_the_warmup_is_part_of_the_dense_training(total: int | None, dense: float, expected: tuple[int, int]) -> None:
    config = configuration("taylor", warmup=10, phases={"dense": dense})
    section = MaskingSession(mlp(), config).config
    assert mask_learning_span(section, total) == expected


@pytest.mark.parametrize("prior", ["taylor", "magnitude"])
@pytest.mark.parametrize("at", [1, 2, 3, 8])
def test_a_resumed_training_is_the_same_bit_for_bit(prior: str, at: int) -> None:
    whole = Training(session_of(mlp(), prior))
    whole.session.start(20)
    whole = Training(whole.session)
    whole.steps(0, at)
    states = [
        copy.deepcopy(each.state_dict()) for each in (whole.session, whole.session.model, whole.weights, *whole.gates)
    ]
    whole.steps(at, 20)
    session = session_of(mlp(), prior)
    session.start(20)
    again = Training(session)
    assert ("prior" in states[0]) == (prior == "taylor")
    for each, state in zip((session, session.model, again.weights, *again.gates), states, strict=True):
        each.load_state_dict(state)
    again.steps(at, 20)
    assert torch.equal(latents(session), latents(whole.session))
    for layer in (0, 2, 4):
        assert torch.equal(session.model[layer].weight, whole.session.model[layer].weight)


def test_damaged_states_of_a_warmup_are_refused_and_change_nothing() -> None:
    training = Training(session_of(mlp(), "taylor"))
    training.session.start(20)
    training.steps(0, 2)
    state = training.session.state_dict()
    for damage in ({"squares": {}}, {"batches": 0}, {"squares": {"0": torch.zeros(3), "2": torch.zeros(3)}}):
        with pytest.raises(TargetError, match="prior"):
            training.session.load_state_dict({**state, "prior": {**state["prior"], **damage}})
    assert training.session.state_dict()["prior"]["batches"] == 2


def test_gates_that_no_optimizer_holds_are_said_to_have_no_ranking(caplog: pytest.LogCaptureFixture) -> None:
    session = session_of(mlp(), "taylor")
    session.start(20)
    for _ in range(3):
        session.step()
    assert "got no gradients" in caplog.text
    assert float(latents(session).abs().max()) < 0.02


# Doors and refusals -----------------------------------------------------------------------------------------------


def test_what_remains_of_the_group_pruners_gates_goes_on_where_it_was() -> None:
    model = cnn()
    config = {"pruning": {"gates": {"prior": "bn_scale"}, "gate_optimizer": {"name": "adam", "lr": 0.05}}}
    pruner = GumbelGroupPruner(
        model, IMAGE, pruning=config, pruning_ratio=0.5, iterative_steps=2, ignored_layers=[model[8]], total_steps=4
    )
    scales = {"0": model[1].weight.detach().abs(), "3": model[4].weight.detach().abs()}
    for name, mask in pruner.session.plan.masks.items():
        assert torch.equal(mask.scores(None).argsort(), scales[name].argsort())
    with torch.no_grad():
        for mask in pruner.session.plan.masks.values():
            mask.scores(None).neg_()  # learned: the opposite of what the network had
    before = {name: mask.scores(None).detach().clone() for name, mask in pruner.session.plan.masks.items()}
    pruner.step()
    for name, mask in pruner.session.plan.masks.items():
        own = mask.scores(None).detach()
        kept = before[name].argsort(descending=True)[: len(own)].sort().values
        assert torch.equal(own, before[name][kept])


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("method", ["edge_popup", "magnitude", "reparametrization", "random", "gibbs"])
def test_methods_without_steered_latents_are_refused(method: str, prior: str) -> None:
    rule = {"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 0.5}
    with pytest.raises(ConfigError, match=f"gates.prior '{prior}'.*method '{method}' has no latents"):
        MaskingSession(mlp(), {"pruning": {"config_list": [rule], "method": method, "gates": {"prior": prior}}})


def test_budgets_without_a_ratio_are_refused() -> None:
    rule = {"op_types": ["Linear"], "granularity": "element"}
    with pytest.raises(ConfigError, match=r"gates.prior 'magnitude': '0' has no sparse_ratio"):
        MaskingSession(mlp(), {"pruning": {"config_list": [rule], "gates": {"prior": "magnitude"}}})


def test_bn_scale_needs_batch_norms() -> None:
    for granularity in ("element", "out_channel"):
        with pytest.raises(ConfigError, match=r"no batch norm scales the channels of '[02]'"):
            session_of(mlp(), "bn_scale", granularity)


@pytest.mark.parametrize(
    ("gates", "message"),
    [({"prior": "tailor"}, "taylor"), ({"strength": 0}, "greater than 0"), ({"warmup": 0}, "greater than or equal")],
)
def test_values_that_are_none_are_refused(gates: dict[str, Any], message: str) -> None:
    rule = {"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 0.5}
    with pytest.raises(ConfigError, match=message):
        MaskingSession(mlp(), {"pruning": {"config_list": [rule], "gates": gates}})
