"""Gates of samples through a session: where they act, what they cost, how they become plain masks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gumbel_plugin.config import PruningConfig
from gumbel_plugin.errors import ConfigError, DataError
from gumbel_plugin.layers.geometry import columns_view
from gumbel_plugin.layers.weights import GATES, plain_copy
from gumbel_plugin.masks import Phase
from gumbel_plugin.masks.consensus import ConsensusMask
from gumbel_plugin.runs.models import CifarResNet
from gumbel_plugin.shrinking.mask_file import load_masks, save_masks
from gumbel_plugin.sparsity.counting import count_macs
from gumbel_plugin.training.agreement import measure_agreement, set_consensus_from
from gumbel_plugin.training.session import MaskingSession

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES *= torch.tensor([0.1, 0.3, 1, 2, 4, 8], dtype=torch.float64).reshape(-1, 1, 1, 1)  # so that samples disagree
BLOCKS = {"op_types": ["ResidualBlock"]}


def resnet(blocks: int = 2) -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(blocks).double()


def block_session(model: nn.Module, ratio: float = 0.5, example: Tensor | None = IMAGES, **keys: Any) -> MaskingSession:
    options = {"unit": "block", **keys.pop("options", {})}
    entry = {**BLOCKS, "sparse_ratio": ratio, **keys.pop("entry", {})}
    pruning = {"method": "consensus", "options": options, "config_list": [entry], **keys}
    return MaskingSession(model, PruningConfig.load({"pruning": pruning}).pruning, example_inputs=example)


@torch.no_grad()
def disagree(session: MaskingSession, seed: int = 0) -> None:
    """Give the gating modules weights under which samples have different gates."""
    generator = torch.Generator().manual_seed(seed)
    for mask in session.plan.masks.values():
        mask.double()
        for parameter in mask.parameters():
            nn.init.normal_(parameter, generator=generator)
        nn.init.normal_(mask.bias, std=4.0, generator=generator)


@pytest.fixture
def channel_session(section: Any) -> Callable[..., MaskingSession]:
    """Return the function that starts a session on all channel groups of a network, whose samples disagree."""

    def start(network: Any, **keys: Any) -> MaskingSession:
        keys = {"sparse_ratio": 0.5, "method": "consensus", **keys}
        groups = list(network.groups().values())
        session = MaskingSession(network.model, section(network.model, **keys), groups, example_inputs=network.inputs)
        session.start(10)
        disagree(session)
        return session

    return start


def ask(session: MaskingSession, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the outputs under each sample's own gates in eval mode, and these gates."""
    model = session.model
    for mask in session.plan.masks.values():
        mask.evaluated_per_sample = True
    training = model.training
    outputs = model.eval()(inputs).detach()
    found = {name: mask.last_sample_gates() for name, mask in session.plan.masks.items()}
    for mask in session.plan.masks.values():
        mask.evaluated_per_sample = False
    model.train(training)
    return outputs, {name: votes[0] for name, votes in found.items() if votes is not None}


@pytest.fixture
def learn(train_gates: Any) -> Callable[..., None]:
    """Return a function that trains weights and gates to shrink the outputs."""

    def run(session: MaskingSession, inputs: Tensor, steps: int = 3) -> None:
        weights = torch.optim.SGD(session.weight_parameters(), 0.01)
        train_gates(session, lambda: session.model(inputs).square().mean(), steps, weights)

    return run


# Each sample's own gates --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["conv_bn_relu", "residual", "depthwise", "concat", "sigmoid", "no_bn", "grouped", "flatten_linear"]
)
def test_channel_gates_mask_every_sample_by_itself(name: str, make_network: Any, channel_session: Any) -> None:
    """The oracle: a plain network for each sample, its consumers' columns closed as that sample's gates say."""
    network = make_network(name, torch.float64)
    session = channel_session(network)
    inputs = network.batch(7)
    outputs, gates = ask(session, inputs)
    assert any(0 < float(own.mean()) < 1 for own in gates.values())
    for sample in range(len(inputs)):
        plain = plain_copy(network.model).eval()
        with torch.no_grad():
            for group_name, group in session.plan.groups.items():
                for part in group.consumers:
                    layer = plain.get_submodule(part.module)
                    columns = torch.ones(layer.in_channels if hasattr(layer, "in_channels") else layer.in_features)
                    columns[part.positions] = gates[group_name][sample].float()[part.units]
                    layer.weight.mul_(columns_view(layer, columns.double()))
            expected = plain(inputs[sample : sample + 1])
        torch.testing.assert_close(outputs[sample : sample + 1], expected, atol=1e-12, rtol=1e-10)


