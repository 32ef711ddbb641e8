"""What is wrapped too early is refused; wrapped afterwards, it learns the same gates and weights in all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gumbel_plugin import GumbelGroupPruner, MaskingSession, PruningConfig, shrink
from gumbel_plugin.errors import ConfigError

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
RULES = [{"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 0.5}]
USES: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "Torch-Pruning": ("GumbelGroupPruner", lambda model: GumbelGroupPruner(model, X)),
    "session": ("a masking session", lambda model: MaskingSession(model, PruningConfig.load(RULES).pruning)),
    "shrink": ("shrinking", lambda model: shrink(model, {}, X)),
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


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return network()


def sharded() -> nn.Module:
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


def of_deepspeed() -> nn.Module:
    model = network()
    model[0].weight.ds_id = 0  # how DeepSpeed marks a parameter whose shards lie elsewhere
    return model


UNUSABLE: dict[str, tuple[Callable[[], object], str]] = {
    "nothing": (lambda: None, r"model \(a torch.nn.Module\), but got None"),
    "class": (lambda: nn.Sequential, "got the class Sequential: pass an instance"),
    "function": (lambda: network, "but got <function network"),
    "state dict": (lambda: network().state_dict(), "but got OrderedDict"),
    "scripted": (lambda: torch.jit.script(network()), "the model is scripted .*: pass the model it was made of"),
    "traced": (lambda: torch.jit.trace(network(), X), "the model is scripted"),
    "scripted part": (lambda: nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Linear(6, 6))), "'1' is scripted"),
    "compiled": (lambda: torch.compile(network()), r"pass the plain one \(model\._orig_mod\) here"),
    "compiled part": (lambda: nn.Sequential(torch.compile(network())), r"'0' is compiled.*\(model\.0\._orig_mod\)"),
    "meta": (lambda: network().to("meta"), "'0.weight' is on the meta device"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 3)), "'0.weight' has no shape yet"),
    "inference mode": (in_inference_mode, "'0.weight' was made in inference mode"),
    "FSDP2": (sharded, "the model is sharded by FSDP"),
    "ZeRO-3": (of_deepspeed, "'0.weight' is sharded"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, in kinds that differ by release
@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("use", USES)
def test_what_cannot_be_gated_is_refused_in_one_sentence(use: str, kind: str) -> None:
    name, construct = USES[use]
    make, reason = UNUSABLE[kind]
    with pytest.raises(ConfigError, match=rf"^{name} (needs|cannot use) .*{reason}") as caught:
        construct(make())
    assert len(str(caught.value)) < 300


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
            learned = pruner.gate_parameters()
            assert not any(torch.equal(now, then) for now, then in zip(learned, initial, strict=True))
            pruner.step()
    return [parameter.detach() for parameter in model.parameters()]
