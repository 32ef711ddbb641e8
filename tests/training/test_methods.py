"""Every mask method through a whole session: it learns, meets its budget exactly, and extracts what it evaluated."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin.config import OptimizerConfig, PruningConfig
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.layers.weights import plain_copy
from gumbel_plugin.masks import METHODS, Phase
from gumbel_plugin.masks.per_sample import PerSample
from gumbel_plugin.masks.reparametrization import soft_gate
from gumbel_plugin.masks.weight_dependent import WeightDependent
from gumbel_plugin.storage.mask_format import Masks
from gumbel_plugin.training.session import MaskingSession

FILTERS = [1, -1, -1, -1]


def points(count: int = 256) -> tuple[Tensor, Tensor]:
    """Return points of a square, and whether they lie in its first or third quadrant."""
    inputs = 2 * torch.rand(count, 2, generator=torch.Generator().manual_seed(0)) - 1
    return inputs, (inputs.prod(1) > 0).long()


def linear_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))


def conv_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (2, 1, 1)), nn.Upsample((3, 3)),
        nn.Conv2d(2, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(108, 2),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A method as a configuration has it, and a network for it."""

    method: str
    granularity: Any = "element"
    options: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)
    entry: dict[str, Any] = field(default_factory=dict)
    network: Callable[[], nn.Sequential] = linear_network

    def session(self, model: nn.Module, ratio: float | None = 0.5, seed: int = 0, **keys: Any) -> MaskingSession:
        entry = {
            "op_types": ["Linear" if self.network is linear_network else "Conv2d"],
            "granularity": self.granularity,
            "sparse_ratio": ratio,
            **self.entry,
        }
        pruning = {"method": self.method, "options": self.options, "config_list": [entry], **self.keys, **keys}
        return MaskingSession(model, PruningConfig.load({"pruning": pruning}).pruning, seed=seed)


_FROZEN = {"weights": "frozen", "weight_init": "signed_constant"}
CASES = {
    "gumbel_softmax": Case("gumbel_softmax"),
    "supermask": Case("supermask"),
    "supermask, frozen": Case("supermask", keys={**_FROZEN, "rescale": "dynamic"}),
    "edge_popup": Case("edge_popup", keys=_FROZEN),
    "edge_popup, scaled": Case(
        "edge_popup", options={"scaled": True}, keys={**_FROZEN, "weight_init": "kaiming_normal"}
    ),
    "edge_popup, kernel": Case("edge_popup", "kernel", network=conv_network),
    "hard_concrete": Case("hard_concrete", options={"l0_weight": 1e-5}),
    "reparametrization": Case("reparametrization"),
    "reparametrization, global": Case("reparametrization", entry={"global_group_id": "all"}),
    "gibbs": Case("gibbs"),
    "gibbs, kernel": Case("gibbs", "kernel", {"hamiltonian": "kernel"}, network=conv_network),
    "gibbs, filter": Case("gibbs", FILTERS, {"hamiltonian": "filter", "sweeps": 5}, network=conv_network),
    "magnitude": Case("magnitude"),
    "magnitude, global": Case("magnitude", entry={"global_group_id": "all"}),
    "magnitude, filter": Case("magnitude", FILTERS, network=conv_network),
    "random": Case("random"),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def build(case: Case) -> nn.Sequential:
    torch.manual_seed(0)
    return case.network()


@pytest.fixture
def learn(train_gates: Any) -> Callable[..., list[float]]:
    """Return a function that trains the weights that are not frozen, and the gates; it returns the task's losses."""

    def run(model: nn.Module, session: MaskingSession, steps: int, until: int | None = None) -> list[float]:
        session.start(steps)
        inputs, labels = points()
        weights = session.weight_parameters()
        optimizer = torch.optim.Adam(weights, 0.01) if weights else None
        return train_gates(session, lambda: F.cross_entropy(model(inputs), labels), until or steps, optimizer)

    return run


@torch.no_grad()
def evaluated(model: nn.Module) -> Tensor:
    """Return the outputs in eval mode."""
    was_training = model.training
    outputs = model.eval()(points()[0])
    model.train(was_training)
    return outputs


def kept_units(session: MaskingSession, masks: Masks) -> dict[str, int]:
    """Return how many whole units of each layer are open; a unit that is neither open nor closed is an error."""
    kept = {}
    for name, targets in masks.items():
        granularity = session.plan.masks[name].sparsity_type
        sizes = granularity.reduce(targets["weight"]) / granularity.unit_size(targets["weight"].shape)
        assert set(sizes.unique().tolist()) <= {0.0, 1.0}
        kept[name] = int(sizes.sum())
    return kept


def test_every_method_is_here() -> None:
    """But for those whose gates belong to samples and not to weights, which have a file of their own."""
    assert {case.method for case in CASES.values()} == {
        name for name, m in METHODS.items() if not issubclass(m, PerSample)
    }


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.5, 0.83])
def test_the_budget_is_met_exactly_and_the_extracted_network_is_the_masked_one(
    case: Case, ratio: float, learn: Any
) -> None:
    model = build(case)
    session = case.session(model, ratio)
    learn(model, session, 20)
    assert session.phase is Phase.LEARNING
    session.decide()
    masked = evaluated(model)
    masks = session.extract()
    assert torch.equal(evaluated(model), masked)
    session.detach()
    plain = evaluated(model)
    torch.testing.assert_close(plain, masked, atol=1e-6, rtol=1e-6)
    units = {name: math.prod(mask.shape) for name, mask in session.plan.masks.items()}
    kept = kept_units(session, masks)
    if "global_group_id" in case.entry:
        assert sum(kept.values()) == sum(units.values()) - math.floor(sum(units.values()) * ratio)
    else:
        assert kept == {name: count - math.floor(count * ratio) for name, count in units.items()}
    for name, targets in masks.items():
        weight = model.get_submodule(name).weight
        assert bool((weight[targets["weight"] == 0] == 0).all())
        assert bool((weight[targets["weight"] == 1] != 0).any())


