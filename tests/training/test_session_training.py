"""That sessions learn, and that their noise is theirs alone: seeds, recomputed layers, frozen and trained weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gumbel_plugin.layers.weights import GATES
from gumbel_plugin.training.session import MaskingSession
from gumbel_torch_pruning import find_groups

# Noise --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def samples(mlp: Any, pruning: Any) -> Callable[[int, str], list[Tensor]]:
    """Return a function that gives the outputs of three training forwards, by the session's seed."""

    def run(seed: int, granularity: str) -> list[Tensor]:
        torch.manual_seed(0)
        model, inputs = mlp(6, 20, 3), torch.randn(5, 6)
        entry = {"op_types": ["Linear"], "granularity": granularity}
        session = MaskingSession(model, pruning(entry, options={"initial_logit": 0.0}), seed=seed)
        session.start()
        torch.manual_seed(seed + 17)  # the global generator plays no part
        return [model(inputs).detach() for _ in range(3)]

    return run


@pytest.mark.parametrize("granularity", ["element", "kernel"])
def test_one_seed_one_run(granularity: str, samples: Any) -> None:
    first, again, other = samples(0, granularity), samples(0, granularity), samples(1, granularity)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])


def test_evaluating_in_between_changes_nothing(mlp: Any, element_session: Any, randomize_logits: Any) -> None:
    torch.manual_seed(0)
    model, inputs = mlp(6, 20, 3), torch.randn(5, 6)
    randomize_logits(element_session(model))
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
def test_activation_checkpointing_sees_the_same_sample(
    granularity: str, what: str, rescale: str, randomize_logits: Any, pruning: Any
) -> None:
    """Whether blocks or the whole model are recomputed, gradients are those without checkpointing."""
    gradients = []
    for mode in ("none", what):
        torch.manual_seed(0)
        model, inputs = Checkpointed(mode), torch.randn(40, 6, requires_grad=True)
        groups = find_groups(model, inputs.detach()) if granularity == "default" else []
        config = pruning({"op_types": ["Linear"], "granularity": granularity}, rescale=rescale)
        session = MaskingSession(model, config, groups)
        session.start()
        randomize_logits(session)
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


# Learning -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rescale", ["none", "learned", "dynamic"])
def test_method_a_learns_with_frozen_weights(rescale: str, mlp: Any, element_session: Any, train_gates: Any) -> None:
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
    train_gates(session, lambda: nn.functional.cross_entropy(model.train()(inputs), labels), 150)
    after = accuracy(model)
    assert before < 0.7
    assert after > 0.9
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if GATES not in n)
    masked = model(inputs)
    session.extract()
    session.detach()
    assert torch.equal(model.eval()(inputs), masked)  # s (w m) = (s w) m, bit for bit
    assert 0.2 < float((model[0].weight == 0).float().mean()) < 0.8


@pytest.mark.slow
def test_channels_are_learnt_with_their_weights_down_to_the_ratio(mlp: Any, pruning: Any, train_gates: Any) -> None:
    """Half of the inputs say nothing: three quarters of the hidden units go, and the task is still learned."""
    torch.manual_seed(0)
    inputs = torch.randn(400, 10)
    labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
    model = mlp(10, 40, 2)
    entry = {"op_types": ["Linear"], "sparse_ratio": 0.75}
    config = pruning(entry, phases={"dense": 0.2, "fixed": 0.3})
    session = MaskingSession(model, config, find_groups(model, inputs[:2]))
    weights = torch.optim.Adam(model.parameters(), lr=0.02)
    session.start(300)
    train_gates(session, lambda: nn.functional.cross_entropy(model(inputs), labels), 300, weights)
    session.extract()
    session.detach()
    assert int((model[2].weight == 0).all(0).sum()) == 30
    assert float((model(inputs).argmax(1) == labels).float().mean()) > 0.9
