from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.errors import EquivalenceError, TargetError
from gumbel_plugin.layers.weights import GATES
from gumbel_plugin.shrinking.equivalence import verify_equivalence
from gumbel_plugin.shrinking.shrink import masked_copy, shrink
from gumbel_plugin.training.session import MaskingSession

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

Masks = dict[str, dict[str, Tensor]]


@pytest.fixture
def masked(make_network: Callable[..., Any], section: Callable[..., Any]) -> Callable[..., tuple[Any, Masks, Tensor]]:
    """Return a function that makes a network, closes about half of its channels by random gates, and extracts.

    It returns the network (plain again), the masks, and what the gated network computed in eval mode for
    ``network.batch(4)`` before anything was extracted.
    """

    def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, Masks, Tensor]:
        network = make_network(name, dtype)
        session = MaskingSession(network.model, section(network.model), list(network.groups().values()))
        session.start()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for mask in session.plan.masks.values():
                nn.init.normal_(mask.logit, generator=generator)
                mask.logit[0], mask.logit[-1] = 1.0, -1.0
        network.model.eval()
        with torch.no_grad():
            gated = network.model(network.batch(4))
        masks = session.extract()
        session.detach()
        return network, masks, gated

    return make


def flags_of(model: nn.Module) -> dict[str, tuple[bool, ...]]:
    training = {name: (module.training,) for name, module in model.named_modules()}
    return training | {f"{name} ": (parameter.requires_grad,) for name, parameter in model.named_parameters()}


# The table of networks --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_small_network_computes_what_the_gated_one_did(
    engine: Any, dtype: torch.dtype, network_name: str, masked: Any
) -> None:
    """From the gates as they acted in eval mode, through extraction and removal, in both precisions."""
    network, masks, gated = masked(network_name, dtype)
    small = shrink(network.model, masks, network.inputs, engine=engine)
    with torch.no_grad():
        output = small.eval()(network.batch(4))
    assert output.dtype == dtype
    assert (output - gated).abs().max() <= TOLERANCE[dtype] * gated.abs().max()

    for name, targets in masks.items():  # every closed row is gone, physically
        layer, before = small.get_submodule(name), network.model.get_submodule(name)
        dim = 1 if isinstance(before, nn.ConvTranspose2d) else 0
        kept = targets["weight"].movedim(dim, 0).reshape(before.weight.shape[dim], -1).any(1)
        assert layer.weight.shape[dim] == int(kept.sum()) < before.weight.shape[dim]
        if layer.bias is not None:
            assert layer.bias.shape == (int(kept.sum()),)


@pytest.mark.slow
def test_both_engines_give_the_same_network(by_nni: Any, network_name: str, masked: Any) -> None:
    network, masks, _ = masked(network_name)
    first, second = (shrink(network.model, masks, network.inputs, engine=each) for each in (None, by_nni))
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape, name
        assert tensor.dtype == theirs[name].dtype
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)


@pytest.mark.slow
def test_the_original_and_all_flags_are_kept(engine: Any, network_name: str, masked: Any) -> None:
    network, masks, _ = masked(network_name)
    model = network.model.train()
    next(model.children()).eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    flags, given = flags_of(model), copy.deepcopy(masks)
    generator = torch.get_rng_state()
    small = shrink(model, masks, network.inputs, engine=engine)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in before.items())
    assert flags_of(model) == flags_of(small) == flags
    assert all(torch.equal(masks[n][t], mask) for n, targets in given.items() for t, mask in targets.items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())