@pytest.mark.slow
def test_the_loss_falls(case: Case, learn: Any) -> None:
    """The hard network that comes out solves the problem, or did before where nothing is learned about it."""
    model = build(case)
    session = case.session(model, 0.5, phases={} if "weights" in case.keys else {"fixed": 0.25})
    losses = learn(model, session, 240)
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    session.extract()
    _, labels = points()
    hard = F.cross_entropy(evaluated(model), labels).item()
    assert hard < 0.6 * math.log(2)
    assert (evaluated(model).argmax(1) == labels).float().mean() > 0.85


@pytest.mark.slow
def test_the_seed_decides(case: Case, learn: Any) -> None:
    """The same seed learns the same mask whatever the global random state; another one samples other gates."""
    results = []
    for seed, state in ((0, 1), (0, 2), (1, 1)):
        model = build(case)
        session = case.session(model, 0.5, seed)
        torch.manual_seed(state)
        learn(model, session, 5)
        results.append((session.extract(), {name: p.detach().clone() for name, p in model.named_parameters()}))
    first, same, other = results
    for name, targets in first[0].items():
        assert torch.equal(targets["weight"], same[0][name]["weight"])
    assert all(torch.equal(value, same[1][name]) for name, value in first[1].items())
    differs = any(not torch.equal(value, other[1][name]) for name, value in first[1].items())
    assert differs == (case.method not in ("reparametrization", "magnitude"))


@pytest.mark.slow
def test_a_session_goes_on_from_its_state(case: Case, learn: Any) -> None:
    """The next sample, the next budget loss and the masks are those of the session that was not interrupted."""
    model, resumed_model = build(case), build(case)
    session, resumed = case.session(model), case.session(resumed_model, seed=1)
    learn(model, session, 20, until=10)
    resumed.plan.noise.seed = session.plan.noise.seed  # the seed is the configuration's, all the rest is in the state
    resumed.start(20)
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(session.state_dict())
    inputs, _ = points()
    assert session.progress == resumed.progress == 0.5
    assert torch.equal(model(inputs), resumed_model(inputs))
    torch.testing.assert_close(session.loss(), resumed.loss(), rtol=0, atol=0)
    session.decide()
    resumed.decide()
    for name, mask in session.plan.masks.items():
        assert torch.equal(mask.hard, resumed.plan.masks[name].hard)


