"""Bad input: one clear error, and the model is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from gumbel_plugin import GumbelGroupPruner, MaskingSession, PruningConfig
from gumbel_plugin.errors import ConfigError, GraphError, LifecycleError, TargetError
from gumbel_torch_pruning import find_groups


class Net(nn.Module):
    """Three convolutions and a head; `unused` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.third = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.relu = nn.ReLU()
        self.unused = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.first(x)))
        return self.head(self.relu(self.third(self.relu(self.second(x)))).mean((2, 3)))


INPUTS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def snapshot(model: nn.Module) -> list[Any]:
    """Return everything about a model that an attempt could leave changed."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return [
        list(model.named_modules()),
        [m.training for m in model.modules()],
        hooks,
        flags,
        "forward" in vars(model),
        state,
    ]


def assert_untouched(model: nn.Module, before: list[Any]) -> None:
    after = snapshot(model)
    assert after[:-1] == before[:-1]
    assert list(after[-1]) == list(before[-1])
    assert all(torch.equal(value, before[-1][name]) for name, value in after[-1].items())


def _broken(outputs: Tensor) -> Tensor:
    raise RuntimeError("no such output")


CASES: dict[str, tuple[Callable[[Net], dict[str, Any]], type[Exception], str]] = {
    "inputs that the model rejects": (
        lambda net: {"example_inputs": torch.randn(2, 5, 8, 8)},
        GraphError,
        "forward fails on the example inputs.*5 channels",
    ),
    "an output_transform that fails": (lambda net: {"output_transform": _broken}, GraphError, "no such output"),
    "a layer that is none of the model's": (
        lambda net: {"pruning_ratio_dict": {nn.Conv2d(3, 8, 3): 0.5}},
        TargetError,
        "Conv2d of another model",
    ),
    "a layer without channels": (lambda net: {"pruning_ratio_dict": {net.relu: 0.5}}, TargetError, "'relu' is not in"),
    "a layer that is not called": (
        lambda net: {"pruning_ratio_dict": {net.unused: 0.5}},
        TargetError,
        "'unused' is not in the dependency graph",
    ),
    "one of a tuple of layers": (
        lambda net: {"pruning_ratio_dict": {(net.first, net.unused): 0.5}, "global_pruning": True},
        TargetError,
        "'unused'",
    ),
    "a ratio of 1": (lambda net: {"pruning_ratio": 1.0}, ConfigError, r"pruning_ratio = 1.0: must be in \[0, 1\)"),
    "a negative ratio of a layer": (
        lambda net: {"pruning_ratio_dict": {net.first: -0.1}},
        ConfigError,
        r"pruning_ratio_dict\[Conv2d\] = -0.1",
    ),
    "no iterative step": (lambda net: {"iterative_steps": 0}, ConfigError, "iterative_steps = 0"),
    "a limit of 0": (lambda net: {"max_pruning_ratio": 0.0}, ConfigError, "max_pruning_ratio = 0"),
    "a wrong target": (lambda net: {"target": "mac"}, ConfigError, "'mac' is unknown; did you mean 'macs'"),
    "layers' ratios of MACs": (
        lambda net: {"target": "macs", "pruning_ratio_dict": {net.first: 0.5}},
        ConfigError,
        "share one budget",
    ),
    "nothing to gate": (
        lambda net: {"ignored_layers": [net.first, net.second, net.third]},
        TargetError,
        "can be gated: there is none beside the ignored layers|can be gated: head: it reaches the network's output",
    ),
    "too few MACs": (
        lambda net: {"target": "macs", "pruning_ratio": 0.99},
        ConfigError,
        "macs cannot be met.*largest gated layer left is 'first'.*largest possible ratio is 0.9",
    ),
    "too few parameters because of ignored layers": (
        lambda net: {"target": "parameters", "pruning_ratio": 0.9, "ignored_layers": [net.second]},
        ConfigError,
        "parameters cannot be met",
    ),
    "too few MACs in a later step only": (
        lambda net: {"target": "macs", "pruning_ratio": 0.99, "iterative_steps": 10},
        ConfigError,
        "macs cannot be met",
    ),
    "groups that would vanish": (
        lambda net: {"global_pruning": True, "pruning_ratio": 0.95},
        ConfigError,
        "3 stay, because each of its 3 groups keeps",
    ),
    "an argument that does not exist": (
        lambda net: {"prunning_ratio": 0.5},
        ConfigError,
        "'prunning_ratio' is unknown; did you mean 'pruning_ratio'",
    ),
    "outputs without a gradient": (
        lambda net: {"output_transform": lambda outputs: torch.from_numpy(outputs.numpy())},
        GraphError,
        "cannot build the dependency graph.*numpy",
    ),
    "a forward that fails while it is traced": (
        lambda net: {
            "forward_fn": lambda model, inputs: model(inputs + torch.from_numpy(model.first(inputs).numpy()).mean())
        },
        GraphError,
        "cannot build the dependency graph.*numpy",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_failed_constructor_leaves_the_model_as_it_was(case):
    net = Net()
    net.bn.eval()
    net.head.weight.requires_grad_(False)
    arguments, error, message = CASES[case]
    given = {"example_inputs": INPUTS, **arguments(net)}
    before = snapshot(net)
    with pytest.raises(error, match=message):
        GumbelGroupPruner(net, given.pop("example_inputs"), **given)
    assert_untouched(net, before)
    assert GumbelGroupPruner(net, INPUTS).step() is None  # and a right attempt succeeds


def test_a_frozen_model_is_refused():
    net = Net().requires_grad_(False)
    before = snapshot(net)
    with pytest.raises(GraphError, match="frozen"):
        GumbelGroupPruner(net, INPUTS)
    assert_untouched(net, before)


def test_a_partly_frozen_model_is_gated_whole():
    net = Net()
    net.second.requires_grad_(False)
    pruner = GumbelGroupPruner(net, INPUTS)
    assert {group.name for group in pruner.groups()} == {"first", "second", "third", "head"}
    pruner.step()
    assert net.second.weight.shape == (3, 4, 3, 3)
    assert not net.second.weight.requires_grad
    assert net.first.weight.requires_grad


def test_gates_are_attached_once():
    net = Net()
    GumbelGroupPruner(net, INPUTS)
    before = snapshot(net)
    with pytest.raises(LifecycleError, match="gates already"):
        GumbelGroupPruner(net, INPUTS)
    assert_untouched(net, before)


def test_a_second_step_is_refused():
    net = Net()
    pruner = GumbelGroupPruner(net, INPUTS)
    pruner.step()
    before = snapshot(net)
    with pytest.raises(LifecycleError, match="1 of 1 iterative_steps are done"):
        pruner.step()
    with pytest.raises(LifecycleError, match="1 of 1 iterative_steps are done"):
        pruner.step(interactive=True)
    assert_untouched(net, before)


def test_reset_starts_over_on_what_is_left():
    net = Net()
    pruner = GumbelGroupPruner(net, INPUTS, pruning_ratio=0.5)
    pruner.step()
    pruner.reset()
    pruner.step()
    assert net.first.out_channels == 4  # half of the original's 8 went in the first round
    assert pruner.current_step == 1


def _replace_a_reader(net: Net) -> None:
    net.second = nn.Conv2d(8, 6, 3, padding=1)


def _replace_a_norm(net: Net) -> None:
    net.bn = nn.BatchNorm2d(8)


def _reshape(net: Net) -> None:
    net.third.weight = nn.Parameter(net.third.weight.detach()[:, :5].clone())


def _add(net: Net) -> None:
    net.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "name"), [(_replace_a_reader, "second"), (_replace_a_norm, "bn"), (_reshape, "third"), (_add, "extra")]
)
def test_a_model_that_was_changed_meanwhile_is_not_cut(change, name):
    net = Net()
    pruner = GumbelGroupPruner(net, INPUTS)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    change(net)
    before, held = snapshot(net), [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    with pytest.raises(LifecycleError, match=f"layer '{name}' was added, removed, replaced or reshaped"):
        pruner.step()
    assert_untouched(net, before)
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == held
    assert pruner.current_step == 0


def test_steps_go_on_when_nothing_is_left_to_gate():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1))
    pruner = GumbelGroupPruner(net, INPUTS, iterative_steps=3, pruning_ratio=0.9)
    widths = []
    for _ in range(3):
        pruner.step()
        widths.append(net[0].out_channels)
    assert widths == [2, 1, 1]
    with pytest.raises(LifecycleError, match="3 of 3"):
        pruner.step()


COMPUTED: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"prune\.remove\(layer, 'weight'\)"),
    "weight_norm": (nn.utils.weight_norm, r"remove_weight_norm\(layer\)"),
    "spectral_norm": (nn.utils.spectral_norm, r"remove_spectral_norm\(layer\)"),
    "parametrized": (nn.utils.parametrizations.weight_norm, r"parametrize\.remove_parametrizations\(layer, 'weight'\)"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_torch_computes_are_told_how_to_become_parameters(kind: str) -> None:
    net = Net()
    compute, call = COMPUTED[kind]
    compute(net.second)
    rules = [{"op_names": ["second"], "granularity": "element", "sparse_ratio": 0.5}]
    with pytest.raises(TargetError, match=rf"'second': its weight is computed .*{call} first"):
        MaskingSession(net, PruningConfig.load(rules).pruning)
    if kind != "parametrized":  # the others hold a tensor that torch cannot copy
        net.train()
        net(INPUTS)
        with pytest.raises(GraphError, match=rf"cannot be copied: 'second' has a computed weight, call .*{call} first"):
            find_groups(net, INPUTS)


class Failing(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise IndexError("no such token")


@pytest.mark.parametrize("use", [find_groups, GumbelGroupPruner])
def test_a_forward_that_fails_is_named_once_with_its_line(use: Callable[..., object]) -> None:
    with pytest.raises(
        GraphError, match=r"the example inputs: IndexError: no such token \(.*\.py:\d+, in forward\)$"
    ) as error:
        use(Failing(), INPUTS)
    assert isinstance(error.value.__cause__, IndexError)
    assert str(error.value).count("example inputs") == 1


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [(INPUTS * float("nan"), "holds NaN"), (INPUTS[:0], "is empty"), (None, "NoneType"), ("image.png", "is a str")],
    ids=["nan", "empty", "none", "text"],
)
@pytest.mark.parametrize("use", [find_groups, GumbelGroupPruner])
def test_inputs_that_nothing_can_be_traced_with(use: Callable[..., object], inputs: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        use(Net(), inputs)
