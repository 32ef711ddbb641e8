"""Residual blocks: which modules compute f(x + branch(x)), so that a closed branch leaves f(x)."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gumbel_plugin.layers.geometry import channel_dimension, layer_channels

_ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_ACTIVATIONS: dict[Any, Callable[[], nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU, "relu": nn.ReLU, "relu_": nn.ReLU,
    F.relu6: nn.ReLU6, F.silu: nn.SiLU, F.hardswish: nn.Hardswish,
    torch.sigmoid: nn.Sigmoid, "sigmoid": nn.Sigmoid, torch.tanh: nn.Tanh, "tanh": nn.Tanh,
}  # fmt: skip
"""What may follow the addition as a function, and the module that computes the same in eval mode."""

_KEEP_ZERO = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "Identity", "ReLU", "ReLU6", "StochasticDepth")
"""What may follow the branch's last layer: in eval mode it maps 0 to 0."""

_LAST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.Linear, nn.LayerNorm)
"""Layers whose output is exactly 0 where their weight and bias are."""


@dataclass(frozen=True)
class ResidualBlock:
    """A module that computes f(x + branch(x)), f being nothing or activations.

    Attributes:
        module: The block.
        last: Name within the block of the branch's last layer: the branch is 0 where its weight and bias are.
        after: What f is made of: names of modules within the block, or makers of modules.
    """

    module: nn.Module
    last: str
    after: tuple[str | Callable[[], nn.Module], ...]

    @property
    def channels(self) -> int:
        """How many channels go in and come out."""
        return layer_channels(self.module.get_submodule(self.last))[1]

    @property
    def channels_last(self) -> bool:
        """Whether the channels are the last dimension of the input, and not the second."""
        return channel_dimension(self.module.get_submodule(self.last)) == -1

    def remainder(self) -> nn.Module:
        """Return what is left of the block without its branch, in the block's train or eval mode."""
        parts = [copy.deepcopy(self.module.get_submodule(p)) if isinstance(p, str) else p() for p in self.after]
        left = parts[0] if len(parts) == 1 else nn.Sequential(*parts) if parts else nn.Identity()
        for part in left.modules():
            if "inplace" in part.__dict__:
                part.__dict__["inplace"] = False  # it would overwrite the block's input, which others may read
        return left.train(self.module.training)


def residual_block(module: nn.Module) -> ResidualBlock | str:
    """Return how a module is a residual block whose skip is the identity, or why it is none.

    Down-sampling blocks, whose skip is not the identity, are none.
    """
    if next(module.children(), None) is None:
        return "it has no layers inside"
    try:
        graph = fx.Tracer().trace(module)
    except Exception as error:  # whatever a user's forward raises on a proxy
        return f"torch.fx cannot trace it ({error})"
    inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        return f"it reads {len(inputs)} inputs"
    (output,) = (node for node in graph.nodes if node.op == "output")
    after: list[str | Callable[[], nn.Module]] = []
    node = output.args[0]
    while isinstance(node, fx.Node) and not _is_addition(node):
        step = _activation(module, node)
        if step is None:
            return "it does not end in an addition and activations"
        after.insert(0, step)
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return "it does not return one tensor"
    branches = [part for part in node.args if _through(module, part, ("Identity",)) is not inputs[0]]
    if len(branches) != 1:
        return "its skip is not the identity" if branches else "it adds its input to itself"
    last = _through(module, branches[0], _KEEP_ZERO)
    return _described(module, last, after)


def _described(module: nn.Module, last: Any, after: Sequence[str | Callable[[], nn.Module]]) -> ResidualBlock | str:
    """Return the block, if its branch ends in a layer that can be closed and belongs to nothing else."""
    if not isinstance(last, fx.Node) or last.op != "call_module" or len(last.users) != 1:
        return "its branch does not end in one layer"
    layer = module.get_submodule(str(last.target))
    if not isinstance(layer, _LAST) or not isinstance(layer._parameters.get("weight"), Tensor):
        return f"its branch ends in a {type(layer).__name__}, which has no weight that could close it"
    calls = [node for node in last.graph.nodes if node.op == "call_module" and node.target == last.target]
    if len(calls) > 1:
        return f"it calls {last.target!r} {len(calls)} times"
    return ResidualBlock(module, str(last.target), tuple(after))


def _is_addition(node: fx.Node) -> bool:
    operands = [part for part in node.args if isinstance(part, fx.Node)]
    return node.target in _ADDITIONS and len(operands) == len(node.args) == 2 and not node.kwargs


def _activation(module: nn.Module, node: fx.Node) -> str | Callable[[], nn.Module] | None:
    """Return the step after the addition that a node is: a module without parameters or a known function."""
    if len(node.all_input_nodes) != 1 or not node.args or len(node.users) != 1:
        return None
    if node.op == "call_module":
        step = module.get_submodule(str(node.target))
        plain = next(step.parameters(), None) is None and next(step.buffers(), None) is None
        return str(node.target) if plain else None
    return _ACTIVATIONS.get(node.target) if node.op in ("call_function", "call_method") else None


def _through(module: nn.Module, node: Any, kinds: Sequence[str]) -> Any:
    """Walk back from a node over modules (or functions) of these kinds that nothing else reads."""
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.op == "call_module":
            kind = type(module.get_submodule(str(node.target))).__name__
        else:
            kind = "StochasticDepth" if getattr(node.target, "__name__", "") == "stochastic_depth" else ""
        if kind not in kinds or not node.args:
            break
        node = node.args[0]
    return node