@pytest.mark.slow
def test_the_small_network_trains(network_name: str, masked: Any) -> None:
    network, masks, _ = masked(network_name)
    small = shrink(network.model.train(), masks, network.inputs)
    small(network.batch(8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


# Masks from elsewhere ---------------------------------------------------------------------------------------------


def test_single_weights_kill_units_too(engine: Any) -> None:
    """A unit whose outgoing weights are all masked is dead, and with it the unit that only it reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    last, middle = torch.ones(3, 6), torch.ones(6, 8)
    last[:, 2] = 0
    middle[[0, 1, 3, 4, 5], 7] = 0
    middle[0, 0] = 0  # a single hole, that removes nothing
    small = shrink(
        model, {"4": {"weight": last}, "2": {"weight": middle, "bias": None}}, torch.randn(4, 5), engine=engine
    )
    assert [small[n].weight.shape for n in (0, 2, 4)] == [(7, 5), (5, 7), (3, 5)]
    assert small[2].weight[0, 0] == 0


def test_open_masks_remove_nothing(engine: Any, make_network: Callable[..., Any]) -> None:
    network = make_network("residual")
    small = shrink(network.model, {"conv1": {"weight": torch.ones(6, 3, 3, 3)}}, network.inputs, engine=engine)
    for name, parameter in network.model.named_parameters():
        assert torch.equal(small.get_parameter(name), parameter)


def test_of_rows_that_others_still_read_one_stays(make_network: Callable[..., Any]) -> None:
    """Without zero columns, a closed row of a producer is a constant that its batch norm shifts: it matters."""
    network = make_network("conv_bn_relu")
    rows = torch.ones(6, 3, 3, 3)
    rows[:3] = 0
    small = shrink(network.model, {"0": {"weight": rows}}, network.inputs)
    assert small[0].weight.shape == (4, 3, 3, 3)
    assert small[0].weight.flatten(1).any(1).sum() == 3


def test_masks_may_use_a_modules_second_name() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    mask = torch.eye(4)
    assert torch.equal(masked_copy(model, {"2": {"weight": mask}})[0].weight, shared.weight * mask)


def test_a_network_with_gates_is_shrunk_without_them(make_network: Callable[..., Any], section: Any) -> None:
    network = make_network("residual")
    session = MaskingSession(network.model, section(network.model, sparse_ratio=0.5), list(network.groups().values()))
    session.start()
    masks = session.extract()
    small = shrink(network.model, masks, network.inputs)
    assert not any(GATES in name for name in small.state_dict())
    assert any(GATES in name for name in network.model.state_dict())
    assert small.conv2.weight.shape == (4, 3, 3, 3)
    verify_equivalence(network.model, small, network.inputs).raise_for_failure()


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            {"conv_1": {"weight": torch.ones(6, 3, 3, 3)}},
            "'conv_1', which the model does not have; did you mean 'conv1'",
        ),
        ({"conv1": {"wait": torch.ones(6, 3, 3, 3)}}, r"conv1\.wait, which is no tensor"),
        ({"conv1": {"weight": torch.ones(6, 3)}}, r"conv1\.weight: mask \(6, 3\), tensor \(6, 3, 3, 3\)"),
    ],
)
def test_masks_that_do_not_fit_are_errors(masks: Masks, message: str, make_network: Callable[..., Any]) -> None:
    network = make_network("residual")
    with pytest.raises(TargetError, match=message):
        shrink(network.model, masks, network.inputs)


def test_a_bias_mask_for_a_layer_without_bias_is_ignored(make_network: Callable[..., Any]) -> None:
    network = make_network("residual")
    masked = masked_copy(network.model, {"conv1": {"bias": torch.zeros(6)}})
    assert all(torch.equal(tensor, network.model.state_dict()[name]) for name, tensor in masked.state_dict().items())


def test_a_difference_is_an_error_unless_nobody_looks(masked: Any) -> None:
    network, masks, _ = masked("conv_bn_relu")

    def careless(dependency: Any, dead: Any, inputs: Any, remove: Callable[[], nn.Module]) -> nn.Module:
        small = remove()
        with torch.no_grad():
            small[6].bias.add_(0.1)
        return small

    with pytest.raises(EquivalenceError, match="NOT equivalent"):
        shrink(network.model, masks, network.inputs, engine=careless)
    shrink(network.model, masks, network.inputs, verify=False, engine=careless)


def test_at_most_four_deep_copies_of_the_model(monkeypatch: pytest.MonkeyPatch, masked: Any) -> None:
    """The masked one, the small one, one to check the groups on, and one to read from what was kept."""
    network, masks, _ = masked("residual")
    copies, deepcopy = [], copy.deepcopy

    def counting(value: Any, memo: Any = None) -> Any:
        if isinstance(value, type(network.model)):
            copies.append(value)
        return deepcopy(value, memo)

    monkeypatch.setattr(copy, "deepcopy", counting)
    shrink(network.model, masks, network.inputs)
    assert 1 < len(copies) <= 4
