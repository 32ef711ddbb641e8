"""`pruning.budget`: metric, ratio and scope mean the same thing whatever is gated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gumbel_plugin import MaskingSession, shrink
from gumbel_plugin.config import PruningConfig
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.layers.geometry import is_matrix, layer_channels
from gumbel_plugin.sparsity.counting import count_macs, count_parameters, macs_of_layers
from gumbel_plugin.sparsity.latency import LatencyTable, LayerGrid
from gumbel_plugin.training import metric_budgets

COUNTS: dict[str, Callable[[nn.Module, Any], int]] = {
    "macs": count_macs,
    "parameters": lambda model, inputs: count_parameters(model),
}


@pytest.fixture
def decided(randomize_logits: Any) -> Callable[..., MaskingSession]:
    """Return the function that decides random gates of a network under a budget."""

    def decide(network: Any, budget: dict[str, Any], **entry: Any) -> MaskingSession:
        rule = {"op_types": ["Conv2d", "Linear"], **entry}
        config = PruningConfig.load({"pruning": {"config_list": [rule], "budget": budget}})
        groups = list(network.groups().values())
        session = MaskingSession(network.model, config.pruning, groups, example_inputs=network.inputs)
        session.start()
        randomize_logits(session)
        session.decide()
        return session

    return decide


@pytest.mark.parametrize("metric", COUNTS)
def test_the_small_network_costs_what_the_budget_leaves(make_network: Any, decided: Any, metric: str) -> None:
    network = make_network("residual")
    dense = COUNTS[metric](network.model, network.inputs)
    session = decided(network, {"metric": metric, "ratio": 0.4})
    masks = session.extract()
    session.detach()
    small = shrink(network.model.eval(), masks, network.inputs)
    assert 0.45 * dense <= COUNTS[metric](small, network.inputs) <= 0.6 * dense


def test_channels_count_alike(make_network: Any, decided: Any) -> None:
    session = decided(make_network("residual"), {"metric": "channels", "ratio": 0.5})
    hard = [mask.hard for mask in session.plan.masks.values()]
    assert sum(int(gates.sum()) for gates in hard) == sum(gates.numel() for gates in hard) // 2


def test_in_the_scope_of_a_layer_each_group_has_the_ratio(make_network: Any, decided: Any) -> None:
    session = decided(make_network("residual"), {"metric": "channels", "ratio": 0.5, "scope": "layer"})
    assert all(int(mask.hard.sum()) == mask.hard.numel() // 2 for mask in session.plan.masks.values())


def test_the_latency_is_that_of_a_table(make_network: Any, decided: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def steady(model: nn.Module, inputs: Any) -> LatencyTable:
        """Stand in for the clock, which would decide what can be met: a millisecond a layer, less in proportion."""
        layers = {name: layer_channels(module) for name, module in model.named_modules() if is_matrix(module)}
        grids = {name: LayerGrid((1, n), (1, m), ((0.1, 0.3), (0.3, 1.0))) for name, (n, m) in layers.items()}
        return LatencyTable("steady", grids, 0.5)

    monkeypatch.setattr(metric_budgets, "measure_table", steady)
    session = decided(make_network("residual"), {"metric": "latency", "ratio": 0.2})
    (budget,) = session.plan.budgets
    hard = {name: mask.hard.double() for name, mask in session.plan.masks.items()}
    assert float(budget.model(hard)) <= 0.8 * budget.total


def test_an_entrys_sparse_ratio_is_the_budgets(make_network: Any, decided: Any) -> None:
    (budget,) = decided(make_network("residual"), {"metric": "macs"}, sparse_ratio=0.3).plan.budgets
    assert budget.ratio == 0.3


@pytest.mark.parametrize("metric", ["weights", "parameters", "macs"])
def test_single_weights_are_counted_too(make_network: Any, decided: Any, metric: str) -> None:
    network = make_network("flatten_linear")
    parameters, macs = count_parameters(network.model), macs_of_layers(network.model, network.inputs)
    session = decided(network, {"metric": metric, "ratio": 0.3}, granularity="element")
    closed = {name: int((~mask.hard).sum()) for name, mask in session.plan.masks.items()}
    sizes = {name: mask.hard.numel() for name, mask in session.plan.masks.items()}
    costs = {name: macs.of(name) / sizes[name] if metric == "macs" else 1.0 for name in sizes}
    totals = {"weights": sum(sizes.values()), "parameters": parameters, "macs": macs.total}
    removed = sum(count * costs[name] for name, count in closed.items())
    assert 0 <= removed - (0.3 * totals[metric] - 1) < 1 + max(costs.values())


@pytest.mark.parametrize(
    ("budget", "entry", "message"),
    [
        ({"ratio": 0.5}, {"sparse_ratio": 0.3}, "an entry has a sparse_ratio too"),
        ({"metric": "macs"}, {}, "budget has no ratio"),
        (
            {"metric": "macs", "ratio": 0.5, "scope": "layer"},
            {},
            "scope 'layer': macs are budgeted for the whole network",
        ),
        ({"metric": "channels", "ratio": 0.5}, {"granularity": "element"}, "are no channels"),
        ({"metric": "latency", "ratio": 0.5}, {"granularity": "element"}, "zeros inside of a weight save no time"),
        ({"metric": "parameters", "ratio": 0.99}, {"granularity": "element"}, "the largest possible ratio is 0.9"),
        ({"ratio": 0.5}, {"sparse_threshold": 0.5}, "sparse_threshold"),
        ({"metric": "flops"}, {}, "budget.metric = 'flops'"),
    ],
)
def test_what_contradicts_itself_is_refused(
    make_network: Any, decided: Any, budget: Any, entry: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        decided(make_network("residual"), budget, **entry)


def test_macs_need_inputs(make_network: Any) -> None:
    network = make_network("residual")
    config = PruningConfig.load(
        {"pruning": {"config_list": [{"op_types": ["Conv2d"]}], "budget": {"metric": "macs", "ratio": 0.5}}}
    )
    with pytest.raises(ConfigError, match="pass example_inputs"):
        MaskingSession(network.model, config.pruning, list(network.groups().values()))
    assert torch.is_grad_enabled()


def test_methods_that_manage_their_sparsity_get_the_fraction_of_what_has_gates(make_network: Any) -> None:
    network = make_network("no_bn")
    entry = {"op_names": ["0"], "granularity": "element"}
    pruning = {"config_list": [entry], "budget": {"metric": "parameters", "ratio": 0.2}, "method": "edge_popup"}
    config = PruningConfig.load({"pruning": pruning})
    session = MaskingSession(network.model, config.pruning, example_inputs=network.inputs)
    (mask,), removed = session.plan.masks.values(), 0.2 * count_parameters(network.model)
    assert mask.sparsity == pytest.approx(removed / mask.hard.numel())
    session.start()
    session.decide()
    assert int((~mask.hard).sum()) == round(removed)