def test_block_gates_mask_every_sample_by_itself() -> None:
    model = resnet()
    session = block_session(model)
    session.start(10)
    disagree(session)
    outputs, gates = ask(session, IMAGES)
    assert any(0 < float(own.mean()) < 1 for own in gates.values())
    for sample in range(len(IMAGES)):
        plain = plain_copy(model).eval()
        for name, own in gates.items():
            if not own[sample]:
                nn.init.zeros_(plain.get_submodule(name).bn2.weight)
                nn.init.zeros_(plain.get_submodule(name).bn2.bias)
        expected = plain(IMAGES[sample : sample + 1]).detach()
        torch.testing.assert_close(outputs[sample : sample + 1], expected, atol=1e-12, rtol=1e-10)


def test_gates_see_the_average_over_positions_of_what_the_unit_reads() -> None:
    model = resnet()
    session = block_session(model)
    session.start(10)
    disagree(session)
    read: dict[str, Tensor] = {}
    for name in session.plan.masks:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
    _, gates = ask(session, IMAGES)
    for name, mask in session.plan.masks.items():
        means = read[name].mean((2, 3))
        hidden = torch.relu(means @ mask.input)
        assert torch.equal(gates[name], (torch.sigmoid(hidden @ mask.output.t() + mask.bias) >= 0.5).double())


