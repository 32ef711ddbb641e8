"""Latency tables: measured, saved, read again, and used as a budget. Nothing depends on how fast the machine is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.errors import ConfigError, DataError, TargetError
from gumbel_plugin.layers.geometry import layer_channels
from gumbel_plugin.sparsity import latency as latency_module
from gumbel_plugin.sparsity.latency import LatencyTable, LayerGrid, latency_cost, measure_table
from tests.graph.exact_steps import set_gates

INPUTS = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Every kind of layer that is measured in its own way."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.bn = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.grouped = nn.Conv2d(width, 24, 1, groups=4)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.twice = nn.Conv2d(12, 12, 1)
        self.hidden, self.head = nn.Linear(12, 10), nn.Linear(10, 5)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(torch.relu(self.depthwise(torch.relu(self.bn(self.first(x))))))
        x = self.twice(torch.relu(self.twice(torch.relu(self.up(torch.relu(x))))))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


def synthetic(
    model: nn.Module, time: Callable[[int, int], float] = lambda i, o: 0.01 * i * o + 0.1 * o, rest: float = 1.0
) -> LatencyTable:
    """Return a table whose times follow a formula."""
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "in_channels") or hasattr(module, "in_features"):
            inputs, outputs = (tuple(sorted({1, max(1, width // 2), width})) for width in layer_channels(module))
            layers[name] = LayerGrid(inputs, outputs, tuple(tuple(time(i, o) for o in outputs) for i in inputs))
    return LatencyTable("a formula", layers, rest)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 20, 3),
        nn.ReLU(),
        nn.Conv2d(20, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 4, 1),
    )


# Measuring ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> LatencyTable:
    return measure_table(Net(), INPUTS, min_run_time=1e-4)


def test_every_layer_that_is_called_is_measured(measured):
    assert set(measured.layers) == {"first", "depthwise", "grouped", "up", "twice", "hidden", "head"}
    assert measured.layers["first"].inputs == (1, 2, 3)
    assert measured.layers["first"].outputs == (2, 4, 8, 16)
    assert measured.layers["depthwise"].inputs == (16,)  # its two sides are one
    assert measured.layers["grouped"].outputs == (4, 8, 12, 24)  # multiples of its four groups
    assert measured.layers["up"].inputs == (3, 6, 12, 24)
    assert measured.layers["hidden"].inputs == (2, 3, 6, 12)
    assert measured.rest > 0
    assert "threads" in measured.device


def test_times_are_positive_and_never_fall_with_the_width(measured):
    for grid in measured.layers.values():
        times = torch.tensor(grid.milliseconds)
        assert bool((times > 0).all())
        assert bool((times.diff(dim=0) >= 0).all())
        assert bool((times.diff(dim=1) >= 0).all())


def test_a_disturbed_measurement_makes_no_other_width_slow(monkeypatch):
    times = iter([9.0, 2.0, 3.0, 4.0] * 3)  # the narrowest of four widths was disturbed, for each number of inputs
    monkeypatch.setattr(latency_module, "_milliseconds", lambda call, min_run_time: next(times))
    grid = measure_table(nn.Sequential(nn.Conv2d(3, 16, 3)), INPUTS).layers["0"]
    torch.testing.assert_close(torch.tensor(grid.scaled_to(4.0).milliseconds), torch.tensor([[2.0, 2.0, 3.0, 4.0]] * 3))


def test_measuring_leaves_the_model_as_it_is():
    model = Net()
    model.bn.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    measure_table(model, INPUTS, min_run_time=1e-4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [name for name, module in model.named_modules() if not module.training] == ["bn"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert (model.first.out_channels, model.depthwise.groups) == (16, 16)


def test_a_run_time_is_positive():
    with pytest.raises(ConfigError, match="min_run_time is 0"):
        measure_table(Net(), INPUTS, min_run_time=0)


def test_a_layer_called_twice_counts_twice(measured):
    grid = LayerGrid((1, 2), (3,), ((1.0,), (2.0,)))
    assert grid.plus(grid) == LayerGrid((1, 2), (3,), ((2.0,), (4.0,)))
    assert grid.scaled_to(5.0) == LayerGrid((1, 2), (3,), ((2.5,), (5.0,)))


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_table_comes_back_from_its_file(measured, tmp_path):
    path = tmp_path / "latency.json"
    measured.save(path)
    assert LatencyTable.load(path) == measured
    assert [file.name for file in tmp_path.iterdir()] == ["latency.json"]
    measured.save(str(path))  # over an older one
    assert LatencyTable.load(str(path)) == measured


def _without(key: str) -> Callable[[dict], dict]:
    return lambda content: {name: value for name, value in content.items() if name != key}


def _with_layer(**changes: object) -> Callable[[dict], dict]:
    grid = {"inputs": [1, 2], "outputs": [3], "milliseconds": [[1.0], [2.0]], **changes}
    return lambda content: {**content, "layers": {"first": grid}}


DAMAGES: dict[str, Callable[[dict], object]] = {
    "no format": _without("format"),
    "another format": lambda content: {**content, "format": "gumbel-plugin-latency-99"},
    "no layers": _without("layers"),
    "no rest": _without("rest"),
    "a list": lambda content: [content],
    "layers in a list": lambda content: {**content, "layers": []},
    "a missing row": _with_layer(milliseconds=[[1.0]]),
    "a time that is a word": _with_layer(milliseconds=[["fast"], [2.0]]),
    "a time that is not a number": _with_layer(milliseconds=[[float("nan")], [2.0]]),
    "a negative time": _with_layer(milliseconds=[[-1.0], [2.0]]),
    "descending widths": _with_layer(inputs=[2, 1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "latency.json"
    synthetic(Net()).save(path)
    path.write_text(json.dumps(DAMAGES[damage](json.loads(path.read_text()))))
    with pytest.raises(DataError, match=r"latency\.json' cannot be read"):
        LatencyTable.load(path)


@pytest.mark.parametrize("content", [None, b"", b'{"format":', b"\xff\xfe\x00"])
def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path, content):
    path = Path(tmp_path / "latency.json")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        LatencyTable.load(path)


# Predicting -----------------------------------------------------------------------------------------------------------


def gates_of(pruner: GumbelGroupPruner, value: float) -> dict[str, Tensor]:
    return {name: torch.full((group.size,), value) for name, group in pruner.session.plan.groups.items()}


def test_at_the_measured_widths_it_predicts_what_was_measured():
    model = chain()
    table = synthetic(model)
    groups = {group.name: group for group in GumbelGroupPruner(model, INPUTS).session.plan.groups.values()}
    cost = latency_cost(model, groups, table)
    whole = {name: torch.ones(group.size) for name, group in groups.items()}
    assert float(cost(whole)) == pytest.approx(1.0 + sum(grid.milliseconds[-1][-1] for grid in table.layers.values()))
    half = {**whole, "2": (torch.arange(20) < 10).float()}
    expected = float(cost(whole)) - (0.01 * 16 * 10 + 0.1 * 10) - 0.01 * 10 * 12
    assert float(cost(half)) == pytest.approx(expected)


def test_between_the_measured_widths_it_interpolates_and_outside_it_is_constant():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    hidden = LayerGrid((2, 8), (2,), ((1.0,), (4.0,)))
    table = LatencyTable("", {"0": LayerGrid((4,), (2, 8), ((1.0, 7.0),)), "2": hidden}, 0.5)
    groups = {group.name: group for group in GumbelGroupPruner(model, torch.randn(2, 4)).session.plan.groups.values()}
    cost = latency_cost(model, groups, table)
    for kept, expected in ((8, 11.0), (5, 4.0 + 2.5), (2, 2.0), (1, 2.0)):
        gates = (torch.arange(8) < kept).float().requires_grad_()
        predicted = cost({"0": gates})
        assert float(predicted.detach()) == pytest.approx(0.5 + expected)
        predicted.backward()
        slope = 0.0 if kept == 1 else 6 / 6 + 3 / 6
        torch.testing.assert_close(gates.grad, torch.full((8,), slope))


def test_layers_that_are_not_gated_count_at_their_widths():
    model = chain()
    table = synthetic(model)
    everything = GumbelGroupPruner(chain(), INPUTS, target="latency", latency_table=table)
    part = GumbelGroupPruner(model, INPUTS, target="latency", latency_table=table, ignored_layers=[model[2]])
    totals = [pruner.session.plan.budgets[0].total for pruner in (everything, part)]
    assert totals[0] == pytest.approx(totals[1])


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_the_budget_is_met_in_terms_of_the_table(ratio, steps):
    model = chain()
    table = synthetic(model)
    pruner = GumbelGroupPruner(
        model, INPUTS, target="latency", latency_table=table, pruning_ratio=ratio, iterative_steps=steps
    )
    budget = pruner.session.plan.budgets[0]
    dense, one_unit = budget.total, max(0.0, *(0.01 * (3 + 20) + 0.1, 0.01 * (16 + 12) + 0.1, 0.01 * (20 + 4) + 0.1))
    for number in range(steps):
        set_gates(pruner, number)
        pruner.step()
    predicted = float(latency_cost(model, {}, table)(dict(_no_gates())))
    assert predicted <= dense * (1 - ratio) * (1 + 1e-6)
    assert predicted > dense * (1 - ratio) - one_unit


def _no_gates() -> list[tuple[str, Tensor]]:
    return [("none", torch.ones(1))]


def test_the_table_is_measured_where_none_is_given():
    pruner = GumbelGroupPruner(chain(), INPUTS, target="latency", pruning_ratio=0.0)
    budget = pruner.session.plan.budgets[0]
    assert budget.total > 0
    assert sorted(budget.model.widths.layers) == ["0", "2", "4", "6"]
    assert float(budget.usage([torch.ones(term.units) for term in budget.terms])) == pytest.approx(1.0)


def test_a_latency_below_what_stays_is_refused():
    model = chain()
    with pytest.raises(ConfigError, match=r"latency cannot be met.*9\d\.\d% cannot be gated"):
        GumbelGroupPruner(
            model, INPUTS, target="latency", latency_table=synthetic(model, rest=1000.0), pruning_ratio=0.5
        )


def _rename(table: LatencyTable) -> LatencyTable:
    layers = dict(table.layers)
    layers["7"] = layers.pop("6")
    return LatencyTable(table.device, layers, table.rest)


def _drop(table: LatencyTable) -> LatencyTable:
    layers = dict(table.layers)
    del layers["2"]
    return LatencyTable(table.device, layers, table.rest)


def _narrow(table: LatencyTable) -> LatencyTable:
    layers = {**table.layers, "2": LayerGrid((8,), (20,), ((1.0,),))}
    return LatencyTable(table.device, layers, table.rest)


def _extra(table: LatencyTable) -> LatencyTable:
    return LatencyTable(table.device, {**table.layers, "2.conv": table.layers["2"]}, table.rest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, "lacks layer '6'"),
        (_drop, "lacks layer '2'"),
        (_narrow, "'2' with up to 8 and 20 channels, this network has it with 16 and 20"),
        (_extra, "has layer '2.conv', which this network lacks"),
    ],
)
def test_a_table_of_another_network_is_refused(change, message):
    model = chain()
    keys = list(model.state_dict())
    with pytest.raises(TargetError, match=message):
        GumbelGroupPruner(model, INPUTS, target="latency", latency_table=change(synthetic(model)))
    assert list(model.state_dict()) == keys
