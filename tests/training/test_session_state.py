"""States, limits and refusals of sessions on the smallest networks, across methods."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.config import PruningConfig
from gumbel_plugin.errors import ConfigError
from gumbel_plugin.training.agreement import measure_agreement, set_consensus_from
from gumbel_plugin.training.session import MaskingSession
from gumbel_torch_pruning import find_groups


def session_on(model: nn.Module, groups: Any = (), rule: dict[str, Any] | None = None, **keys: Any) -> MaskingSession:
    entry = rule or {"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 0.5}
    section = PruningConfig.load({"pruning": {"config_list": [entry], **keys}}).pruning
    return MaskingSession(model, section, groups)


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3, bias=False))


class TestStates:
    @pytest.mark.parametrize("rescale", ["learned", "dynamic"])
    @pytest.mark.parametrize("method", ["gumbel_softmax", "supermask", "edge_popup"])
    def test_a_scale_that_was_written_into_the_weights_does_not_act_again(self, rescale: str, method: str) -> None:
        keys = {"method": method, "rescale": rescale, "weights": "frozen"}
        first, x = layer(), torch.randn(2, 4)
        session = session_on(first, **keys)
        session.start(10)
        for scale in session.scale_parameters():
            scale.data.fill_(1.7)
        session.extract()
        second = layer()
        other = session_on(second, **keys)
        other.start(10)
        second[0].weight.data.copy_(first[0].weight)
        other.load_state_dict(session.state_dict())
        assert torch.equal(second.eval()(x), first.eval()(x))

    def test_frozen_weights_are_frozen_again(self) -> None:
        session = session_on(layer(), weights="frozen")
        session.start(10)
        assert not session.weight_parameters()
        session.detach()
        assert len(list(session.model.parameters())) == len(session.weight_parameters()) == 1
        session.attach()
        assert not session.weight_parameters()

    def test_schedules_begin_where_the_learning_does(self) -> None:
        session = session_on(layer(), method="gibbs")
        session.start(None)  # in as many steps as usual
        (mask,) = session.plan.masks.values()
        beta = mask.beta
        session.step()
        assert mask.beta > beta

    @pytest.mark.parametrize("method", ["gibbs", "gumbel_softmax", "reparametrization"])
    def test_nothing_is_closed_before_the_learning(self, method: str) -> None:
        session = session_on(layer(), method=method, phases={"dense": 0.5})
        session.start(10)
        assert session.status().sparsity == session.status().soft_sparsity == 0

    def test_the_length_may_be_told_later(self) -> None:
        rules = [{"op_types": ["Linear"], "granularity": "element"}]
        session = MaskingSession(layer(), {"pruning": {"config_list": rules, "phases": {"dense": 0.5}}})
        session.start(None)
        assert session.status().phase == "learning"
        session.expect(10)
        assert session.status().phase == "open"
        for _ in range(5):
            session.step()
        assert session.status().phase == "learning"

    @pytest.mark.parametrize("prior", ["none", "magnitude"])
    @pytest.mark.parametrize("dense", [0.0, 0.1, 0.5])
    def test_gates_start_alike_whether_the_length_is_told_at_once_or_later(self, prior: str, dense: float) -> None:
        def started(told: int | None) -> MaskingSession:
            rules = [{"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 0.7}]
            pruning = {"config_list": rules, "phases": {"dense": dense}, "gates": {"prior": prior}}
            session = MaskingSession(layer(), {"pruning": pruning, "seed": 3})
            session.start(told)
            return session

        at_once, later = started(9), started(None)
        later.expect(9)
        for _ in range(int(9 * dense)):  # until the gates are learned
            at_once.step()
            later.step()
        for ours, theirs in zip(later.gate_parameters(), at_once.gate_parameters(), strict=True):
            assert torch.equal(ours, theirs)


class TestLimits:
    @pytest.mark.parametrize(
        ("rule", "sparsity"),
        [
            ({"sparse_ratio": 0.2, "min_sparse_ratio": 0.8}, 0.8),
            ({"sparse_ratio": 0.9, "max_sparse_ratio": 0.5}, 0.5),
            ({"min_sparse_ratio": 0.9}, 0.9),
            ({"max_sparse_ratio": 0.1}, 0.1),
        ],
    )
    def test_gates_are_steered_to_what_the_cut_will_want(self, rule: dict[str, Any], sparsity: float) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 2))
        session = session_on(model, rule={"op_names": ["0"], "granularity": "element", **rule})
        session.start(200)
        for parameter in session.gate_parameters():
            nn.init.normal_(parameter)  # about half of them closed
        if "sparse_ratio" in rule:
            assert session.controller.targets(1.0) == pytest.approx([1 - sparsity])
        session.extract()
        assert float((model[0].weight == 0).float().mean()) == pytest.approx(sparsity, abs=0.002)


class TestRefusals:
    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"options": {"temperature": {"start": 0.5, "end": 3.0}}}, "temperature may not rise, as from 0.5 to 3.0"),
            ({"options": {"temperature": float("nan")}}, "temperature.*finite"),
            ({"options": {"initial_logit": float("inf")}}, "initial_logit.*finite"),
            ({"method": "gibbs", "options": {"beta": float("nan")}}, "beta.*finite"),
            ({"method": "gibbs", "options": {"coupling": 5.0}}, "coupling is for hamiltonian 'kernel' or 'filter'"),
            ({"method": "gibbs", "options": {"sweeps": 7}}, "sweeps is for hamiltonian 'kernel' or 'filter'"),
            ({"gate_optimizer": {"lr": float("nan")}}, "lr.*finite"),
        ],
    )
    def test_options(self, keys: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            session_on(layer(), **keys)

    def test_a_ratio_that_leaves_less_than_a_unit(self) -> None:
        rule = {"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 0.99}
        with pytest.raises(ConfigError, match=r"leaves '0' less than one of its 12 units: lower it to at most 0\.9167"):
            session_on(layer(), rule=rule)
        session_on(layer(), rule={**rule, "max_sparse_ratio": 0.9})
        session_on(layer(), rule={**rule, "sparse_ratio": 11 / 12})


class TestNumbers:
    def test_a_constant_of_one_weight(self) -> None:
        model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 2))
        rule = {"op_names": ["0"], "granularity": "element"}
        session_on(model, rule=rule, weight_init="signed_constant").start(10)
        assert bool(model[0].weight.isfinite().all())
        assert bool((model[0].weight != 0).all())

    def test_half_precision_counts_beyond_its_range(self) -> None:
        model = nn.Sequential(nn.Linear(784, 300, bias=False)).half()
        keys = {"method": "supermask", "rescale": "dynamic", "weights": "frozen"}
        session = session_on(model, **keys)
        session.start(10)
        assert 0 < session.status().soft_sparsity < 1
        assert bool(session.loss().isfinite())
        session.extract()
        assert float((model[0].weight != 0).float().mean()) == 0.5


class Timewise(nn.Module):
    """Puts every step of a sequence through its layers as a row of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x.flatten(0, 1)))).view(*x.shape[:2], -1)


def test_votes_are_counted_by_rows_and_agreement_by_samples() -> None:
    model, x = Timewise(), torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    groups = find_groups(copy.deepcopy(model), x)
    session = session_on(model, groups, {"op_names": ["a"], "sparse_ratio": 0.5}, method="consensus")
    session.start(10)
    (mask,) = session.plan.masks.values()
    nn.init.normal_(mask.output, generator=torch.Generator().manual_seed(0))
    set_consensus_from(session, [x, x[:2]])
    assert 0 < float(mask.votes.max()) <= 1
    agreement = measure_agreement(session, [x, x[:2]])
    assert agreement.samples == 7
    assert 0 <= agreement.unanimous <= min(min(gates) for gates in agreement.gates.values()) <= 1
