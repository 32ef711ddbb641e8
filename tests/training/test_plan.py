from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.config import PruningConfig, PruningSection
from gumbel_plugin.errors import ConfigError, TargetError
from gumbel_plugin.training.plan import Plan
from gumbel_plugin.training.planner import build_plan, needs_groups
from gumbel_plugin.training.selection import select_modules
from gumbel_torch_pruning import find_groups


class Nested(nn.Module):
    """Names with dots, several types, a name that is the prefix of another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv10 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.block = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.conv10(torch.relu(self.conv1(x))))
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))


IMAGES = torch.randn(2, 3, 8, 8)


def section(*entries: dict[str, Any], **keys: Any) -> PruningSection:
    return PruningConfig.load({"pruning": {"config_list": list(entries), **keys}}).pruning


def plan(model: nn.Module, *entries: dict[str, Any], inputs: Tensor = IMAGES, **keys: Any) -> Plan:
    config = section(*entries, **keys)
    return build_plan(model, config, find_groups(model, inputs) if needs_groups(config) else [], 0)


def element(**keys: Any) -> dict[str, Any]:
    return {"granularity": "element", "sparse_ratio": 0.5, **keys}


# Selection --------------------------------------------------------------------------------------------------------


# A rule, and what it selects, in the model's order (NNI selects the same: tests/gumbel_nni/test_nni_config.py).
SELECTED: list[tuple[dict[str, Any], list[str]]] = [
    ({"op_types": ["Conv2d"]}, ["conv1", "conv10", "block.0", "block.3"]),
    ({"op_types": ["Conv2d", "Linear"]}, ["conv1", "conv10", "block.0", "block.3", "fc1", "fc2"]),
    ({"op_names": ["conv1", "fc2"]}, ["conv1", "fc2"]),
    ({"op_names_re": ["conv1"]}, ["conv1", "conv10"]),  # re.match: conv10 too
    ({"op_names_re": [r"block\..*"], "op_types": ["Conv2d"]}, ["block.0", "block.3"]),
    ({"op_names": ["fc1"], "op_names_re": ["conv.*"]}, ["conv1", "conv10", "fc1"]),
    ({"op_names": ["fc1", "conv1"], "op_types": ["Conv2d"]}, ["conv1"]),
    (
        {"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["conv1", "fc2"]},
        ["conv10", "block.0", "block.3", "fc1"],
    ),
    ({"op_types": ["Conv2d", "Linear"], "exclude_op_names_re": ["block", ".*1$"]}, ["conv10", "fc2"]),
    (
        {"op_types": ["Conv2d", "Linear"], "exclude_op_types": ["Linear"]},
        ["conv1", "conv10", "block.0", "block.3"],
    ),
    ({"op_names_re": [".*"], "op_types": ["BatchNorm2d", "Linear"], "exclude_op_names": ["fc1"]}, ["block.1", "fc2"]),
]
# Where one of several types or patterns matches nothing: what is selected nevertheless, and what a warning names.
PARTLY_SELECTED: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (
        {"op_types": ["Conv2d", "Conv3d"]},
        ["conv1", "conv10", "block.0", "block.3"],
        ["op_types: 'Conv3d'; did you mean 'Conv2d'?"],
    ),
    (
        {"op_types": ["Conv2d", "Linaer"]},
        ["conv1", "conv10", "block.0", "block.3"],
        ["op_types: 'Linaer'; did you mean 'Linear'?"],
    ),
    ({"op_names": ["fc1"], "op_types": ["LSTM", "Linear"]}, ["fc1"], ["op_types: 'LSTM'"]),
    ({"op_names": ["fc1"], "op_names_re": ["convv.*"]}, ["fc1"], ["op_names_re: 'convv.*'"]),
    ({"op_names_re": ["convv.*", "conv.*"]}, ["conv1", "conv10"], ["op_names_re: 'convv.*'"]),
    ({"op_types": ["Conv2d", "Linear"], "op_names_re": ["conv.*"]}, ["conv1", "conv10"], []),
]


@pytest.mark.parametrize(("rule", "expected"), SELECTED)
def test_a_rule_selects_layers_in_the_models_order(rule: dict[str, Any], expected: list[str]) -> None:
    assert list(select_modules(Nested(), section(rule).config_list[0])) == expected


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"op_names": ["conv_1"]}, "op_names: 'conv_1' matches no module of the model; did you mean 'conv1'"),
        ({"op_types": ["Conv2D"]}, "op_types: 'Conv2D' matches no module of the model; did you mean 'Conv2d'"),
        ({"op_types": ["Conv4d", "Conv3d"]}, "op_types: 'Conv4d' matches no module"),
        ({"op_names_re": ["a.*", "b[0-9]"]}, r"op_names_re: 'a\.\*' matches no module"),
        ({"op_names_re": ["convolution.*"]}, r"op_names_re: 'convolution\.\*' matches no module"),
        ({"op_types": ["Conv2d"], "exclude_op_names": ["conv_1"]}, "exclude_op_names: 'conv_1' matches no module"),
        ({"op_types": ["Conv2d"], "exclude_op_types": ["Linaer"]}, "exclude_op_types: 'Linaer' matches .* 'Linear'"),
        ({"op_types": ["Conv2d"], "exclude_op_names_re": ["convv.*"]}, r"exclude_op_names_re: 'convv\.\*' matches no"),
        ({"op_names": ["fc1"], "op_types": ["Conv2d"]}, "selects no module: its keys exclude each other"),
        ({"op_types": ["ReLU"]}, r"'block\.2' is a ReLU, which has no weight to mask"),
    ],
)
def test_what_matches_nothing_is_an_error_with_the_nearest(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        select_modules(Nested(), section(rule).config_list[0])


@pytest.mark.parametrize(("rule", "expected", "words"), PARTLY_SELECTED)
def test_one_of_several_types_or_patterns_may_match_nothing_with_one_warning(
    rule: dict[str, Any], expected: list[str], words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    entry = {**rule, "granularity": "element", "sparse_ratio": 0.5}
    model = Nested()
    with caplog.at_level(logging.WARNING):
        plan = build_plan(model, section(entry), [], seed=0)
    assert set(plan.masks) == set(expected)
    skipped = [message for message in caplog.messages if "were skipped" in message]
    assert len(skipped) == (1 if words else 0)
    assert all(word in skipped[0] for word in words)


def test_types_that_only_other_models_have_may_be_excluded() -> None:
    rule = section({"op_types": ["Conv2d"], "exclude_op_types": ["Embedding"]}).config_list[0]
    assert select_modules(Nested(), rule)


# Layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [("element", (6, 3, 3, 3)), ("kernel", (6, 3, 1, 1)), ("in_channel", (1, 3, 1, 1)), ([3, 1, -1, -1], (2, 3, 1, 1))],
)
def test_a_layers_gates_have_the_granularitys_shape(granularity: Any, shape: tuple[int, ...]) -> None:
    model = Nested()
    made = plan(model, element(op_names=["conv1"], granularity=granularity))
    mask = made.masks["conv1"]
    assert mask.shape == shape
    assert made.gated_layers["conv1"].mask is mask
    assert made.gated_layers["conv1"].columns is None
    (term,) = made.budgets[0].terms
    assert term.cost * term.units == model.conv1.weight.numel()


def test_a_granularity_that_does_not_fit_a_layer_is_an_error() -> None:
    with pytest.raises(ConfigError, match="does not tile"):
        plan(Nested(), element(op_types=["Linear"], granularity=[4, 4]))


def test_every_layer_has_a_budget_of_its_own_unless_they_share_one() -> None:
    alone = plan(Nested(), element(op_types=["Linear"]))
    assert [(budget.name, len(budget.terms), budget.ratio) for budget in alone.budgets] == [
        ("fc1", 1, 0.5),
        ("fc2", 1, 0.5),
    ]
    entries = [element(op_types=["Linear"], global_group_id=0), element(op_types=["Conv2d"], global_group_id=0)]
    shared = plan(Nested(), *entries)
    assert [len(budget.terms) for budget in shared.budgets] == [6]
    assert "0" in shared.budgets[0].name


def test_limits_reach_the_members() -> None:
    made = plan(Nested(), element(op_types=["Linear"], max_sparse_ratio=0.75, min_sparse_ratio=0.25))
    assert [(m.min_ratio, m.max_ratio) for budget in made.budgets for m in budget.terms] == [(0.25, 0.75)] * 2
    threshold = plan(Nested(), {"op_types": ["Linear"], "granularity": "element", "sparse_threshold": 0.3})
    assert [(budget.ratio, budget.threshold) for budget in threshold.budgets] == [(None, 0.3)] * 2


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"sparse_ratio": 0.5}, {"sparse_ratio": 0.6}, r"global_group_id 'a': .* sparse_ratio 0\.5 and 0\.6"),
        ({"sparse_ratio": 0.5}, {"sparse_threshold": 0.6}, r"global_group_id 'a'"),
        ({"sparse_threshold": 0.5}, {"sparse_threshold": 0.6}, r"sparse_threshold 0\.5 and 0\.6"),
    ],
)
def test_a_shared_budget_has_one_ratio(first: dict[str, Any], second: dict[str, Any], message: str) -> None:
    common = {"granularity": "element", "global_group_id": "a"}
    with pytest.raises(ConfigError, match=message):
        plan(Nested(), {"op_names": ["fc1"], **common, **first}, {"op_names": ["fc2"], **common, **second})


@pytest.mark.parametrize(
    "entries",
    [
        [element(op_types=["Linear"]), element(op_names=["fc1"])],
        [{"op_types": ["Conv2d"]}, {"op_names": ["conv1"]}],
        [{"op_types": ["Conv2d"]}, element(op_names=["conv1"])],
        [element(op_names=["conv1"]), {"op_types": ["Conv2d"]}],
    ],
    ids=["element twice", "channels twice", "channels, element", "element, channels"],
)
def test_a_layer_in_two_entries_is_an_error(entries: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"'(fc1|conv1)' is selected by two config_list entries; exclude it from one"):
        plan(Nested(), *entries)


def test_a_group_called_after_a_layer_that_is_masked_by_itself_is_an_error(make_network: Callable[..., Any]) -> None:
    network = make_network("residual")
    name = next(n for n, g in network.groups().items() if len({p.module for p in g.producers}) > 2)  # conv1 and conv3
    other = {"conv1": "conv3", "conv3": "conv1"}[name]
    for entries in (
        [element(op_names=[name]), {"op_names": [other]}],
        [{"op_names": [other]}, element(op_names=[name])],
    ):
        with pytest.raises(ConfigError, match=f"'{name}' is masked by its own entry and as part of a channel group"):
            plan(network.model, *entries, inputs=network.inputs)


# Shared gates -----------------------------------------------------------------------------------------------------


def twins() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
    )


def test_layers_with_one_dependency_group_id_share_their_gates() -> None:
    made = plan(
        twins(),
        element(op_names=["2", "4"], dependency_group_id="a", global_group_id=1),
        element(op_names=["6"], global_group_id=1),
    )
    assert made.gated_layers["2"].mask is made.gated_layers["4"].mask is made.masks["2"]
    assert "4" not in made.masks
    assert [(m.name, m.cost) for m in made.budgets[0].terms] == [("2", 2.0), ("6", 1.0)]  # one gate, two weights


def test_tied_entries_may_be_two() -> None:
    made = plan(twins(), *(element(op_names=[n], dependency_group_id=7) for n in "24"))
    assert list(made.masks) == ["2"]


def test_groups_with_one_dependency_group_id_share_their_gates() -> None:
    made = plan(
        twins(), {"op_names": ["0", "2"], "dependency_group_id": "a", "sparse_ratio": 0.5}, inputs=torch.randn(2, 4)
    )
    assert len(made.masks) == len(made.groups) == len(made.budgets) == 1
    (group,) = made.groups.values()
    assert {part.module for part in group.producers} == {"0", "2"}
    assert {part.module for part in group.consumers} == {"2", "4"}
    (mask,) = made.masks.values()
    assert made.gated_layers["2"].columns.masks == made.gated_layers["4"].columns.masks == [mask]
    assert made.budgets[0].terms[0].cost == 4 + 6


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (element(op_names=["2", "6"]), r"'6' has gates of shape \(3, 6\), '2' of shape \(6, 6\)"),
        ({"op_types": ["Linear"], "exclude_op_names": ["6"]}, None),
    ],
)
def test_gates_of_different_shapes_cannot_be_shared(entry: dict[str, Any], message: str | None) -> None:
    tied = {**entry, "dependency_group_id": "a"}
    if message:
        with pytest.raises(ConfigError, match=message):
            plan(twins(), tied)
    else:
        model = nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)
        )
        with pytest.raises(ConfigError, match=r"dependency_group_id 'a': .* they cannot share them"):
            plan(model, tied, inputs=torch.randn(2, 4))


def test_tied_entries_agree_on_the_budget() -> None:
    entries = [element(op_names=[n], dependency_group_id=7, sparse_ratio=r) for n, r in (("2", 0.5), ("4", 0.6))]
    with pytest.raises(ConfigError, match="'4' and '2' share their gates, so their entries must agree on sparse_ratio"):
        plan(twins(), *entries)


# Groups -----------------------------------------------------------------------------------------------------------


def test_every_group_with_a_selected_producer_is_gated_at_its_consumers(network: Any, section: Any) -> None:
    groups = network.groups()
    made = build_plan(network.model, section(network.model, sparse_ratio=0.5), list(groups.values()), 0)
    assert set(made.masks) == set(made.groups) == set(groups)
    assert all(made.masks[name].shape == (group.size,) for name, group in groups.items())
    consumers = {part.module for group in groups.values() for part in group.consumers}
    assert set(made.gated_layers) == consumers
    for gated in made.gated_layers.values():
        assert gated.mask is None
        feeding = {name for name, g in groups.items() if gated.name in {p.module for p in g.consumers}}
        assert {id(m) for m in gated.columns.masks} == {id(made.masks[name]) for name in feeding}


def test_a_unit_costs_the_weights_that_compute_it(make_network: Callable[..., Any]) -> None:
    network = make_network("residual")
    groups = network.groups()
    made = plan(network.model, {"op_types": ["Conv2d"]}, inputs=network.inputs)
    costs = {m.name: m.cost for budget in made.budgets for m in budget.terms}
    tied = next(name for name, g in groups.items() if len(g.producers) == 4)
    assert costs == {tied: 3 * 9 + 8 * 9, "conv2": 6 * 9}


def test_a_group_that_reaches_the_output_is_never_gated_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        made = plan(Nested(), {"op_types": ["Linear"]})
    assert set(made.masks) == {"fc1"}
    assert [(r.levelname, r.message) for r in caplog.records if "fc2" in r.message] == [
        ("WARNING", "group fc2 is not gated: it reaches the network's output")
    ]


def test_only_the_output_layer_is_nothing_to_gate() -> None:
    with pytest.raises(TargetError, match="nothing would be gated"):
        plan(Nested(), {"op_names": ["fc2"]})


@pytest.mark.parametrize("excluded", ["conv1", "bn3"])
def test_an_excluded_producer_keeps_its_whole_group(
    excluded: str, make_network: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    network = make_network("residual")
    with caplog.at_level(logging.INFO):
        made = plan(network.model, {"op_types": ["Conv2d"], "exclude_op_names": [excluded]}, inputs=network.inputs)
    assert set(made.masks) == {"conv2"}
    assert any(f"the configuration excludes {excluded}" in r.message for r in caplog.records)


def test_excluded_from_one_entry_to_have_one_of_its_own() -> None:
    entries = [
        {"op_types": ["Conv2d"], "exclude_op_names": ["conv1"], "sparse_ratio": 0.5},
        {"op_names": ["conv1"], "sparse_ratio": 0.3},
    ]
    made = plan(Nested(), *entries)
    ratios = {budget.name: budget.ratio for budget in made.budgets}
    assert ratios["conv1"] == 0.3
    assert ratios["conv10"] == 0.5


def test_a_selected_normalisation_selects_its_group(make_network: Callable[..., Any]) -> None:
    network = make_network("conv_bn_relu")
    made = plan(network.model, {"op_names": ["4"], "sparse_ratio": 0.5}, inputs=network.inputs)
    assert set(made.masks) == {"3"}


def test_no_entries_are_an_error() -> None:
    with pytest.raises(ConfigError, match="config_list is empty"):
        plan(Nested())


# Weights that a mask cannot be written into -----------------------------------------------------------------------


def test_a_module_with_two_names_is_gated_once() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared, "last": nn.Linear(4, 2)})
    made = plan(model, element(op_types=["Linear"]))
    assert set(made.masks) == {"first", "last"}
    assert set(plan(model, element(op_names=["second"])).masks) == {"first"}


def test_a_weight_that_two_layers_share_is_an_error() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    model["second"].weight = model["first"].weight
    with pytest.raises(TargetError, match="'first' shares its weight with 'second'"):
        plan(model, element(op_names=["first"]))


def test_a_computed_weight_is_an_error() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(TargetError, match="'0': its weight is computed"):
        plan(model, element(op_names=["0"]))


def test_planning_leaves_the_model_alone(network: Any, section: Any) -> None:
    before = {name: (tensor.clone(), tensor) for name, tensor in network.model.state_dict(keep_vars=True).items()}
    build_plan(network.model, section(network.model), list(network.groups().values()), 0)
    after = network.model.state_dict(keep_vars=True)
    assert all(after[name] is tensor and torch.equal(tensor, copy) for name, (copy, tensor) in before.items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.model.modules())


def test_masks_differ_in_their_noise_and_share_its_source(network: Any, section: Any) -> None:
    made = build_plan(network.model, section(network.model), list(network.groups().values()), 3)
    masks = made.learned()
    assert len({mask.stream for mask in masks}) == len(masks)
    assert all(mask.noise is made.noise for mask in masks)
    assert sum(mask.hard.numel() for mask in masks) == sum(mask.hard.numel() for mask in made.masks.values())
    assert made.noise.seed == 3
