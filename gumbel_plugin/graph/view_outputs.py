"""Layers that return a view, followed by an activation in place: the graph must not lose the layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn


@contextmanager
def own_outputs(graph: Any, model: nn.Module) -> Iterator[None]:
    """Let every layer of a graph return a tensor of its own while the model is traced.

    Torch-Pruning knows a layer by the autograd node of its output. Where that is a view (of an instance norm, or of a
    linear layer on sequences), an operation in place makes autograd write the view's node anew: the layer would be
    missing in the graph.

    Args:
        graph: The `torch_pruning.DependencyGraph` that is being built.
        model: Its model.
    """
    layers = [module for module in model.modules() if _is_layer(graph, module)]
    handles = [layer.register_forward_hook(_without_view) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_layer(graph: Any, module: nn.Module) -> bool:
    known = tp.ops.module2type(module) != tp.ops.OPTYPE.ELEMENTWISE
    return known or type(module) in graph.CUSTOMIZED_PRUNERS


def _without_view(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor) and output._is_view() and output.requires_grad:
        return output.clone()
    if type(output) is tuple and output and isinstance(output[0], Tensor) and output[0]._is_view():
        return (output[0].clone(), *output[1:])
    return None
