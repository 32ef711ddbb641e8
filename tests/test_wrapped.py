"""What is wrapped too early is refused; wrapped afterwards, it learns the same gates and weights in all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import gumbel_nni
from gumbel_plugin import GumbelGroupPruner, GumbelPruner, MaskingSession, PruningConfig, shrink
from gumbel_plugin.errors import ConfigError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
RULES = [{"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 0.5}]
USES: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "NNI": ("GumbelPruner", lambda model: GumbelPruner(model, RULES, example_inputs=X)),
    "Torch-Pruning": ("GumbelGroupPruner", lambda model: GumbelGroupPruner(model, X)),
    "session": ("a masking session", lambda model: MaskingSession(model, PruningConfig.load(RULES).pruning)),
    "shrink": ("shrinking", lambda model: shrink(model, {}, X)),
    "speedup": ("speedup", lambda model: gumbel_nni.speedup(model, {}, X)),
}


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make this process a world of one."""
    file = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=file.as_uri(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


@pytest.mark.parametrize("kind", [DataParallel, DistributedDataParallel])
@pytest.mark.parametrize("use", USES)
def test_a_model_that_is_wrapped_too_early_is_refused_and_left_alone(use: str, kind: type[nn.Module]) -> None:
    name, construct = USES[use]
    model = kind(network())
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=rf"^{name} needs .* in {kind.__name__}, .*\(model\.module\).*afterwards"):
        construct(model)
    assert list(model.state_dict()) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_part_that_is_wrapped_is_refused_by_its_name() -> None:
    model = nn.Sequential(nn.Linear(6, 6), DataParallel(network()))
    with pytest.raises(ConfigError, match=r"'1' is wrapped in DataParallel.*\(model\.1\.module\)"):
        GumbelGroupPruner(model, X)


def test_wrapped_afterwards_and_again_after_the_step_it_trains_as_the_plain_model() -> None:
    plain, wrapped = (train(wrap) for wrap in (nn.Sequential, DistributedDataParallel))
    assert [tuple(tensor.shape) for tensor in plain] == [(8, 6), (8,), (6, 8), (6,), (3, 6), (3,)]
    for ours, theirs in zip(plain, wrapped, strict=True):
        assert torch.equal(ours, theirs)


def train(wrap: Callable[[nn.Module], nn.Module]) -> list[torch.Tensor]:
    model = network()
    pruner = GumbelGroupPruner(model, X, pruning_ratio=0.5, ignored_layers=[model[4]], total_steps=6)
    initial = [parameter.detach().clone() for parameter in pruner.gate_parameters()]
    for _ in range(2):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        whole = wrap(model)
        for _ in range(6):
            loss = nn.functional.cross_entropy(whole(X), torch.arange(4) % 3)
            loss.backward()
            pruner.regularize(whole, loss)
            optimizer.step()
            optimizer.zero_grad()
        if pruner.current_step == 0:
            learnt = pruner.gate_parameters()
            assert not any(torch.equal(now, then) for now, then in zip(learnt, initial, strict=True))
            pruner.step()
    return [parameter.detach() for parameter in model.parameters()]