def test_all_consumers_of_a_group_share_gates_that_are_computed_once(
    make_network: Any, channel_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network("residual", torch.float64)
    session = channel_session(network)
    calls: list[int] = []
    original = ConsensusMask.sample_logits
    monkeypatch.setattr(ConsensusMask, "sample_logits", lambda mask, x: (calls.append(id(mask)), original(mask, x))[1])
    network.model(network.batch(3))
    assert sorted(calls) == sorted({id(mask) for mask in session.plan.masks.values()})
    assert max(len(group.consumers) for group in session.plan.groups.values()) == 2


def test_a_session_starts_with_the_dense_network() -> None:
    model = resnet()
    dense = model(IMAGES).detach()
    session = block_session(model, 0.9)
    session.start(10)
    assert torch.equal(model(IMAGES), dense)
    assert session.status().sparsity == 0


def test_before_and_after_the_learning_samples_have_no_gates_of_their_own() -> None:
    model = resnet()
    session = block_session(model, phases={"dense": 0.2, "fixed": 0.3})
    session.start(10)
    disagree(session)
    phases = []
    for _ in range(10):
        model(IMAGES)
        phases.append(
            (session.phase.value, any(m.last_sample_gates() is not None for m in session.plan.masks.values()))
        )
        session.step()
    assert phases == [("open", False)] * 2 + [("learning", True)] * 5 + [("fixed", False)] * 3


@pytest.mark.parametrize("kind", ["channel", "block"])
def test_gates_of_recomputed_layers_have_the_same_gradient(
    kind: str, make_network: Any, channel_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under activation checkpointing what a layer asked for first is computed again in the backward."""
    results = []
    for recompute in (False, True):
        if kind == "block":
            model, inputs = resnet(), IMAGES
            session = block_session(model)
            session.start(10)
            disagree(session)
            layer: nn.Module = model.stage1
        else:
            network = make_network("conv_bn_relu", torch.float64)
            session, model, inputs = channel_session(network), network.model, network.batch(5)
            layer = model[3]
        if recompute:
            forward = layer.forward
            monkeypatch.setattr(layer, "forward", lambda x, f=forward: checkpoint(f, x, use_reentrant=False))
        votes = [mask.votes.clone() for mask in session.plan.masks.values()]
        (model(inputs).square().mean() + session.loss()).backward()
        assert any(not torch.equal(m.votes, v) for m, v in zip(session.plan.masks.values(), votes, strict=True))
        results.append([parameter.grad.clone() for parameter in session.gate_parameters()])
        results.append([mask.votes.clone() for mask in session.plan.masks.values()])
    for ours, theirs in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[1], results[3], strict=True))


# Costs and losses ---------------------------------------------------------------------------------------------------


def test_a_block_costs_the_macs_that_its_removal_saves() -> None:
    model = resnet()
    session = block_session(model)
    (budget,) = session.plan.budgets
    assert [term.name for term in budget.terms] == ["stage1.0", "stage1.1", "stage2.1", "stage3.1"]
    for term in budget.terms:
        smaller = copy.deepcopy(model)
        parent, _, child = term.name.rpartition(".")
        setattr(smaller.get_submodule(parent), child, nn.Identity())
        assert term.cost == count_macs(model, IMAGES) - count_macs(smaller, IMAGES)


def test_without_example_inputs_a_block_costs_its_weights() -> None:
    model = resnet()
    for term in block_session(model, example=None).plan.budgets[0].terms:
        block = model.get_submodule(term.name)
        assert term.cost == sum(p.numel() for p in block.parameters() if p.dim() > 1)


def test_channels_that_share_a_budget_cost_the_macs_of_what_computes_them(make_network: Any, section: Any) -> None:
    network = make_network("flatten_linear")
    config = section(network.model, method="consensus", sparse_ratio=0.5, global_group_id="all")
    groups = list(network.groups().values())
    (budget,) = MaskingSession(network.model, config, groups, example_inputs=network.inputs).plan.budgets
    assert {term.name: term.cost for term in budget.terms} == {"0": 64 * 27, "5": 96}


def test_the_loss_of_a_session_is_usage_and_polarisation() -> None:
    model = resnet()
    session = block_session(model, 0.25, options={"lambda_act": 3.0, "lambda_polar": 0.5})
    session.start(10)
    disagree(session)
    assert float(session.loss()) == 0  # before any forward
    model(IMAGES)
    means = torch.stack([mask.last_sample_gates()[0].mean() for mask in session.plan.masks.values()])
    costs = torch.tensor([term.cost for term in session.plan.budgets[0].terms], dtype=torch.float64)
    usage = (means * costs).sum() / costs.sum()
    expected = 3.0 * (usage - 0.75) ** 2 + 0.5 * (means * (1 - means)).mean()
    torch.testing.assert_close(session.loss().detach().double(), expected)


@pytest.mark.slow
def test_the_losses_lead_to_the_budget_and_to_agreement(train_gates: Any) -> None:
    """With nothing else to learn, the gates close what they must, and every sample agrees."""
    model = resnet()
    session = block_session(
        model, 0.5, weights="frozen", options={"lambda_polar": {"start": 0.0, "end": 3.0}, "lambda_act": 10.0}
    )
    session.start(300)
    disagree(session)
    train_gates(session, lambda: 0.0 * model(IMAGES).sum(), 300)
    set_consensus_from(session, [IMAGES])
    assert session.status().sparsity == 0.5
    agreement = measure_agreement(session, [IMAGES])
    assert agreement.unanimous == 1.0


# The consensus ------------------------------------------------------------------------------------------------------


def test_an_evaluation_sees_the_consensus_and_the_extracted_network_is_it() -> None:
    model = resnet()
    session = block_session(model, 0.5)
    session.start(10)
    disagree(session)
    for _ in range(3):
        model(IMAGES)
        session.step()
    consensus = {name: mask.decide(None) for name, mask in session.plan.masks.items()}
    model.eval()
    plain = plain_copy(model)
    for name, own in consensus.items():
        if not own:
            nn.init.zeros_(plain.get_submodule(name).bn2.weight)
            nn.init.zeros_(plain.get_submodule(name).bn2.bias)
    assert torch.equal(model(IMAGES), plain(IMAGES))


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9])
def test_the_cut_of_blocks_is_exact_and_extraction_changes_nothing(ratio: float, learn: Any) -> None:
    model = resnet()
    keys = list(model.state_dict())
    session = block_session(model, ratio)
    session.start(10)
    disagree(session)
    learn(session, IMAGES)
    session.decide()
    masked = model.eval()(IMAGES)
    masks = session.extract()
    closed = [name for name, mask in session.plan.masks.items() if not mask.hard.any()]
    assert len(closed) == math.floor(4 * ratio)  # of four blocks that cost the same
    assert session.status().sparsity == len(closed) / 4
    session.detach()
    torch.testing.assert_close(model(IMAGES), masked, rtol=0, atol=0)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert set(masks) == {f"{name}.bn2" for name in session.plan.masks}
    for name in session.plan.masks:
        layer = model.get_submodule(name).bn2
        for target in ("weight", "bias"):
            assert bool((masks[f"{name}.bn2"][target] == (name not in closed)).all())
            assert bool((getattr(layer, target) == 0).all()) == (name in closed)


@pytest.mark.parametrize("name", ["residual", "concat", "flatten_linear", "no_bn"])
def test_the_cut_of_channels_is_exact_and_extraction_changes_nothing(
    name: str, make_network: Any, channel_session: Any, learn: Any
) -> None:
    network = make_network(name, torch.float64)
    keys, inputs = list(network.model.state_dict()), network.batch(8)
    session = channel_session(network)
    learn(session, inputs)
    session.decide()
    masked = network.model.eval()(inputs)
    session.extract()
    session.detach()
    torch.testing.assert_close(network.model(inputs), masked, rtol=1e-12, atol=1e-12)
    assert list(network.model.state_dict()) == keys
    for mask in session.plan.masks.values():
        assert int(mask.hard.sum()) == mask.shape[0] - mask.shape[0] // 2


def test_masks_of_blocks_travel(tmp_path: Any, learn: Any) -> None:
    model = resnet()
    session = block_session(model)
    session.start(10)
    disagree(session)
    learn(session, IMAGES)
    masks = session.extract()
    save_masks(tmp_path / "masks", masks)
    other = block_session(resnet())
    other.start(10)
    other.fix_masks(load_masks(tmp_path / "masks"))
    assert other.phase is Phase.FIXED
    for name, mask in session.plan.masks.items():
        assert torch.equal(mask.hard, other.plan.masks[name].hard)


# Agreement ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["channel", "block"])
def test_agreement_is_counted_sample_by_sample(kind: str, make_network: Any, channel_session: Any, learn: Any) -> None:
    if kind == "block":
        model, inputs = resnet(), IMAGES
        session = block_session(model)
        session.start(10)
        disagree(session)
    else:
        network = make_network("no_bn", torch.float64)
        inputs = network.batch(40)
        session, model = channel_session(network, sparse_ratio=0.0), network.model
        for mask in session.plan.masks.values():
            mask.bias.data += 8.0  # most samples agree that most gates are open
    learn(session, inputs, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    agreement = measure_agreement(session, [inputs[:4], inputs[4:]])
    after = {name: tensor for name, tensor in model.state_dict().items() if GATES not in name or "votes" in name}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert model.training
    unanimous = 0
    same = {name: torch.zeros(mask.hard.numel()) for name, mask in session.plan.masks.items()}
    for sample in inputs.split(1):
        _, gates = ask(session, sample)
        equal = {name: (own[0] != 0) == session.plan.masks[name].hard.flatten() for name, own in gates.items()}
        unanimous += all(bool(own.all()) for own in equal.values())
        for name, own in equal.items():
            same[name] += own
    assert agreement.samples == len(inputs)
    assert agreement.unanimous == unanimous / len(inputs)
    for name, count in same.items():
        assert agreement.gates[name] == pytest.approx((count / len(inputs)).tolist())
    assert any(0 < share < 1 for own in agreement.gates.values() for share in own)
    assert kind == "block" or 0 < agreement.unanimous < 1


def test_the_consensus_over_some_data_is_the_majority_of_its_samples() -> None:
    model = resnet()
    session = block_session(model)
    session.start(10)
    disagree(session)
    set_consensus_from(session, [IMAGES[:1], IMAGES[1:]])
    _, gates = ask(session, IMAGES)
    for name, own in gates.items():
        torch.testing.assert_close(session.plan.masks[name].votes.flatten(), own.mean(0))


def test_nothing_to_ask() -> None:
    session = block_session(resnet())
    session.start(10)
    with pytest.raises(DataError, match="no batch"):
        measure_agreement(session, [])
    other = PruningConfig.load({"pruning": {"config_list": [{"op_types": ["Linear"], "granularity": "element"}]}})
    session = MaskingSession(nn.Sequential(nn.Linear(2, 2)), other.pruning)
    session.start(10)
    with pytest.raises(ConfigError, match="method 'gumbel_softmax' has no gates that belong to samples"):
        measure_agreement(session, [torch.ones(1, 2)])


# State --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_session_goes_on_from_its_state(learn: Any) -> None:
    model, resumed_model = resnet(), resnet()
    session, resumed = block_session(model), block_session(resumed_model)
    session.start(20)
    disagree(session)
    learn(session, IMAGES, 5)
    resumed.start(20)
    for mask in resumed.plan.masks.values():
        mask.double()
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(session.state_dict()))
    assert torch.equal(model(IMAGES), resumed_model(IMAGES))
    torch.testing.assert_close(session.loss(), resumed.loss(), rtol=0, atol=0)
    for name, mask in session.plan.masks.items():
        assert torch.equal(mask.votes, resumed.plan.masks[name].votes)
        assert torch.equal(mask.batches, resumed.plan.masks[name].batches)


def test_a_copy_made_while_learning_computes_the_same_and_goes_its_own_way(learn: Any) -> None:
    model = resnet()
    session = block_session(model)
    session.start(20)
    disagree(session)
    learn(session, IMAGES, 2)
    model(IMAGES)
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate.train()(IMAGES), model.train()(IMAGES))
    assert list(plain_copy(model).state_dict()) == list(resnet().state_dict())
    votes = session.plan.masks["stage1.0"].votes.clone()
    duplicate(torch.zeros_like(IMAGES))
    assert torch.equal(session.plan.masks["stage1.0"].votes, votes)
