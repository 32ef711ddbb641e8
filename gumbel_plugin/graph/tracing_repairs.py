"""What Torch-Pruning 1.6.1 gets wrong while it builds a dependency graph, repaired from outside; one function each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from types import SimpleNamespace
from typing import Any

import torch_pruning as tp
from torch import nn
from torch_pruning.dependency import index_mapping, shape_infer

from gumbel_plugin.graph.broadcast_edges import cut_broadcasts, shape_of
from gumbel_plugin.graph.guarded_graph import find_sizes, number_channels
from gumbel_plugin.graph.input_major_pruner import InputMajorPruner

_Nodes = dict[Any, Any]


def plain_views(nodes: _Nodes) -> None:
    """Let a view that is no flattening leave channel numbers alone.

    Torch-Pruning takes every view between unequal channel counts for a flattening and multiplies or divides channel
    numbers by the ratio of counts that it guesses. For the windows of MaxViT the numbers grow on every round through
    the graph, without end; for ShuffleNetV2's channel shuffle a count is guessed larger than it is, and the ratio is 0.
    """
    for node in nodes.values():
        before, after = _shapes(node.grad_fn)
        if node.type == tp.ops.OPTYPE.RESHAPE and before and not (_flattens(before, after) or _flattens(after, before)):
            node.type = tp.ops.OPTYPE.ELEMENTWISE  # its numbers pass unchanged


def known_splits(nodes: _Nodes) -> None:
    """Set the sizes of the parts of a `chunk` or `split` of feature maps.

    Torch-Pruning looks for the shape under the name that autograd gave it before torch 2.0, and guesses the sizes from
    the layers that follow. Where none follows at once, as in ShuffleNetV2, a size is missing and the graph not built.
    """
    for node in nodes.values():
        shape: Sequence[int] = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
        size: int = getattr(node.grad_fn, "_saved_split_size", 0)
        if node.type == tp.ops.OPTYPE.SPLIT and size and len(shape) == 4 and node.grad_fn._saved_dim == 1:
            sizes = [min(size, shape[1] - start) for start in range(0, shape[1], size)]
            node.grad_fn = SimpleNamespace(_saved_split_sizes=sizes, _saved_dim=1)


def known_joins(nodes: _Nodes) -> None:
    """Set the sizes of the parts of a concatenation.

    Torch-Pruning guesses them from the layers before, and gives up after 500 steps. In networks as deep as Swin3D small
    that leaves a size open, which it then adds to the others.
    """
    for node in nodes.values():
        parts = getattr(node.grad_fn, "next_functions", ())
        shapes = [shape_of(function, number) for function, number in parts]
        if node.type == tp.ops.OPTYPE.CONCAT and len(shapes) == len(node.inputs) and all(shapes):
            dim = _signed(node.grad_fn._saved_dim, len(shapes[0]))
            node.module.concat_sizes = [shape[dim] for shape in shapes]


def plain_splits(nodes: _Nodes) -> None:
    """Let a split leave channel numbers alone that Torch-Pruning would miscount.

    It numbers what reads the pieces, not the pieces, and looks for more pieces than there are where one is read twice
    (C2f of YOLOv8); and it takes sizes along other dimensions, as of images in a batch, for channels. Where channels
    are really cut, the group is read from the labels (see `label_groups`).
    """
    for node in nodes.values():
        pieces = len(getattr(node.grad_fn, "_input_metadata", ()))
        if node.type == tp.ops.OPTYPE.SPLIT and pieces:
            shape = tuple(getattr(node.grad_fn, "_saved_self_sym_sizes", ())) or shape_of(node.grad_fn, 0)
            dim = _signed(node.grad_fn._saved_dim, len(shape)) % len(shape)
            if len(node.outputs) > pieces or dim == 0 or (len(shape) > 3 and dim != 1):
                node.type = tp.ops.OPTYPE.ELEMENTWISE


REPAIRS: list[Callable[[_Nodes], None]] = [plain_views, plain_splits, known_splits, known_joins]
"""Each takes the nodes of a traced graph, by module, and changes what is wrong with them."""


class FrozenNormPruner(tp.BasePruningFunc):  # type: ignore[misc]
    """Cuts frozen batch norms, which pretrained detection backbones have (torchvision's `FrozenBatchNorm2d`, DETR's).

    Their weight, bias and statistics are buffers. Torch-Pruning cuts no buffers but those of `nn.BatchNorm2d`.
    """

    BUFFERS = frozenset(("weight", "bias", "running_mean", "running_var"))

    @classmethod
    def suits(cls, layer: nn.Module) -> bool:
        """Whether a layer is one, of whatever library."""
        buffers = dict(layer.named_buffers(recurse=False))
        return buffers.keys() >= cls.BUFFERS and next(layer.parameters(), None) is None

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Remove channels, in place."""
        removed = set(idxs)
        kept = [channel for channel in range(self.get_out_channels(layer)) if channel not in removed]
        for name in self.BUFFERS:
            setattr(layer, name, layer.get_buffer(name)[kept])
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int:
        """Return how many channels there are."""
        return len(layer.get_buffer("weight"))

    get_in_channels = get_out_channels


