"""Ctrl-C comes in the middle of a forward: what the forward had put in the weights' place is never used afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gumbel_plugin import MaskingSession, PruningConfig
from gumbel_plugin.layers.weights import plain_copy
from gumbel_plugin.training.loop import MaskingLoop
from gumbel_torch_pruning import find_groups

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def started(granularity: str = "element") -> MaskingSession:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    rules = [{"op_types": ["Linear"], "granularity": granularity, "sparse_ratio": 0.5}]
    session = MaskingSession(model, PruningConfig.load(rules).pruning)
    session.start(10)
    return session


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> Iterator[None]:
    """Let the next linear layer's forward end with an exception, while its gated weight is in place."""

    def fail(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", fail)
        with pytest.raises(error):
            yield


ERRORS = pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError])
GRANULARITIES = pytest.mark.parametrize("granularity", ["element", "in_channel"])


@ERRORS
@GRANULARITIES
def test_a_detached_model_computes_its_state_dict(
    error: type[BaseException], granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = started(granularity)
    with interrupted(monkeypatch, error):
        session.model(X)
    session.detach()
    assert not [name for name, layer in session.model.named_modules() if "weight" in layer.__dict__]
    twin = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    twin.load_state_dict(session.model.state_dict())
    assert torch.equal(session.model(X), twin(X))


@ERRORS
@GRANULARITIES
def test_the_masks_and_weights_are_those_of_an_undisturbed_session(
    error: type[BaseException], granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, undisturbed = started(granularity), started(granularity)
    with interrupted(monkeypatch, error):
        session.model(X)
    undisturbed.model(X)
    assert session.status() == undisturbed.status()
    masks = session.extract()
    for name, targets in undisturbed.extract().items():
        assert torch.equal(masks[name]["weight"], targets["weight"])
    for name, parameter in undisturbed.model.named_parameters():
        assert torch.equal(session.model.get_parameter(name), parameter)


def test_an_interrupted_model_can_be_copied_and_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    session = started()
    with interrupted(monkeypatch, KeyboardInterrupt):
        session.model(X)
    plain = plain_copy(session.model)
    assert torch.equal(plain[0].weight, session.plan.gated_layers["0"].weight)
    session.model.eval()
    expected = session.model(X)
    assert torch.equal(session.model(X), expected)
    copy.deepcopy(session.model)


class Sometimes(nn.Module):
    """A network that calls its first layer, or only reads the layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.calls = nn.Linear(6, 16), nn.Linear(16, 3), True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x) if self.calls else x @ self.first.weight.t()
        return self.last(hidden.relu())


def test_a_forward_that_skips_the_layer_finds_its_own_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Sometimes().eval()
    session = MaskingSession(model, PruningConfig.load([{"op_names": ["first"], "granularity": "element"}]).pruning)
    session.start(10)
    session.plan.masks["first"].fix(torch.zeros(16, 6))
    model.calls = False
    expected = model(X)
    model.calls = True
    with interrupted(monkeypatch, KeyboardInterrupt):
        model(X)
    model.calls = False
    assert torch.equal(model(X), expected)


def test_an_input_that_is_gated_next_meets_the_weight_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large batch meets a masked weight; a small one is masked itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    rules = PruningConfig.load([{"op_names": ["0"], "sparse_ratio": 0.5}]).pruning
    session = MaskingSession(model, rules, find_groups(copy.deepcopy(model), X))
    session.start(10)
    (mask,) = session.plan.masks.values()
    mask.fix(torch.zeros(16))
    with interrupted(monkeypatch, KeyboardInterrupt):
        model[2](torch.ones(50, 16))
    mask.fix(torch.ones(16))
    assert torch.equal(
        model[2](torch.ones(1, 16)), F.linear(torch.ones(1, 16), model[2]._parameters["weight"], model[2].bias)
    )


def test_a_checkpoint_holds_the_plain_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Sometimes()
    plain = set(model.state_dict())
    rules = [{"op_names": ["first"], "granularity": "element", "sparse_ratio": 0.5}]
    loop = MaskingLoop(MaskingSession(model, rules))
    loop.start(10)
    loop.keep_checkpoints_plain()
    expected = copy.deepcopy(model.state_dict())
    assert set(expected) == plain
    with interrupted(monkeypatch, KeyboardInterrupt):
        model(X)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])


ATTENTION = [{"op_names": ["0.out_proj"], "granularity": "element", "sparse_ratio": 0.5}]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module("0", nn.MultiheadAttention(6, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule("0")(x, x, x)[0]


def test_a_layer_that_its_parent_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SelfAttention()
    expected = model(X)
    session = MaskingSession(model, PruningConfig.load(ATTENTION).pruning)
    session.start(10)
    with interrupted(monkeypatch, KeyboardInterrupt):
        model(X)
    session.detach()
    assert torch.equal(model(X), expected)
