from __future__ import annotations

import copy
import io
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gumbel_plugin.config import OptimizerConfig, PruningConfig, PruningSection
from gumbel_plugin.errors import LifecycleError, NonFiniteLossError, TargetError
from gumbel_plugin.learning.session import GATES, MaskingSession, make_optimizer, plain_copy
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.masks.targets import columns_view

METHOD_A = OptimizerConfig(name="sgd", lr=50.0, momentum=0.9)  # Dupont et al. 2022


def section(*entries: dict[str, Any], **keys: Any) -> PruningSection:
    return PruningConfig.load({"pruning": {"config_list": list(entries), **keys}}).pruning


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def element_session(model: nn.Module, total: int | None = None, **keys: Any) -> MaskingSession:
    """Start a session with one gate for every weight of the linear layers."""
    entry = {"op_types": ["Linear"], "granularity": "element", "sparse_ratio": keys.pop("sparse_ratio", None)}
    session = MaskingSession(model, section(entry, **keys), seed=keys.pop("seed", 0))
    session.start(total)
    return session


@pytest.fixture
def group_session(section: Callable[..., PruningSection]) -> Callable[..., MaskingSession]:
    """Return a function that starts a session on all groups of a network, with random logits."""

    def start(network: Any, seed: int = 0, **keys: Any) -> MaskingSession:
        config = section(network.model, **keys)
        session = MaskingSession(network.model, config, list(network.groups().values()), seed)
        session.start()
        randomise_logits(session)
        return session

    return start


@torch.no_grad()
def randomise_logits(session: MaskingSession, seed: int = 0) -> None:
    """Leave about half of the gates closed, never all of one mask."""
    generator = torch.Generator().manual_seed(seed)
    for mask in session.plan.masks.values():
        nn.init.normal_(mask.logit, generator=generator)
        mask.logit.view(-1)[0] = 1.0
        mask.logit.view(-1)[-1] = -1.0


def column_masked(plain: nn.Module, session: MaskingSession, gates: dict[str, Tensor]) -> nn.Module:
    """Mask a plain copy's consumers by hand: each column's weight times the gate of its unit."""
    model = copy.deepcopy(plain)
    with torch.no_grad():
        for name, group in session.plan.groups.items():
            for part in group.consumers:
                layer = model.get_submodule(part.module)
                columns = torch.ones(getattr(layer, "in_channels", getattr(layer, "in_features", 0)))
                columns[part.positions] = gates[name][part.units]
                layer.weight.mul_(columns_view(layer, columns).to(layer.weight))
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# The table of networks --------------------------------------------------------------------------------------------


def test_one_sample_a_forward_acts_at_all_consumers(network: Any, group_session: Any) -> None:
    plain, inputs = copy.deepcopy(network.model), network.batch(16)
    session = group_session(network)
    outputs = []
    for _ in range(2):
        outputs.append(network.model(inputs))
        gates = {name: mask.gates().detach() for name, mask in session.plan.masks.items()}
        assert all(set(g.unique().tolist()) <= {0.0, 1.0} for g in gates.values())
        torch.testing.assert_close(outputs[-1], column_masked(plain, session, gates)(inputs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1])


def test_eval_is_hard_and_deterministic(network: Any, group_session: Any) -> None:
    plain, inputs = copy.deepcopy(network.model).eval(), network.batch(4)
    session = group_session(network)
    network.model.eval()
    before = session.plan.noise.forward
    first, second = network.model(inputs), network.model(inputs)
    assert torch.equal(first, second)
    assert session.plan.noise.forward == before
    hard = {name: (mask.logit >= 0).float() for name, mask in session.plan.masks.items()}
    assert all(0 < g.sum() < g.numel() for g in hard.values())
    torch.testing.assert_close(first, column_masked(plain, session, hard)(inputs), rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_gate_and_every_weight(network: Any, group_session: Any) -> None:
    session = group_session(network)
    with torch.no_grad():
        for parameter in session.gate_parameters():
            parameter.fill_(2.0)
    inputs = network.batch(64)
    for _ in range(8):  # a gate whose readers were all closed in one sample has its turn in another
        output = network.model(inputs)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    for name, mask in session.plan.masks.items():
        assert bool((mask.logit.grad != 0).all()), name
    weights = [(n, p) for n, p in network.model.named_parameters() if GATES not in n]
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in weights if n.endswith("weight"))


