"""Edges of Torch-Pruning's graph that carry no channels: one channel is broadcast over all that it meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gumbel_plugin.graph.exactness import Broadcast


def cut_broadcasts(nodes: Mapping[Any, Any], broadcasts: Mapping[int, Broadcast]) -> None:
    """Take the edges out of a graph along which channels are broadcast over others.

    Torch-Pruning sees an operation on two tensors, and takes the channels of one for those of the other.

    Args:
        nodes: The nodes of a traced graph, by module, with their dependencies.
        broadcasts: What the exactness analysis saw in the same forward, by the number of the autograd node.
    """
    for node in nodes.values():
        seen = broadcasts.get(getattr(node.grad_fn, "_sequence_nr", lambda: -1)())
        if seen is None or not _is_of(node.grad_fn, seen):
            continue
        operands = [function for function, _ in node.grad_fn.next_functions]
        present = [place for place, function in enumerate(operands) if _has_node(function, nodes)]
        if len(present) == len(node.inputs):
            for place in reversed([present.index(each) for each in seen.spread if each in present]):
                _cut(node, node.inputs.pop(place))


def _is_of(grad_fn: Any, seen: Broadcast) -> bool:
    """Whether an autograd node is that of an operation that was seen: "MulBackward0" of "aten::mul_"."""
    name = seen.operation.removeprefix("aten::").replace("_", "")
    operands = grad_fn.next_functions
    return (
        str(grad_fn.name()).lower().startswith(f"{name}backward")
        and len(operands) == len(seen.shapes)
        and all(shape_of(*operands[place]) in ((), seen.shapes[place]) for place in seen.spread)
    )


def shape_of(grad_fn: Any, number: int) -> tuple[int, ...]:
    """Return the shape of an output of the operation whose autograd node this is; empty if it is not remembered."""
    metadata = getattr(grad_fn, "_input_metadata", ())
    return tuple(metadata[number].shape) if number < len(metadata) else ()


def _has_node(function: Any, nodes: Mapping[Any, Any]) -> bool:
    """Whether Torch-Pruning's graph has a node for what computed an operand."""
    variable = getattr(function, "variable", None)
    return function is not None and (not isinstance(variable, nn.Parameter) or variable in nodes)


def _cut(node: Any, before: Any) -> None:
    """Forget one edge from a node to the next, in both directions."""
    before.outputs.remove(node)
    _forget(node.dependencies, before)
    _forget(before.dependencies[::-1], node, before.dependencies)


def _forget(dependencies: Sequence[Any], target: Any, owner: Any = None) -> None:
    """Remove the first of some dependencies on a node (in a loop there are others, which are of other edges)."""
    owner = dependencies if owner is None else owner
    found = next(each for each in dependencies if each.target is target)
    owner[:] = [each for each in owner if each is not found]
