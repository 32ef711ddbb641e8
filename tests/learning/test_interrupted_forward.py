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
from gumbel_plugin.learning.session import plain_copy

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
    assert torch.equal(plain[0].weight, session.plan.sites["0"].weight)
    session.model.eval()
    expected = session.model(X)
    assert torch.equal(session.model(X), expected)
    copy.deepcopy(session.model)
