"""MACs and parameters as functions of gates: exact for 0/1 gates, met to the unit at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.config import PruningSection
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.graph.channel_groups import ChannelGroup, ChannelSlice
from gumbel_plugin.layers.weights import plain_copy
from gumbel_plugin.sparsity.budget import BudgetTerm
from gumbel_plugin.sparsity.cost_budget import CostBudget
from gumbel_plugin.sparsity.cost_model import CostModel, Widths, count_cost
from gumbel_plugin.sparsity.counting import count_macs, count_parameters
from gumbel_plugin.training.plan import Plan
from gumbel_torch_pruning import DependencyGroups

COUNTS: dict[str, Callable[[nn.Module, Tensor], int]] = {
    "macs": count_macs,
    "parameters": lambda model, inputs: count_parameters(model),
}


def cost_of(network, unit: str) -> CostModel:
    return count_cost(network.model, network.groups(), network.inputs, unit)


def random_gates(groups: dict[str, ChannelGroup], seed: int) -> dict[str, Tensor]:
    """Return 0/1 gates with at least one open in every group."""
    generator = torch.Generator().manual_seed(seed)
    gates = {name: (torch.rand(group.size, generator=generator) < 0.6).double() for name, group in groups.items()}
    for gate in gates.values():
        gate[int(torch.randint(len(gate), (), generator=generator))] = 1.0
    return gates


@pytest.mark.slow
@pytest.mark.parametrize("unit", COUNTS)
def test_for_hard_gates_it_is_what_the_shrunk_network_costs(network, unit):
    cost, groups = cost_of(network, unit), network.groups()
    for seed in range(3):
        gates = random_gates(groups, seed)
        small = copy.deepcopy(network.model)
        DependencyGroups(small, network.inputs).remove_all(
            {name: torch.nonzero(gate == 0).flatten() for name, gate in gates.items() if not bool(gate.all())}
        )
        assert float(cost(gates)) == pytest.approx(COUNTS[unit](small, network.inputs), rel=1e-12)


@pytest.mark.parametrize("unit", COUNTS)
def test_all_gates_open_it_is_what_the_network_costs(network, unit):
    dense = {name: torch.ones(group.size, dtype=torch.float64) for name, group in network.groups().items()}
    assert float(cost_of(network, unit)(dense)) == COUNTS[unit](network.model, network.inputs)


@pytest.mark.parametrize("unit", COUNTS)
def test_how_many_stay_says_as_much_as_which(network, unit):
    cost, groups = cost_of(network, unit), network.groups()
    names = sorted(groups)
    of_counts = cost.of_counts(names)
    for seed in range(3):
        gates = random_gates(groups, seed)
        counts = torch.tensor([float(gates[name].sum()) for name in names])
        assert float(of_counts(counts)) == pytest.approx(float(cost(gates)), rel=1e-5)


@pytest.mark.parametrize("unit", COUNTS)
def test_its_gradient_is_the_slope(network, unit):
    cost = cost_of(network, unit)
    torch.manual_seed(0)
    gates = {name: torch.rand(g.size, dtype=torch.float64, requires_grad=True) for name, g in network.groups().items()}
    cost(gates).backward()
    for name, gate in gates.items():
        for unit_number in range(len(gate)):
            around = []
            for shift in (1e-3, -1e-3):
                moved = {other: value.detach().clone() for other, value in gates.items()}
                moved[name][unit_number] += shift
                around.append(float(cost(moved)))
            assert float(gate.grad[unit_number]) == pytest.approx((around[0] - around[1]) / 2e-3, rel=1e-6, abs=1e-6)


@pytest.mark.slow
def test_it_is_the_expectation_under_independent_gates(make_network):
    """Layers multiply widths of different groups, so the mean of the cost is the cost of the means."""
    network = make_network("conv_bn_relu")
    cost = cost_of(network, "macs")
    probabilities = {
        name: torch.full((group.size,), 0.7, dtype=torch.float64) for name, group in network.groups().items()
    }
    generator = torch.Generator().manual_seed(0)
    costs = [
        float(cost({name: torch.bernoulli(p, generator=generator) for name, p in probabilities.items()}))
        for _ in range(4000)
    ]
    assert float(cost(probabilities)) == pytest.approx(sum(costs) / len(costs), rel=0.02)


def test_a_layer_that_is_applied_twice_costs_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.middle(self.first(x))))

    model, inputs = Twice(), torch.randn(2, 3, 8, 8)
    groups = {group.name: group for group in DependencyGroups(copy.deepcopy(model), inputs).groups}
    exact = {name: group for name, group in groups.items() if group.safety == "exact"}
    cost = count_cost(model, exact, inputs, "macs")
    assert list(cost.widths.layers).count("middle") == 1
    half = {name: (torch.arange(group.size) % 2).double() for name, group in exact.items()}
    assert float(cost(half)) == 64 * (3 * 3 + 2 * 3 * 3 * 9 + 3 * 2)


def test_channels_that_one_group_feeds_twice_are_both_counted():
    parts = [
        ChannelSlice("0", torch.tensor(at), torch.tensor(of)) for at, of in (([0, 1], [0, 1]), ([2, 3, 4], [0, 0, 1]))
    ]
    group = ChannelGroup("a", 2, (), tuple(parts))
    inputs, _ = Widths.of(nn.Sequential(nn.Linear(8, 2)), {"a": group}).kept(torch.tensor([1.0, 0.0]))
    assert float(inputs) == 3 + 3  # three that nobody gates, three of unit 0


def test_without_groups_it_is_a_constant():
    model = nn.Sequential(nn.Linear(4, 2))
    assert float(count_cost(model, {}, torch.randn(1, 4), "parameters")({})) == 10


def test_weights_of_a_unit_that_no_producer_has_are_counted():
    model = nn.Sequential(nn.Linear(4, 6))
    part = DependencyGroups(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 6)), torch.randn(1, 3)).groups[-1].consumers[0]
    group = ChannelGroup("heads", 4, (), (type(part)("0", part.positions, part.units),), unlisted_weights=10)
    cost = count_cost(model, {"heads": group}, torch.randn(1, 4), "parameters")
    assert float(cost({"heads": torch.tensor([1.0, 1.0, 0.0, 0.0])})) == 30 - 2 * (6 + 10)


# The cut --------------------------------------------------------------------------------------------------------------


def scope_of(network, unit: str, ratio: float, **bounds: float) -> CostBudget:
    plan = Plan(network.model, PruningSection(), seed=0)
    terms = [plan.gate_group(group) for group in network.groups().values()]
    plan.finish([])
    generator = torch.Generator().manual_seed(0)
    for term in terms:
        term.mask.logit.data.copy_(torch.randn(term.units, generator=generator))
        for name, value in bounds.items():
            setattr(term, name, value)
    return CostBudget("test", terms, ratio, model=cost_of(network, unit))


def cost_after(budget: CostBudget, gates: dict[str, Tensor]) -> float:
    return float(budget.model({name: gate.double() for name, gate in gates.items()}))


@pytest.mark.parametrize("unit", COUNTS)
def test_the_cut_meets_the_budget_and_no_closed_unit_fits_any_more(network, unit):
    budget = scope_of(network, unit, 0.4)
    gates, allowed = budget.cut(), budget.total * 0.6
    assert cost_after(budget, gates) <= allowed
    for name, gate in gates.items():
        assert bool(gate.any())
        for closed in torch.nonzero(~gate).flatten():
            more = {**gates, name: gate.index_fill(0, closed, True)}
            assert cost_after(budget, more) > allowed


def test_the_lowest_scores_go_first(make_network):
    budget = scope_of(make_network("residual"), "macs", 0.5)
    gates = budget.cut()
    logits = {term.name: term.mask.logit.detach() for term in budget.terms}
    lowest_kept = min(float(logits[name][gate].min()) for name, gate in gates.items())
    closed = torch.cat([logits[name][~gate] for name, gate in gates.items()])
    assert int((closed > lowest_kept).sum()) <= 2  # what is reopened at the edge


def test_limits_and_multiples_are_kept(make_network):
    network = make_network("residual")
    budget = scope_of(network, "parameters", 0.4, multiple=2, max_ratio=0.7)
    gates = budget.cut()
    assert cost_after(budget, gates) <= budget.total * 0.6
    for term in budget.terms:
        kept = int(gates[term.name].sum())
        assert kept % 2 == 0
        assert kept >= 0.3 * term.units


def test_a_budget_below_the_floor_names_what_sets_it(make_network):
    network = make_network("residual")
    with pytest.raises(ConfigError, match="largest possible ratio is") as caught:
        scope_of(network, "macs", 0.99)
    ratio = float(str(caught.value).rpartition(" ")[2])
    budget = scope_of(network, "macs", ratio - 1e-3)
    assert cost_after(budget, budget.cut()) <= budget.total * (1 - ratio + 1e-3)
    assert "largest gated layer left is" in str(caught.value)
    with pytest.raises(ConfigError, match=r"7\d\.\d% stay"):
        scope_of(network, "macs", 0.9, max_ratio=0.2)


def test_units_of_unequal_cost_are_reopened_where_they_fit():
    """Closing the costly unit alone would leave a gap that cheap ones, closed before it, fill again."""
    plan = Plan(nn.Sequential(nn.Linear(2, 2)), PruningSection(), seed=0)
    masks = [plan._new_mask((4,), None) for _ in range(2)]
    terms = [BudgetTerm(name, mask, None) for name, mask in zip("ab", masks, strict=True)]
    groups = {name: ChannelGroup(name, 4, (), ()) for name in "ab"}
    units = torch.tensor([1.0] * 4 + [10.0] * 4, dtype=torch.float64)
    model = CostModel("units", Widths.of(nn.Linear(1, 1), groups), lambda inputs, outputs: inputs, 0.0, units)
    budget = CostBudget("test", terms, 0.25, model=model)
    masks[0].logit.data.copy_(torch.tensor([-4.0, -3.0, 5.0, 5.0]))
    masks[1].logit.data.copy_(torch.tensor([-2.0, 1.0, 1.0, 1.0]))
    gates = budget.cut()  # 44 in all, 33 may stay: a's two lowest and b's lowest leave 32
    assert gates["b"].tolist() == [False, True, True, True]
    assert gates["a"].tolist() == [False, True, True, True]


def test_gates_that_were_not_learnt_close_in_every_group_alike(make_network):
    budget = scope_of(make_network("no_bn"), "parameters", 0.5)
    for term in budget.terms:
        term.mask.logit.data.fill_(3.0)
    shares = [float(gate.float().mean()) for gate in budget.cut().values()]
    assert max(shares) - min(shares) < 0.15


# Whole networks -------------------------------------------------------------------------------------------------------


def _vgg16_bn() -> nn.Module:
    model = torchvision.models.vgg16_bn(num_classes=10)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
    "vgg16_bn": _vgg16_bn,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("target", "ratio"), [("macs", 0.5), ("macs", 0.75), ("parameters", 0.75)])
def test_the_final_network_is_within_three_percent_of_the_budget(name, target, ratio):
    torch.manual_seed(0)
    model, inputs = NETWORKS[name](), torch.randn(1, 3, 32, 32)
    budget = COUNTS[target](model, inputs) * (1 - ratio)
    pruner = GumbelGroupPruner(model, inputs, target=target, pruning_ratio=ratio)
    for parameter in pruner.gate_parameters():
        parameter.data.normal_()
    pruner.step()
    assert 0.97 <= COUNTS[target](model, inputs) / budget <= 1.0


@pytest.mark.slow
def test_the_budget_is_that_of_the_original_network_in_iterative_steps_too():
    torch.manual_seed(0)
    model, inputs = NETWORKS["resnet18"](), torch.randn(1, 3, 32, 32)
    dense = count_macs(model, inputs)
    pruner = GumbelGroupPruner(model, inputs, target="macs", pruning_ratio=0.6, iterative_steps=3)
    for done in (0.2, 0.4, 0.6):
        for parameter in pruner.gate_parameters():
            parameter.data.normal_()
        pruner.step()
        assert 0.97 <= count_macs(plain_copy(model), inputs) / (dense * (1 - done)) <= 1.0
