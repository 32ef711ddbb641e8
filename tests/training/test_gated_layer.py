from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gumbel_plugin.graph.channel_groups import ChannelSlice
from gumbel_plugin.masks.base import NoiseSource, Phase
from gumbel_plugin.masks.gumbel_softmax import GumbelSoftmaxMask, GumbelSoftmaxOptions
from gumbel_plugin.sparsity.types import ELEMENT, OUT_CHANNEL, SparsityType
from gumbel_plugin.training.gated_layer import ColumnGates, GatedLayer, GatedLayerHooks

LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (3, 4)),
    "linear 3d": (lambda: nn.Linear(4, 6), (3, 5, 4)),
    "linear 1d": (lambda: nn.Linear(4, 6), (4,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "conv2d without a batch": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 5, 5)),
}


def mask_of(shape: tuple[int, ...], granularity: SparsityType | None = None, stream: int = 0) -> GumbelSoftmaxMask:
    mask = GumbelSoftmaxMask(shape, GumbelSoftmaxOptions(), NoiseSource(1), stream, granularity)
    nn.init.normal_(mask.logit, generator=torch.Generator().manual_seed(stream))
    mask.phase = Phase.LEARNING
    return mask


def column_site(layer: nn.Module, size: int = 4) -> GatedLayer:
    columns = ColumnGates.join(
        layer, [(mask_of((size,)), ChannelSlice("layer", torch.arange(size), torch.arange(size)))]
    )
    return GatedLayer("layer", layer, columns=columns)


def element_site(layer: nn.Module, granularity: SparsityType = ELEMENT, **keys: object) -> GatedLayer:
    mask = mask_of(granularity.latent_shape(layer.weight.shape), granularity)
    return GatedLayer("layer", layer, mask=mask, **keys)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masking_the_input_is_masking_the_weights_columns(kind: str, dtype: torch.dtype) -> None:
    """Values, and the gradients of weight, gates and input."""
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer, inputs = build().to(dtype), torch.randn(shape, dtype=dtype, requires_grad=True)
    gated = column_site(layer)
    (mask,) = gated.columns.masks
    gates = mask.gates()
    assert 0 < gates.sum() < 4
    results = []
    for masked_input, weight in ((gated.apply_to_input(inputs), layer.weight), (inputs, gated.apply(layer.weight))):
        output = torch.func.functional_call(layer, {"weight": weight}, (masked_input,))
        upstream = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
        wanted = [layer.weight, mask.logit, inputs]
        results.append((output, *torch.autograd.grad(output, wanted, upstream, retain_graph=True)))
    for by_input, by_weight in zip(*results, strict=True):
        torch.testing.assert_close(by_input, by_weight)


def test_a_concatenation_joins_its_groups_and_leaves_the_rest_open() -> None:
    layer = nn.Conv2d(7, 2, 1)
    first, second = mask_of((2,), stream=1), mask_of((3,), stream=2)
    feeds = [
        (first, ChannelSlice("layer", torch.tensor([5, 0]), torch.tensor([0, 1]))),
        (second, ChannelSlice("layer", torch.tensor([1, 2, 6, 4]), torch.tensor([2, 0, 1, 1]))),
    ]
    vector = ColumnGates.join(layer, feeds).vector()
    a, b = first.gates(), second.gates()
    assert torch.equal(vector, torch.stack([a[1], b[2], b[0], torch.ones(()), b[1], a[0], b[1]]))


@pytest.mark.parametrize("granularity", [ELEMENT, OUT_CHANNEL])
@pytest.mark.parametrize("rescale", ["none", "learned", "dynamic"])
def test_a_site_is_the_product_of_its_gates_and_its_scale(granularity: SparsityType, rescale: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 6)
    scale = nn.Parameter(torch.tensor(1.7)) if rescale == "learned" else None
    gated = element_site(layer, granularity, rescale=rescale, scale=scale)
    gated.columns = column_site(layer).columns
    gates = gated.mask.spread(gated.mask.gates(), layer.weight) * gated.columns.vector()
    factor = {"none": 1.0, "learned": 1.7, "dynamic": 24 / gates.expand(6, 4).sum()}[rescale]
    torch.testing.assert_close(gated.apply(layer.weight), layer.weight * gates * factor)
    torch.testing.assert_close(gated.multiplier(layer.weight).expand(6, 4), gates.expand(6, 4))