class InstanceNormPruner(tp.pruner.function.InstanceNormPruner):  # type: ignore[misc]
    """Cuts instance norms that keep running statistics, too; Torch-Pruning leaves those as they are."""

    BUFFERS = ("running_mean", "running_var")

    @classmethod
    def suits(cls, layer: nn.Module) -> bool:
        """Whether a layer is an instance norm with running statistics."""
        return isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.running_mean is not None

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Remove channels, in place."""
        removed = set(idxs)
        kept = [channel for channel in range(self.get_out_channels(layer)) if channel not in removed]
        for name in self.BUFFERS:
            if layer._buffers[name] is not None:
                setattr(layer, name, layer.get_buffer(name)[kept])
        super().prune_out_channels(layer, idxs)
        return layer

    prune_in_channels = prune_out_channels


CHANNELWISE_PRUNERS = (FrozenNormPruner, InstanceNormPruner)
"""What cuts layers that treat every channel by itself."""


def missing_pruners(model: nn.Module) -> dict[type[nn.Module], tp.BasePruningFunc]:
    """Return what cuts those layers of a model that Torch-Pruning does not know: its ``customized_pruners``."""
    kinds = (*CHANNELWISE_PRUNERS, InputMajorPruner)
    pairs = [(type(layer), kind) for layer in model.modules() for kind in kinds if kind.suits(layer)]
    return {layer: kind() for layer, kind in pairs}


@contextmanager
def repaired_tracing() -> Iterator[None]:
    """Apply all repairs to every graph that Torch-Pruning builds meanwhile."""
    original = tp.DependencyGraph._build_dependency
    numbering, sizing = index_mapping.update_index_mapping, shape_infer.init_shape_information

    def build(graph: Any, nodes: _Nodes) -> None:
        original(graph, nodes)
        cut_broadcasts(nodes, graph.analysis.broadcasts if hasattr(graph, "analysis") else {})
        for repair in REPAIRS:
            repair(nodes)

    tp.DependencyGraph._build_dependency = build
    index_mapping.update_index_mapping, shape_infer.init_shape_information = number_channels, find_sizes
    try:
        yield
    finally:
        tp.DependencyGraph._build_dependency = original
        index_mapping.update_index_mapping, shape_infer.init_shape_information = numbering, sizing


def _signed(dim: int, rank: int) -> int:
    """Return a dimension that autograd may have kept, if negative, as an unsigned number."""
    return dim if dim < rank else dim - 2**64


def _shapes(grad_fn: Any) -> tuple[Sequence[int], Sequence[int]]:
    """Return the shapes before and after a view, as autograd remembers them; empty where it does not."""
    before, after = tuple(getattr(grad_fn, "_saved_self_sym_sizes", ())), shape_of(grad_fn, 0)
    return (before, after) if before and after else ((), ())


def _flattens(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether all dimensions from the channels on become one: (N, C, H, W) to (N, C·H·W), or (C, H, W) to (C·H·W)."""
    if len(after) == 1 and len(before) > 2:
        return prod(before) == after[0]
    return len(after) == 2 < len(before) and before[0] == after[0] and prod(before[1:]) == after[1]