def test_extraction_zeroes_the_closed_columns_and_nothing_else(network: Any, group_session: Any) -> None:
    before = copy.deepcopy(network.model).eval()
    session = group_session(network)
    network.model.eval()
    inputs = network.batch(4)
    hard_output = network.model(inputs)
    masks = session.extract()
    assert session.phase is Phase.FIXED
    hard = {name: mask.hard for name, mask in session.plan.masks.items()}
    assert equal_states(
        {n: t for n, t in network.model.state_dict().items() if GATES not in n},
        column_masked(before, session, {n: h.float() for n, h in hard.items()}).state_dict(),
    )
    torch.testing.assert_close(network.model(inputs), hard_output, rtol=1e-5, atol=1e-6)
    session.detach()
    torch.testing.assert_close(network.model(inputs), hard_output, rtol=1e-5, atol=1e-6)

    producers = {part.module for group in session.plan.groups.values() for part in group.producers}
    assert set(masks) == producers
    for name, group in session.plan.groups.items():
        for part in group.producers:
            layer = network.model.get_submodule(part.module)
            assert masks[part.module]["weight"].shape == layer.weight.shape
            assert set(masks[part.module]) == {n for n, p in layer.named_parameters(recurse=False) if p is not None}
            dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            rows = masks[part.module]["weight"].movedim(dim, 0).reshape(layer.weight.shape[dim], -1)[part.positions]
            assert torch.equal(rows, hard[name][part.units].float()[:, None].expand_as(rows))
            if "bias" in masks[part.module]:
                assert torch.equal(masks[part.module]["bias"][part.positions], rows[:, 0])


def test_a_budget_is_met_exactly(network: Any, group_session: Any) -> None:
    session = group_session(network, sparse_ratio=0.5)
    session.extract()
    for group, mask in zip(session.plan.groups.values(), session.plan.masks.values(), strict=True):
        assert int((~mask.hard).sum()) == group.size // 2


def test_masks_go_round_through_fix_masks(network: Any, group_session: Any) -> None:
    second = copy.deepcopy(network)
    session, other = group_session(network), group_session(second)
    masks = session.extract()
    with torch.no_grad():
        for parameter in other.gate_parameters():
            parameter.fill_(1.0)
    other.fix_masks(masks)
    assert other.phase is Phase.FIXED
    for name, mask in session.plan.masks.items():
        assert torch.equal(other.plan.masks[name].hard, mask.hard)
    for name, targets in other.extract().items():
        assert all(torch.equal(mask, masks[name][target]) for target, mask in targets.items())
    for (name, ours), theirs in zip(network.model.named_parameters(), second.model.parameters(), strict=True):
        assert GATES in name or torch.equal(ours, theirs)


def test_detaching_leaves_no_trace(network: Any, group_session: Any) -> None:
    model = network.model
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    session = group_session(network)
    assert any(GATES in key for key in model.state_dict())
    model(network.inputs).sum().backward()
    session.detach()
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    for name, module in model.named_modules():
        assert set(vars(module)) == attributes[name]
        hooks = (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called)
        assert not any(hooks), name
    session.detach()  # a second time does no harm


def test_a_plain_copy_has_no_gates_and_takes_nothing_from_the_original(network: Any, group_session: Any) -> None:
    keys = list(network.model.state_dict())
    group_session(network)
    network.model(network.inputs).sum().backward()
    duplicate = plain_copy(network.model)
    assert list(duplicate.state_dict()) == keys
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in duplicate.modules())
    assert any(GATES in key for key in network.model.state_dict())
    duplicate.eval()(network.inputs)


# Phases -----------------------------------------------------------------------------------------------------------


