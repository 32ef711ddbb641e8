"""Ctrl-C in the middle of a forward of a wrapped layer: what the forward had put in the weight's place goes."""

from __future__ import annotations

import pytest
import torch

from gumbel_plugin import GumbelPruner
from tests.training.test_interrupted_forward import ATTENTION, SelfAttention, X, interrupted


def test_a_layer_that_its_parent_reads_and_nni_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SelfAttention()
    expected = model(X)
    pruner = GumbelPruner(model, ATTENTION, example_inputs=X)
    pruner.session.start(10, hooks=False)
    with interrupted(monkeypatch, KeyboardInterrupt):
        model(X)
    pruner.unwrap_model()
    assert torch.equal(model(X), expected)
