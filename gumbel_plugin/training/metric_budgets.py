"""Budgets over a whole network, in weights, channels, parameters, MACs or latency (`pruning.budget`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.sparsity.budget import Budget, BudgetTerm
from gumbel_plugin.sparsity.controller import BudgetConfig
from gumbel_plugin.sparsity.cost_budget import CostBudget
from gumbel_plugin.sparsity.cost_model import CostModel, count_cost
from gumbel_plugin.sparsity.counting import count_parameters, macs_of_layers
from gumbel_plugin.sparsity.latency import LatencyTable, latency_cost, measure_table
from gumbel_plugin.training.plan import Plan


def budgets_by_metric(
    model: nn.Module, plan: Plan, entries: Sequence[Budget], spec: BudgetConfig, example_inputs: Any
) -> list[Budget]:
    """Return the budgets that `pruning.budget` asks for, in place of those of the entries.

    Args:
        model: The plain model.
        plan: What is gated.
        entries: The budgets that the config list's entries ask for; their terms and limits are taken over.
        spec: The metric, the ratio and the scope.
        example_inputs: One batch, where MACs or the latency are counted.

    Raises:
        ConfigError: If the ratio is said twice or nowhere, or the metric does not fit what is gated.
    """
    ratio, metric = _ratio(entries, spec), spec.metric or "weights"
    terms = [term for budget in entries for term in budget.terms]
    if metric not in ("weights", "channels"):
        return [_of_network(model, plan, terms, metric, ratio, example_inputs)]
    for term in terms if metric == "channels" else ():
        _require_channels(plan, term)
        term.cost = 1.0
    if spec.scope == "layer":
        return [Budget(term.name, [term], ratio) for term in terms]
    return [Budget(f"the selected {metric}", terms, ratio)]


def cost_model(
    model: nn.Module, plan: Plan, metric: str, example_inputs: Any, table: LatencyTable | None = None
) -> CostModel:
    """Return what a network costs under the gates of its groups.

    Args:
        model: The plain model.
        plan: What is gated.
        metric: ``parameters``, ``macs`` or ``latency``.
        example_inputs: One batch.
        table: Measured latencies; measured here without it.

    Raises:
        ConfigError: If there are no inputs to count with.
        TargetError: If the table is of another network.
    """
    _require_inputs(metric, example_inputs)
    if metric == "latency":
        return latency_cost(model, plan.groups, table or measure_table(model, example_inputs))
    return count_cost(model, plan.groups, example_inputs, metric)


def _ratio(entries: Sequence[Budget], spec: BudgetConfig) -> float:
    """Return the one ratio of a budget: its own, or that of all entries."""
    if any(budget.threshold is not None for budget in entries):
        raise ConfigError("pruning.budget: an entry has a sparse_threshold, which no budget can keep to; leave one out")
    own = {budget.ratio for budget in entries}
    if spec.ratio is not None:
        if own != {None}:
            raise ConfigError(
                f"pruning.budget.ratio {spec.ratio:g}: an entry has a sparse_ratio too; say it in one of both places"
            )
        return spec.ratio
    if len(own) != 1 or own == {None}:
        found = ", ".join(sorted(str(ratio) for ratio in own))
        raise ConfigError(f"pruning.budget has no ratio, and the entries' sparse_ratio are {found}: give budget.ratio")
    return float(own.pop() or 0.0)


def _of_network(
    model: nn.Module, plan: Plan, terms: Sequence[BudgetTerm], metric: str, ratio: float, example_inputs: Any
) -> Budget:
    name = f"the network's {metric}"
    grouped = [term.name in plan.groups for term in terms]
    if all(grouped):
        return CostBudget(name, list(terms), ratio, model=cost_model(model, plan, metric, example_inputs))
    if metric == "latency" or any(grouped):
        what = "zeros inside of a weight save no time" if metric == "latency" else "some entries remove whole channels"
        raise ConfigError(f"budget.metric {metric!r}: {what}; give all entries the granularity 'out_channel'")
    total = float(count_parameters(model))
    _require_inputs(metric, example_inputs)
    if metric == "macs":
        macs = macs_of_layers(model, example_inputs)
        total = float(macs.total)
        for term in terms:
            weight = plan.weight_of(term.mask)
            term.cost *= macs.of(term.name) / (1.0 if weight is None else weight.numel())
    gated = sum(term.units * term.cost for term in terms)
    return Budget(name, list(terms), ratio, constant=max(0.0, total - gated))


def _require_inputs(metric: str, example_inputs: Any) -> None:
    if example_inputs is None and metric != "parameters":
        raise ConfigError(f"budget.metric {metric!r} needs inputs to count with: pass example_inputs=")


def _require_channels(plan: Plan, term: BudgetTerm) -> None:
    """Refuse units that are no channels."""
    weight = plan.weight_of(term.mask)
    if term.name in plan.groups or (weight is not None and term.units in weight.shape[:2]):
        return
    raise ConfigError(
        f"budget.metric 'channels': the units of {term.name!r} are no channels; use 'weights', or the granularity "
        "'out_channel'"
    )