def test_the_steps_lead_through_dense_learning_and_fixed() -> None:
    model = mlp(4, 8, 3)
    session = element_session(
        model,
        10,
        sparse_ratio=0.5,
        phases={"dense": 0.2, "fixed": 0.3},
        options={"temperature": {"start": 2.0, "end": 1.0, "shape": "linear"}},
    )
    seen = []
    for _ in range(10):
        mask = session.plan.masks["0"]
        seen.append((session.phase.value, round(session.progress, 3), round(mask.temperature, 3)))
        assert (float(session.loss().detach()) != 0) == (session.phase is Phase.LEARNING and session.progress > 0)
        session.step()
    assert [phase for phase, _, _ in seen] == ["open"] * 2 + ["learning"] * 5 + ["fixed"] * 3
    assert [progress for _, progress, _ in seen] == [0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1]
    assert [t for _, _, t in seen] == [2, 2, 2, 1.8, 1.6, 1.4, 1.2, 1, 1, 1]
    assert session.status().phase == "fixed"
    assert session.status().sparsity == session.status().soft_sparsity == 0.5


def test_before_the_gates_act_the_model_is_dense() -> None:
    torch.manual_seed(0)
    model, inputs = mlp(4, 8, 3), torch.randn(5, 4)
    expected = model(inputs)
    element_session(model, 10, phases={"dense": 0.5}, options={"initial_logit": 0.0}, rescale="learned")
    assert torch.equal(model(inputs), expected)


def test_once_decided_the_gates_stay_and_the_weights_go_on() -> None:
    torch.manual_seed(0)
    model, inputs = mlp(4, 8, 3), torch.randn(5, 4)
    session = element_session(model, 4, sparse_ratio=0.5, phases={"fixed": 0.5})
    session.step()
    session.step()
    assert session.phase is Phase.FIXED
    hard = session.plan.masks["0"].hard.clone()
    model(inputs).sum().backward()
    assert all(parameter.grad is None for parameter in session.gate_parameters())
    assert torch.equal(model[0].weight.grad != 0, (model[0].weight.grad != 0) & hard)
    assert bool(model[0].weight.grad.any())
    session.step()
    assert torch.equal(session.plan.masks["0"].hard, hard)


def test_without_a_length_the_gates_learn_at_once_at_the_final_target() -> None:
    session = element_session(mlp(4, 8, 3), sparse_ratio=0.75)
    assert session.phase is Phase.LEARNING
    assert session.progress == 1.0
    assert session.controller.targets(session.progress) == [0.25, 0.25]


def test_the_status_counts_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp(4, 8, 3)
    session = element_session(model)
    with torch.no_grad():
        session.plan.masks["0"].logit.fill_(-1.0)
        session.plan.masks["2"].logit.fill_(1.0)
    status = session.status()
    assert status.sparsity == pytest.approx(32 / 56)
    closed = torch.sigmoid(torch.tensor(1.0))
    assert status.soft_sparsity == pytest.approx(float((32 * closed + 24 * (1 - closed)) / 56))
    assert (status.phase, status.step) == ("learning", 0)
    with caplog.at_level(logging.INFO):
        session.decide()
    assert "the cut changed 1 of 56 gates" in caplog.text  # layer 0 keeps one unit


def test_a_method_may_add_a_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    session = element_session(mlp(4, 8, 3))
    for mask in session.plan.masks.values():
        monkeypatch.setattr(mask, "penalty", lambda weight: weight.detach().square().sum())
    weights = [site.weight for site in session.plan.sites.values()]
    torch.testing.assert_close(session.loss(), sum(w.detach().square().sum() for w in weights))


# Lifecycle --------------------------------------------------------------------------------------------------------


def test_a_session_starts_once() -> None:
    model = mlp(4, 8, 3)
    session = element_session(model)
    with pytest.raises(LifecycleError, match="was started before"):
        session.start()
    session.detach()
    with pytest.raises(LifecycleError, match="was started before"):
        session.start()