# Budgets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["edge_popup", "gibbs", "gibbs, kernel", "edge_popup, kernel"])
def test_gates_follow_a_ratio_that_changes_while_they_are_learnt(name: str) -> None:
    case = CASES[name]
    model = build(case)
    session = case.session(model, 0.2)
    session.start()
    for ratio in (0.2, 0.8):
        for budget in session.plan.budgets:
            budget.ratio = ratio
        assert session.status().sparsity == pytest.approx(ratio, abs=0.03)


def test_limits_of_a_layer_bound_what_its_gates_close() -> None:
    case = Case("edge_popup", entry={"max_sparse_ratio": 0.25})
    model = build(case)
    session = case.session(model, 0.9)
    session.start()
    assert session.status().sparsity == 0.25
    session.decide()
    assert session.status().sparsity == 0.25


def test_a_method_with_a_way_of_its_own_is_not_steered() -> None:
    for case in CASES.values():
        session = case.session(build(case))
        manages_own_sparsity = METHODS[case.method].manages_own_sparsity
        assert (session.controller.budgets == []) == manages_own_sparsity
        session.start()
        assert (session.controller.loss() is not None) == (case.method == "reparametrization")


def test_the_networks_one_t_is_its_only_parameter() -> None:
    for name in ("reparametrization", "reparametrization, global"):
        model = build(CASES[name])
        session = CASES[name].session(model)
        before = sum(p.numel() for p in model.parameters())
        session.start()
        assert [p.numel() for p in session.gate_parameters()] == [1]
        assert sum(p.numel() for p in model.parameters()) == before + 1
        assert len({id(mask.t) for mask in copy.deepcopy(session.plan.masks).values()}) == 1


def test_a_global_reparametrisation_has_the_published_budget_loss() -> None:
    model = build(CASES["reparametrization"])
    session = CASES["reparametrization, global"].session(model, 0.9)
    session.start()
    weights = torch.cat([layer.weight.detach().flatten() for layer in model if isinstance(layer, nn.Linear)])
    initial = soft_gate(weights, 100.0).sum()
    expected = 1000.0 * ((initial - 0.1 * len(weights)) / initial) ** 2
    torch.testing.assert_close(session.loss().detach(), expected)


@pytest.mark.slow
def test_a_reparametrised_network_comes_down_to_its_budget(learn: Any) -> None:
    """Nothing is left for the final cut to change: that is what the budget loss is for."""
    model = build(CASES["reparametrization"])
    session = CASES["reparametrization, global"].session(model, 0.9)
    learn(model, session, 240)
    status = session.status()
    assert status.sparsity == pytest.approx(0.9, abs=0.01)
    assert status.soft_sparsity == pytest.approx(0.9, abs=0.01)
    before = evaluated(model)
    session.decide()
    assert (evaluated(model).argmax(1) == before.argmax(1)).float().mean() > 0.97


def test_reparametrised_weights_stay_what_they_are_when_the_masks_are_decided(learn: Any) -> None:
    model = build(CASES["reparametrization"])
    session = CASES["reparametrization"].session(model, 0.0)
    learn(model, session, 5)
    soft = model(points()[0])
    session.decide()
    assert torch.equal(model(points()[0]), soft)


def test_the_floors_train_dense_until_the_masks_are_fixed(learn: Any) -> None:
    for method in ("magnitude", "random"):
        model = build(CASES[method])
        session = CASES[method].session(model, 0.75, phases={"fixed": 0.5})
        learn(model, session, 10, until=4)
        assert session.status().sparsity == 0.0
        assert torch.equal(model(points()[0]), plain_copy(model)(points()[0]))
        session.step()
        assert session.phase is Phase.FIXED
        assert session.status().sparsity == 0.75


def test_published_optimizers_are_the_default() -> None:
    def optimizer(method: str, **keys: Any) -> OptimizerConfig:
        pruning = {"method": method, "config_list": [{"op_types": ["Linear"]}], **keys}
        return PruningConfig.load({"pruning": pruning}).pruning.gate_optimizer_config()

    published = OptimizerConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4)
    assert optimizer("edge_popup", weights="frozen") == optimizer("edge_popup") == published
    assert optimizer("reparametrization") == OptimizerConfig(name="sgd", lr=0.1, momentum=0.9)
    assert optimizer("edge_popup", gate_optimizer={"name": "adam", "lr": 0.5}).lr == 0.5


