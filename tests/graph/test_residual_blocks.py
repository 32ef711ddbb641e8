"""Which modules are residual blocks with an identity skip, and what is left of them without their branch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from gumbel_plugin.graph.residual_blocks import ResidualBlock, residual_block
from gumbel_plugin.runs.models import CifarResNet, PaddedShortcut


class Block(nn.Module):
    """y = f(skip(x) + g(branch(x))), put together from functions."""

    def __init__(self, compute: Callable[[Block, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


RESIDUAL: dict[str, tuple[Block, str]] = {
    "plain": (Block(lambda m, x: x + m.conv(x)), "conv"),
    "branch first": (Block(lambda m, x: m.norm(m.conv(x)) + x), "norm"),
    "in place": (Block(lambda m, x: F.relu(m.norm(m.conv(x)).add_(x))), "norm"),
    "identity skip": (Block(lambda m, x: m.skip(x) + m.conv(x), skip=nn.Identity()), "conv"),
    "dropout": (
        Block(lambda m, x: x + m.drop(m.norm(m.conv(x))), drop=nn.Dropout(0.1)),
        "norm",
    ),
    "activation module": (Block(lambda m, x: m.act(x + m.conv(x)), act=nn.ReLU(inplace=True)), "conv"),
    "two steps after": (Block(lambda m, x: m.act(torch.sigmoid(x + m.conv(x))), act=nn.GELU()), "conv"),
    "pooled": (Block(lambda m, x: m.pool((x + m.conv(x)).relu()), pool=nn.MaxPool2d(2)), "conv"),
}

OTHERS: dict[str, tuple[nn.Module, str]] = {
    "no addition": (Block(lambda m, x: m.conv(x)), "does not end in an addition"),
    "down-sampling": (Block(lambda m, x: m.down(x) + m.conv(x), down=nn.Conv2d(4, 4, 1)), "skip is not the identity"),
    "padded": (CifarResNet(1, shortcut="pad").stage2[0], "skip is not the identity"),
    "scaled skip": (Block(lambda m, x: 0.5 * x + m.conv(x)), "skip is not the identity"),
    "no weight at the end": (Block(lambda m, x: x + m.act(m.conv(x)), act=nn.Sigmoid()), "ends in a Sigmoid"),
    "no affine": (
        Block(lambda m, x: x + m.plain(m.conv(x)), plain=nn.BatchNorm2d(4, affine=False)),
        "ends in a BatchNorm2d, which has no weight",
    ),
    "read twice": (Block(lambda m, x: _twice(m.conv(x), x)), "does not end"),
    "called twice": (Block(lambda m, x: x + m.conv(m.conv(x))), "calls 'conv' 2 times"),
    "twice its input": (Block(lambda m, x: x + x), "adds its input to itself"),
    "with a weight after": (Block(lambda m, x: m.norm(x + m.conv(x))), "does not end in an addition"),
    "data-dependent": (Block(lambda m, x: x + m.conv(x) if x.sum() > 0 else x), "torch.fx cannot trace it"),
    "a tuple": (Block(lambda m, x: (x + m.conv(x), x)), "does not return one tensor"),
    "a layer": (nn.Conv2d(2, 2, 1), "no layers inside"),
    "a bilinear layer": (nn.Sequential(PaddedShortcut(2, 4, 2)), "does not end in an addition"),
}


def _twice(branch: Tensor, x: Tensor) -> Tensor:
    return x + branch * branch


@pytest.mark.parametrize("name", RESIDUAL)
def test_a_closed_branch_leaves_what_follows_the_addition(name: str) -> None:
    module, last = RESIDUAL[name]
    module.eval()
    block = residual_block(module)
    assert isinstance(block, ResidualBlock), block
    assert block.last == last
    assert block.channels == 4
    assert not block.channels_last
    inputs = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    before = inputs.clone()
    layer = module.get_submodule(last)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    left = block.remainder()
    assert not left.training
    assert torch.equal(left(inputs), module(inputs.clone()))
    assert torch.equal(inputs, before)
    assert next(left.parameters(), None) is None


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_residual_block_says_why(name: str) -> None:
    module, reason = OTHERS[name]
    found = residual_block(module)
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "kind", "blocks", "last"),
    [
        ("resnet18", "BasicBlock", 5, "bn2"),
        ("resnet50", "Bottleneck", 12, "bn3"),
        ("mobilenet_v2", "InvertedResidual", 10, "conv.3"),
        ("efficientnet_b0", "MBConv", 9, "block.3.1"),
    ],
)
def test_torchvision(factory: str, kind: str, blocks: int, last: str) -> None:
    model = torchvision.models.get_model(factory)
    found = [residual_block(module) for module in model.modules() if type(module).__name__ == kind]
    assert sum(isinstance(block, ResidualBlock) for block in found) == blocks
    assert all("identity" in block or "addition" in block for block in found if isinstance(block, str))
    assert last in {block.last for block in found if isinstance(block, ResidualBlock)}


def test_linear_blocks_have_their_channels_last() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    block = residual_block(Mlp())
    assert isinstance(block, ResidualBlock)
    assert (block.last, block.channels, block.channels_last, block.after) == ("inner.2", 5, True, ())