def test_a_model_has_one_session_at_a_time() -> None:
    model = mlp(4, 8, 3)
    config = section({"op_types": ["Linear"], "granularity": "element"})
    first, second = MaskingSession(model, config), MaskingSession(model, config)
    first.start()
    with pytest.raises(LifecycleError, match="has a masking session already; detach that one first"):
        second.start()
    with pytest.raises(LifecycleError, match="has a masking session already; detach that one first"):
        MaskingSession(model, config)
    first.detach()
    second.start()


@pytest.mark.parametrize("name", ["values", "items", "keys", "pop", "update"])
def test_a_layer_may_have_any_name(name: str) -> None:
    model = nn.Module()
    model.add_module(name, nn.Linear(3, 3))
    session = element_session(model)
    assert session.extract().keys() == {name}
    session.detach()


def test_the_users_flags_survive() -> None:
    model = mlp(4, 8, 3)
    model[0].weight.requires_grad_(False)
    model[2].eval()
    flags = [module.training for module in model.modules()]
    session = element_session(model, weights="frozen")
    assert not any(p.requires_grad for n, p in model.named_parameters() if GATES not in n)
    assert all(p.requires_grad for p in session.gate_parameters())
    model(torch.randn(3, 4)).sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if GATES not in n)
    session.detach()
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert [module.training for module in model.modules()] == flags


def test_trained_weights_keep_their_flags() -> None:
    model = mlp(4, 8, 3)
    model[0].weight.requires_grad_(False)
    session = element_session(model)
    assert [p.requires_grad for n, p in model.named_parameters() if GATES not in n] == [False, True, True, True]
    session.detach()
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