def test_scaled_weights_are_drawn_larger() -> None:
    drawn = {}
    for scaled in (False, True):
        case = Case("edge_popup", options={"scaled": scaled}, keys=_FROZEN)
        model = build(case)
        case.session(model, 0.75).start()
        drawn[scaled] = model[2].weight.detach()
    torch.testing.assert_close(drawn[True], 2 * drawn[False])
    assert float(drawn[False].abs().max()) == pytest.approx(math.sqrt(2 / 32), rel=0.1)


# Errors, before anything is trained ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [name for name, m in METHODS.items() if m.manages_own_sparsity and not issubclass(m, PerSample)]
)
def test_a_method_with_a_way_of_its_own_needs_a_ratio(method: str) -> None:
    for entry in ({}, {"sparse_threshold": 0.3}):
        with pytest.raises(ConfigError, match=f"sparse_ratio of '0' is missing: method '{method}'"):
            Case(method, entry=entry).session(linear_network(), None)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.shares_budget])
def test_a_method_that_ranks_each_layer_by_itself_has_no_global_budget(method: str) -> None:
    with pytest.raises(ConfigError, match=f"global_group_id 1: method '{method}' ranks '0' and the others"):
        Case(method, entry={"global_group_id": 1}).session(linear_network())
    Case(method, entry={"global_group_id": 1, "op_types": None, "op_names": ["2"]}).session(linear_network())


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if issubclass(method, WeightDependent)])
def test_a_function_of_one_layers_weight_cannot_be_shared(method: str) -> None:
    square = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=f"dependency_group_id 1: gates of method '{method}'.*'1' and '0'"):
        Case(method, entry={"dependency_group_id": 1}).session(square)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if issubclass(method, WeightDependent)])
@pytest.mark.parametrize("word", ["out_channel", "default"])
def test_a_function_of_one_layers_weight_has_no_channel_groups(make_network: Any, method: str, word: str) -> None:
    network = make_network("conv_bn_relu")
    entry = {"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": word}
    pruning = PruningConfig.load({"pruning": {"method": method, "config_list": [entry]}}).pruning
    with pytest.raises(ConfigError, match=r"granularity 'out_channel'.*use 'element'"):
        MaskingSession(network.model, pruning, list(network.groups().values()))


@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if not issubclass(method, WeightDependent)]
)
def test_the_other_methods_gate_channel_groups(make_network: Any, method: str) -> None:
    network = make_network("residual")
    entry = {"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": "out_channel"}
    pruning = PruningConfig.load({"pruning": {"method": method, "config_list": [entry]}}).pruning
    session = MaskingSession(network.model, pruning, list(network.groups().values()))
    session.start(4)
    for _ in range(2):
        (network.model(network.batch(4)).square().mean() + session.loss()).backward()
        session.step()
    session.decide()
    for mask in session.plan.masks.values():
        assert int(mask.hard.sum()) == mask.shape[0] // 2


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_trained_weights])
def test_frozen_weights_leave_some_methods_nothing_to_learn(method: str) -> None:
    with pytest.raises(ConfigError, match=f"weights 'frozen' leave method '{method}' nothing to learn.*'trained'"):
        Case(method, keys={"weights": "frozen"}).session(linear_network())


def test_options_are_checked_with_their_keys() -> None:
    with pytest.raises(ConfigError, match=r"options\.beta.*may not fall, as it does from 10\.0 to 1\.0"):
        Case("gibbs", options={"beta": {"start": 10.0, "end": 1.0}}).session(linear_network())
    with pytest.raises(ConfigError, match=r"options\.betta: unknown key; did you mean 'beta'"):
        Case("gibbs", options={"betta": 1.0}).session(linear_network())


def test_scaled_needs_weights_that_are_drawn() -> None:
    model = linear_network()
    before = model[0].weight.detach().clone()
    session = Case("edge_popup", options={"scaled": True}).session(model)
    with pytest.raises(ConfigError, match=r"options\.scaled.*pruning\.weight_init 'keep'"):
        session.start()
    assert torch.equal(model[0].weight, before)
