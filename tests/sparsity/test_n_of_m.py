"""N of every M weights along a layer's inputs: the projection, and masks that are learned, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gumbel_plugin.config import PruningConfig
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.shrinking.mask_file import load_masks, save_masks
from gumbel_plugin.sparsity.types import ELEMENT, NofM, granularity_of
from gumbel_plugin.storage.yaml_files import parse_yaml
from gumbel_plugin.training.session import MaskingSession

METHODS = [
    "gumbel_softmax",
    "supermask",
    "hard_concrete",
    "edge_popup",
    "reparametrization",
    "gibbs",
    "magnitude",
    "random",
]


def groups_of(mask: Tensor, m: int, dimension: int = 1) -> Tensor:
    """Return the consecutive groups along a dimension, one a row."""
    return mask.movedim(dimension, -1).reshape(-1, m)


# The type -----------------------------------------------------------------------------------------------------------


def test_a_pair_of_numbers_names_it_and_a_list_stays_a_block() -> None:
    assert granularity_of("2:4") == NofM(2, 4)
    assert granularity_of("2:4") not in (ELEMENT, granularity_of([2, 4]), NofM(1, 4))
    assert granularity_of("2:4").density == 0.5
    assert granularity_of([2, 4]).latent_shape((4, 8)) == (2, 2)


@given(st.data())
def test_the_n_highest_of_every_m_stay(data: st.DataObject) -> None:
    m = data.draw(st.integers(2, 5))
    n = data.draw(st.integers(1, m - 1))
    dimension = data.draw(st.integers(0, 1))
    shape = [data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), 2]
    shape[dimension] *= m
    scores = torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=torch.Size(shape).numel(),
                                             max_size=torch.Size(shape).numel()))).float().reshape(shape)  # fmt: skip
    kept = NofM(n, m, dimension).project(scores, 0.9)
    assert kept.dtype == torch.bool
    assert kept.shape == scores.shape
    for group, own in zip(groups_of(kept, m, dimension), groups_of(scores, m, dimension), strict=True):
        order = sorted(range(m), key=lambda i: (own[i].item(), i))  # of equal ones the first go
        assert [i for i in range(m) if group[i]] == sorted(order[m - n :])


@pytest.mark.parametrize(
    ("word", "shape", "rule"),
    [
        ("2:4", (16, 3, 3, 3), r"'2:4' does not fit .*\(16, 3, 3, 3\).* is 3; the nearest m is 3 \('2:3'\)"),
        ("2:4", (5, 6), r"is 6; the nearest m is 3 \('2:3'\)"),
        ("2:4", (8, 1, 3, 3), "is 1; exclude the layer"),
        ("2:4", (8,), "is 1; exclude the layer"),
    ],
)
def test_an_input_dimension_that_m_does_not_divide_is_an_error(word: str, shape: tuple[int, ...], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        granularity_of(word).latent_shape(shape)


@pytest.mark.parametrize("word", ["4:2", "0:4", "4:4", "a:b", "2:4:8", "2 : 4", "-2:4"])
def test_what_is_no_n_of_m_is_an_error(word: str) -> None:
    with pytest.raises(ConfigError, match="granularity"):
        granularity_of(word)


# Entries of a configuration -----------------------------------------------------------------------------------------


def entry(**keys: Any) -> Any:
    return PruningConfig.load([{"op_types": ["Linear"], "granularity": "2:4", **keys}])


def test_the_ratio_follows_from_n_and_m() -> None:
    for config in (entry(), entry(sparse_ratio=0.5), PruningConfig.load(parse_yaml(entry().to_yaml()))):
        assert config.pruning.config_list[0].sparse_ratio == 0.5
        assert config.pruning.config_list[0].granularity == "2:4"
    assert entry(granularity="1:3").pruning.config_list[0].sparse_ratio == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "keys", [{"sparse_ratio": 0.6}, {"sparse_threshold": 0.3}, {"min_sparse_ratio": 0.1}, {"max_sparse_ratio": 0.9}]
)
def test_another_ratio_is_an_error(keys: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(keys))}.*'2:4' removes 0.5 of every layer; leave it out"):
        entry(**keys)


def test_yaml_reads_it_as_a_number_without_quotes() -> None:
    with pytest.raises(ConfigError, match=r'YAML.*"2:4"'):
        PruningConfig.load(parse_yaml("pruning: {config_list: [{op_types: [Linear], granularity: 2:4}]}"))


# Masks that are learned ---------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (8, 1, 1)), nn.Upsample((3, 3)), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(12, 4, 2, groups=1), nn.Flatten(1), nn.Linear(64, 4),
    )  # fmt: skip


NETWORKS = {"mlp": (mlp, ["Linear"]), "convolutions": (convolutions, ["Conv2d", "ConvTranspose2d"])}


def learned(method: str, network: str, seed: int = 0, steps: int = 12) -> tuple[nn.Sequential, MaskingSession]:
    torch.manual_seed(seed)
    build, types = NETWORKS[network]
    model = build()
    weights = {"weights": "frozen"} if method == "edge_popup" else {}
    pruning = {"method": method, "config_list": [{"op_types": types, "granularity": "2:4"}], **weights}
    session = MaskingSession(model, PruningConfig.load({"pruning": pruning}).pruning)
    session.start(steps)
    weights_of = session.weight_parameters()
    optimizers = [*session.optimizers(), *([torch.optim.Adam(weights_of, 0.01)] if weights_of else [])]
    inputs, labels = torch.randn(32, 8), torch.randint(4, (32,))
    for _ in range(steps):
        loss = F.cross_entropy(model(inputs), labels) + session.loss()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        session.step()
    return model, session


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_exactly_two_of_every_four_inputs_stay(method: str, network: str, tmp_path: Path) -> None:
    model, session = learned(method, network)
    scores = {name: mask.scores(model.get_submodule(name).weight) for name, mask in session.plan.masks.items()}
    masks = session.extract()
    assert len(masks) == len(scores) >= 2
    for name, targets in masks.items():
        layer = model.get_submodule(name)
        dimension = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
        assert bool((groups_of(targets["weight"], 4, dimension).sum(1) == 2).all())
        assert bool((layer.weight[targets["weight"] == 0] == 0).all())
        kept, own = groups_of(targets["weight"], 4, dimension), groups_of(scores[name], 4, dimension)
        closed = own.masked_fill(kept.bool(), float("-inf")).amax(1)
        assert bool((own.masked_fill(~kept.bool(), float("inf")).amin(1) >= closed).all())
    save_masks(tmp_path / "masks.safetensors", masks)
    fresh = learned(method, network, seed=1, steps=1)[1]
    fresh.fix_masks(load_masks(tmp_path / "masks.safetensors"))
    for name, targets in fresh.masks().items():
        assert torch.equal(targets["weight"], masks[name]["weight"])


@pytest.mark.slow
def test_the_gates_are_steered_to_the_density() -> None:
    """Before any cut: the budget is not met by the projection alone."""
    _, session = learned("gumbel_softmax", "mlp", steps=300)
    assert session.status().sparsity == pytest.approx(0.5, abs=0.1)


def test_a_state_goes_on_where_it_was() -> None:
    session = learned("gumbel_softmax", "mlp")[1]
    other = learned("gumbel_softmax", "mlp", steps=1)[1]
    other.load_state_dict(session.state_dict())
    for mine, theirs in zip(other.plan.masks.values(), session.plan.masks.values(), strict=True):
        assert torch.equal(mine.scores(None), theirs.scores(None))
    assert torch.equal(other.extract()["0"]["weight"], session.extract()["0"]["weight"])


def test_a_shared_budget_takes_the_rest_from_the_others() -> None:
    torch.manual_seed(0)
    model = mlp()
    shared = {"sparse_ratio": 0.5, "global_group_id": 1}
    rules = [
        {"op_names": ["0"], "granularity": "2:4", **shared},
        {"op_names": ["2", "4"], "granularity": "element", **shared},
    ]
    pruning = PruningConfig.load({"pruning": {"method": "magnitude", "config_list": rules}}).pruning
    session = MaskingSession(model, pruning)
    session.start(1)
    masks = session.extract()
    assert bool((groups_of(masks["0"]["weight"], 4).sum(1) == 2).all())
    others = torch.cat([masks[name]["weight"].flatten() for name in ("2", "4")])
    assert int(others.sum()) == others.numel() // 2