def test_the_dynamic_scale_has_a_gradient() -> None:
    layer = nn.Linear(4, 6)
    gated = element_site(layer, rescale="dynamic")
    mask = gated.mask
    gates = mask.gates(layer.weight)
    expected = (layer.weight * gates * (24 / gates.sum())).square().sum()
    ours = torch.autograd.grad(gated.apply(layer.weight).square().sum(), mask.logit)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, mask.logit)[0])


@pytest.mark.parametrize("rescale", ["none", "learned", "dynamic"])
def test_before_the_gates_act_the_weight_is_itself(rescale: str) -> None:
    layer = nn.Linear(4, 6)
    gated = element_site(
        layer, rescale=rescale, scale=nn.Parameter(torch.tensor(3.0)) if rescale == "learned" else None
    )
    gated.mask.phase = Phase.OPEN
    assert gated.apply(layer.weight) is layer.weight


@pytest.mark.parametrize("rescale", ["none", "learned", "dynamic"])
def test_folding_changes_the_storage_and_nothing_else(rescale: str) -> None:
    """Bit-exact: s (w m) and (s w) m are the same floating-point numbers, also when it is applied or folded again."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(8, 6), torch.randn(5, 8)
    gated = element_site(
        layer, rescale=rescale, scale=nn.Parameter(torch.tensor(1.3)) if rescale == "learned" else None
    )
    gated.mask.fix(gated.mask.decide(None))
    assert gated.phases == {Phase.FIXED}
    hooks = GatedLayerHooks(gated)
    hooks.attach()
    before = layer(inputs)
    applied = gated.apply(layer.weight).detach().clone()
    gated.fold()
    assert torch.equal(layer.weight, applied)
    assert torch.equal(layer.weight == 0, ~gated.mask.hard)
    assert torch.equal(layer(inputs), before)
    gated.fold()
    assert torch.equal(layer.weight, applied)
    hooks.detach()
    assert torch.equal(layer(inputs), before)


# Hooks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 50])
def test_the_hooks_mask_where_it_is_cheaper_and_the_result_is_the_same(batch: int) -> None:
    """A small batch is masked itself, a large one meets masked weights."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 6), torch.randn(batch, 4)
    gated = column_site(layer)
    expected = nn.functional.linear(inputs, gated.apply(layer.weight), layer.bias)
    hooks = GatedLayerHooks(gated)
    hooks.attach()
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    torch.testing.assert_close(layer(inputs), expected)
    assert (seen[0] is inputs) == (batch == 50)
    assert "weight" not in layer.__dict__


def test_a_keyword_input_is_gated_too() -> None:
    layer, inputs = nn.Linear(4, 6), torch.randn(1, 4)
    gated = column_site(layer)
    expected = nn.functional.linear(inputs, gated.apply(layer.weight), layer.bias)
    GatedLayerHooks(gated).attach()
    torch.testing.assert_close(layer(input=inputs), expected)


@pytest.mark.parametrize("where", ["forward", "pre-hook", "hook"])
def test_an_error_in_a_forward_leaves_no_masked_weight_behind(where: str) -> None:
    layer = nn.Linear(4, 6)
    gated = element_site(layer)
    GatedLayerHooks(gated).attach()

    def fail(*args: object) -> None:
        raise RuntimeError("on purpose")

    if where == "pre-hook":
        layer.register_forward_pre_hook(fail)
    if where == "hook":
        layer.register_forward_hook(fail)
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 3 if where == "forward" else 4))
    assert "weight" not in layer.__dict__
    assert layer.weight is layer._parameters["weight"]


def test_detached_hooks_leave_nothing() -> None:
    layer, inputs = nn.Linear(4, 6), torch.randn(3, 4)
    expected = layer(inputs)
    before = copy.copy(vars(layer))
    hooks = GatedLayerHooks(element_site(layer))
    hooks.attach()
    assert not torch.equal(layer(inputs), expected)
    hooks.detach()
    assert torch.equal(layer(inputs), expected)
    assert vars(layer) == before
    assert not layer._forward_hooks_always_called


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


@pytest.mark.parametrize("kind", ["element", "columns"])
def test_a_layer_that_is_used_twice_sees_one_sample(kind: str) -> None:
    torch.manual_seed(0)
    model, inputs = Twice(), torch.randn(20, 4)
    gated = element_site(model.layer) if kind == "element" else column_site(model.layer)
    GatedLayerHooks(gated).attach()
    weight = gated.apply(model.layer.weight)
    expected = nn.functional.linear(nn.functional.linear(inputs, weight, model.layer.bias), weight, model.layer.bias)
    torch.testing.assert_close(model(inputs), expected)