def test_weights_are_initialised_once_by_the_seed() -> None:
    def weights(seed: int, how: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = mlp(4, 8, 3)
        entry = {"op_types": ["Linear"], "granularity": "element"}
        session = MaskingSession(model, section(entry, weights="frozen", weight_init=how), seed=seed)
        session.start()
        return [model[0].weight.detach(), model[2].weight.detach()]

    first, again, other = weights(1, "signed_constant"), weights(1, "signed_constant"), weights(2, "signed_constant")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert all(w.abs().unique().numel() == 1 for w in first)
    torch.manual_seed(0)
    kept = mlp(4, 8, 3)
    assert torch.equal(weights(1, "keep")[0], kept[0].weight)


# Copies -----------------------------------------------------------------------------------------------------------


def train(model: nn.Module, parameters: Iterable[nn.Parameter], inputs: Tensor, steps: int = 3) -> list[Tensor]:
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    outputs = []
    for _ in range(steps):
        outputs.append(model(inputs))
        loss = outputs[-1].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [output.detach() for output in outputs]


def test_a_copy_of_an_attached_model_trains_by_itself(network: Any, group_session: Any) -> None:
    session = group_session(network)
    network.model(network.inputs).sum().backward()  # there is a sample with a graph to copy
    network.model.zero_grad()
    duplicate = copy.deepcopy(network.model)
    before = state_of(network.model)
    mine = {id(tensor) for tensor in network.model.parameters()}
    assert not any(id(parameter) in mine for parameter in duplicate.parameters())
    counter = session.plan.noise.forward
    copied = train(duplicate, duplicate.parameters(), network.batch(8))
    assert equal_states(before, state_of(network.model))
    assert session.plan.noise.forward == counter
    assert not equal_states(before, state_of(duplicate))
    original = train(network.model, network.model.parameters(), network.batch(8))
    for ours, theirs in zip(original, copied, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_copied_session_lets_go_of_its_own_model() -> None:
    torch.manual_seed(0)
    session = element_session(mlp(4, 8, 3))
    duplicate = copy.deepcopy(session)
    duplicate.detach()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in duplicate.model.modules())
    assert not any(GATES in key for key in duplicate.model.state_dict())
    assert any(GATES in key for key in session.model.state_dict())
    assert session.model[0]._forward_pre_hooks


def test_an_attached_model_can_be_pickled() -> None:
    torch.manual_seed(0)
    model, inputs = mlp(4, 8, 3), torch.randn(3, 4)
    randomise_logits(element_session(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(loaded.eval()(inputs), model.eval()(inputs))


# A loss that is not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_names_the_step_and_restores_the_model(bad: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    session = element_session(model)
    remembered = state_of(model)
    for _ in range(3):
        session.guard(model(torch.randn(5, 4)).sum()).backward()
        session.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model(torch.full((5, 4), math.nan))
    with pytest.raises(NonFiniteLossError, match=rf"became {bad:g} at step 3; the model keeps its state at step 0\."):
        session.guard(torch.tensor(bad))
    assert equal_states(remembered, state_of(model))


def test_the_first_loss_may_be_the_bad_one() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    session = element_session(model)
    before = state_of(model)
    output = model(torch.full((5, 4), math.nan))
    with pytest.raises(NonFiniteLossError, match="at step 0"):
        session.guard(output)
    assert equal_states(before, state_of(model))


def test_the_state_is_remembered_now_and_then() -> None:
    model = mlp(4, 8, 3)
    session = element_session(model)
    loss = torch.tensor(1.0)
    assert session.guard(loss) is loss
    for step in range(120):
        with torch.no_grad():
            model[0].bias.fill_(float(step))
        session.guard(loss)
        session.step()
    with pytest.raises(NonFiniteLossError, match="at step 120; the model keeps its state at step 100"):
        session.guard(torch.tensor(math.nan))
    assert bool((model[0].bias == 100).all())


# Noise ------------------------------------------------------------------------------------------------------------


def samples(seed: int, granularity: str = "element") -> list[Tensor]:
    torch.manual_seed(0)
    model, inputs = mlp(6, 20, 3), torch.randn(5, 6)
    entry = {"op_types": ["Linear"], "granularity": granularity}
    session = MaskingSession(model, section(entry, options={"initial_logit": 0.0}), seed=seed)
    session.start()
    torch.manual_seed(seed + 17)  # the global generator plays no part
    return [model(inputs).detach() for _ in range(3)]


@pytest.mark.parametrize("granularity", ["element", "kernel"])
def test_one_seed_one_run(granularity: str) -> None:
    first, again, other = samples(0, granularity), samples(0, granularity), samples(1, granularity)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])


def test_evaluating_in_between_changes_nothing() -> None:
    torch.manual_seed(0)
    model, inputs = mlp(6, 20, 3), torch.randn(5, 6)
    randomise_logits(element_session(model))
    duplicate = copy.deepcopy(model)
    first = [model(inputs), model(inputs)]
    second = [duplicate(inputs)]
    duplicate.eval()(inputs)
    second.append(duplicate.train()(inputs))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Checkpointed(nn.Module):
    """Two blocks that may be recomputed in the backward."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.first = nn.Sequential(nn.Linear(6, 10), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = checkpoint(block, x, use_reentrant=False) if self.what == "blocks" else block(x)
        return x


@pytest.mark.parametrize("granularity", ["default", "element", "kernel"])
@pytest.mark.parametrize("what", ["blocks", "model"])
@pytest.mark.parametrize("rescale", ["none", "dynamic"])
def test_activation_checkpointing_sees_the_same_sample(granularity: str, what: str, rescale: str) -> None:
    """Whether blocks or the whole model are recomputed, gradients are those without checkpointing."""
    from gumbel_torch_pruning import find_groups

    gradients = []
    for mode in ("none", what):
        torch.manual_seed(0)
        model, inputs = Checkpointed(mode), torch.randn(40, 6, requires_grad=True)
        groups = find_groups(model, inputs.detach()) if granularity == "default" else []
        config = section({"op_types": ["Linear"], "granularity": granularity}, rescale=rescale)
        session = MaskingSession(model, config, groups)
        session.start()
        randomise_logits(session)
        for _ in range(2):
            out = checkpoint(model, inputs, use_reentrant=False) if mode == "model" else model(inputs)
            out.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


def test_a_loop_that_calls_parts_of_the_model_gets_new_samples_too(group_session: Any, make_network: Any) -> None:
    network = make_network("no_bn")
    session = group_session(network)
    inputs, outputs = network.batch(20), []
    for _ in range(3):
        outputs.append(network.model[2](network.model[1](network.model[0](inputs))))
        outputs[-1].sum().backward()  # a second time through one sample's graph would be an error
        session.step()
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


# Masks from outside -----------------------------------------------------------------------------------------------


def test_element_masks_leave_the_bias_alone() -> None:
    torch.manual_seed(0)
    model = mlp(4, 8, 3)
    biases = [model[0].bias.detach().clone(), model[2].bias.detach().clone()]
    session = element_session(model, sparse_ratio=0.75)
    randomise_logits(session)
    masks = session.extract()
    assert {name: set(targets) for name, targets in masks.items()} == {"0": {"weight"}, "2": {"weight"}}
    for name, bias in zip(("0", "2"), biases, strict=True):
        layer = model.get_submodule(name)
        assert torch.equal(layer.bias, bias)
        assert torch.equal(layer.weight != 0, masks[name]["weight"] != 0)
        assert int((masks[name]["weight"] == 0).sum()) == layer.weight.numel() * 3 // 4


def test_fixed_masks_fix_the_others_open_and_are_extracted_as_given() -> None:
    model = mlp(4, 8, 3)
    session = element_session(model)
    randomise_logits(session)
    given = (torch.rand(8, 4) < 0.5).float()
    session.fix_masks({"0": {"weight": given}})
    assert {mask.phase for mask in session.plan.masks.values()} == {Phase.FIXED}
    masks = session.extract()
    assert torch.equal(masks["0"]["weight"], given)
    assert bool(masks["2"]["weight"].all())
    assert torch.equal(model[0].weight != 0, given != 0)
    second = (torch.rand(3, 8) < 0.5).float()
    session.fix_masks({"2": {"weight": second}})
    assert torch.equal(session.masks()["0"]["weight"], given)
    assert torch.equal(session.masks()["2"]["weight"], second)


def test_no_masks_fix_nothing() -> None:
    session = element_session(mlp(4, 8, 3))
    session.fix_masks({})
    assert session.phase is Phase.LEARNING


def test_masks_of_the_wrong_shape_or_of_producers_that_disagree_are_errors(make_network: Any, group_session: Any) -> None:
    with pytest.raises(TargetError, match=r"0\.weight: mask \(4, 8\), weight \(8, 4\)"):
        element_session(mlp(4, 8, 3)).fix_masks({"0": {"weight": torch.ones(4, 8)}})
    network = make_network("residual")
    session = group_session(network)
    with pytest.raises(TargetError, match=r"conv1\.weight: mask \(6, 3\), weight"):
        session.fix_masks({"conv1": {"weight": torch.ones(6, 3)}})
    closed = torch.ones(6, 3, 3, 3)
    closed[0] = 0
    with pytest.raises(TargetError, match="its producers' masks close different units"):
        session.fix_masks({"conv1": {"weight": closed}, "conv3": {"weight": torch.ones(6, 8, 3, 3)}})
    assert session.phase is Phase.LEARNING


# Learning ---------------------------------------------------------------------------------------------------------


def test_parameters_are_handed_out_with_their_settings() -> None:
    session = element_session(mlp(4, 8, 3), rescale="learned", weights="frozen")
    gates, scales = session.optimizers()
    assert isinstance(gates, torch.optim.SGD)
    assert (gates.param_groups[0]["lr"], gates.param_groups[0]["momentum"]) == (METHOD_A.lr, METHOD_A.momentum)
    assert gates.param_groups[0]["params"] == session.gate_parameters()
    assert (scales.param_groups[0]["lr"], scales.param_groups[0]["momentum"]) == (1e-3, 0.9)
    assert [float(s.detach()) for s in session.scale_parameters()] == [1.0, 1.0]
    groups = session.parameter_groups()
    assert [group["lr"] for group in groups] == [50.0, 1e-3]
    registered = {id(p) for n, p in session.model.named_parameters() if GATES in n}
    assert registered == {id(p) for group in groups for p in group["params"]}


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_optimizers_are_built_from_their_settings(name: str, kind: type[torch.optim.Optimizer]) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([parameter], OptimizerConfig(name=name, lr=0.3, weight_decay=0.2))
    assert type(optimizer) is kind
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.3, 0.2)


@pytest.mark.parametrize("rescale", ["none", "learned", "dynamic"])
def test_method_a_learns_with_frozen_weights(rescale: str) -> None:
    """Dupont et al. 2022: an untrained network, its weights frozen, is trained by choosing among them alone."""
    torch.manual_seed(0)
    inputs = torch.randn(400, 10)
    labels = (inputs[:, :5].sum(1) > inputs[:, 5:].sum(1)).long()
    model = mlp(10, 64, 32, 2)
    session = element_session(model, 150, weights="frozen", weight_init="signed_constant", rescale=rescale)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if GATES not in n}

    def accuracy(network: nn.Module) -> float:
        return float((network.eval()(inputs).argmax(1) == labels).float().mean())

    before = accuracy(model)
    optimizers = session.optimizers()
    for _ in range(150):
        loss = session.guard(nn.functional.cross_entropy(model.train()(inputs), labels)) + session.loss()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        session.step()
    after = accuracy(model)
    assert before < 0.7
    assert after > 0.9
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if GATES not in n)
    masked = model(inputs)
    session.extract()
    session.detach()
    assert torch.equal(model.eval()(inputs), masked)  # s (w m) = (s w) m, bit for bit
    assert 0.2 < float((model[0].weight == 0).float().mean()) < 0.8


def test_channels_are_learnt_with_their_weights_down_to_the_ratio() -> None:
    """Half of the inputs say nothing: three quarters of the hidden units go, and the task is still learnt."""
    from gumbel_torch_pruning import find_groups

    torch.manual_seed(0)
    inputs = torch.randn(400, 10)
    labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
    model = mlp(10, 40, 2)
    entry = {"op_types": ["Linear"], "sparse_ratio": 0.75}
    config = section(entry, phases={"dense": 0.2, "fixed": 0.3})
    session = MaskingSession(model, config, find_groups(model, inputs[:2]))
    weights = torch.optim.Adam(model.parameters(), lr=0.02)
    session.start(300)
    optimizers = [weights, *session.optimizers()]
    for _ in range(300):
        loss = session.guard(nn.functional.cross_entropy(model(inputs), labels)) + session.loss()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        session.step()
    session.extract()
    session.detach()
    assert int((model[2].weight == 0).all(0).sum()) == 30
    assert float((model(inputs).argmax(1) == labels).float().mean()) > 0.9


def test_a_state_dict_goes_on_where_it_was() -> None:
    def started() -> tuple[nn.Module, MaskingSession]:
        torch.manual_seed(0)
        model = mlp(6, 12, 3)
        return model, element_session(model, 20, sparse_ratio=0.5, rescale="learned", phases={"fixed": 0.25})

    def run(model: nn.Module, session: MaskingSession, steps: int) -> None:
        inputs = torch.linspace(-1, 1, 30).view(5, 6)
        parameters = [*session.gate_parameters(), *session.scale_parameters()]
        for _ in range(steps):
            loss = model(inputs).square().mean() + session.loss()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter -= 10 * gradient
            session.step()

    model, session = started()
    run(model, session, 8)
    saved = copy.deepcopy(session.state_dict())
    run(model, session, 10)
    other_model, other = started()
    other.load_state_dict(saved)
    assert (other.steps, other.phase, other.progress) == (8, Phase.LEARNING, 8 / 15)
    run(other_model, other, 10)
    assert other.phase is session.phase is Phase.FIXED
    assert equal_states(state_of(model), state_of(other_model))
    with pytest.raises(TargetError, match="another plan"):
        element_session(mlp(6, 12, 4, 3)).load_state_dict(saved)
