"""Parameters and multiply-accumulates of a model, counted and not estimated.

Convention for MACs: the multiply-accumulates of convolutions (any dimension, groups, transposed), linear layers, matrix
products, recurrent cells and attention, for ONE sample, as dense arithmetic (a zero weight still costs). Biases, norms,
activations, pooling and other elementwise work are not counted. Torch-Pruning's ``count_ops_and_params`` does count
biases, batch norm, ReLU and pooling, so its numbers are larger (resnet18 at 224 pixels: 1.822e9 against 1.814e9).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gumbel_plugin.layers.example_inputs import ExampleInputs, batch_size_of, call_model, inputs_on_device_of, observing


def count_parameters(model: nn.Module) -> int:
    """Count the parameters; one shared by several modules counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_nonzero(model: nn.Module) -> int:
    """Count the parameters that are not exactly zero, as stored (a mask applied only in the forward does not show)."""
    return sum(int(torch.count_nonzero(parameter.detach())) for parameter in model.parameters())


@dataclass(frozen=True)
class LayerMacs:
    """Multiply-accumulates of one forward, per sample.

    Attributes:
        total: Of the whole model.
        by_module: Of every module that was called, what it calls included.
    """

    total: int
    by_module: Mapping[str, float]

    def of(self, layer: str) -> float:
        """Return those of a layer; 0 where it is not called (its parent may read its weight)."""
        return self.by_module.get(layer, 0.0)


def count_macs(model: nn.Module, example_inputs: ExampleInputs) -> int:
    """Count the multiply-accumulates of one forward in eval mode, per sample (see the module's convention).

    Args:
        model: Left as it is.
        example_inputs: A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments. The first
            dimension of the first tensor is the batch that the total is divided by.

    Raises:
        ConfigError: If the inputs have no batch dimension.
    """
    return macs_of_layers(model, example_inputs).total


def macs_of_layers(model: nn.Module, example_inputs: ExampleInputs) -> LayerMacs:
    """Count as `count_macs` does, and by layer."""
    batch = batch_size_of(example_inputs)
    inputs = inputs_on_device_of(model, example_inputs)
    counter = FlopCounterMode(display=False, custom_mapping=_MORE_FLOPS)
    with observing(model), _countable_kernels(), counter:
        call_model(model, inputs)
    per_sample = 0.5 / batch  # torch counts a multiply-accumulate as two operations
    root = f"{type(model).__name__}."
    counted = counter.get_flop_counts().items()
    layers = {name.removeprefix(root): per_sample * sum(ops.values()) for name, ops in counted}
    return LayerMacs(round(counter.get_total_flops() * per_sample), layers)


def _matrix_vector_flops(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


# Products with a vector, which torch's counter does not know. A dot product's first shape is a vector: same formula.
_MORE_FLOPS = {torch.ops.aten.mv: _matrix_vector_flops, torch.ops.aten.dot: _matrix_vector_flops}


@contextmanager
def _countable_kernels() -> Iterator[None]:
    """Switch fused kernels off, which do the work of many products under a name that torch's counter does not know.

    Measured on torch 2.13: the fast path of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, scaled
    dot-product attention on a CPU and oneDNN's LSTM all count as zero. Their plain forms count exactly.
    """
    owners: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [owner.enabled for owner in owners]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for owner in owners:
            owner.enabled = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for owner, enabled in zip(owners, before, strict=True):
            owner.enabled = enabled
