"""What cannot be gated or shrunk is refused by the NNI adapter as by the core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import gumbel_nni
from gumbel_plugin.errors import ConfigError
from tests.layers.test_model_check import RULES, UNUSABLE, X, network, process_group  # noqa: F401

USES: dict[str, Callable[[Any], Any]] = {
    "GumbelPruner": lambda model: gumbel_nni.GumbelPruner(model, RULES, example_inputs=X),
    "speedup": lambda model: gumbel_nni.speedup(model, {}, X),
}


@pytest.mark.parametrize("kind", [DataParallel, DistributedDataParallel])
@pytest.mark.parametrize("use", USES)
def test_a_model_that_is_wrapped_too_early_is_refused_and_left_alone(use: str, kind: type[nn.Module]) -> None:
    model = kind(network())
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=rf"^{use} needs .* in {kind.__name__}, .*\(model\.module\).*afterwards"):
        USES[use](model)
    assert list(model.state_dict()) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, in kinds that differ by release
@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("use", USES)
def test_what_cannot_be_gated_is_refused_in_one_sentence(use: str, kind: str) -> None:
    make, reason = UNUSABLE[kind]
    with pytest.raises(ConfigError, match=rf"^{use} (needs|cannot use) .*{reason}") as caught:
        USES[use](make())
    assert len(str(caught.value)) < 300
