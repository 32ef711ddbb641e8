"""Cost metrics: parameters, multiply-accumulates, file size and latency of a model, measured and not estimated.

Convention for MACs: the multiply-accumulates of convolutions (any dimension, groups, transposed), linear layers, matrix
products, recurrent cells and attention, for ONE sample, as dense arithmetic (a zero weight still costs). Biases, norms,
activations, pooling and other elementwise work are not counted. Torch-Pruning's ``count_ops_and_params`` does count
biases, batch norm, ReLU and pooling, so its numbers are larger (resnet18 at 224 pixels: 1.822e9 against 1.814e9).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.layers.example_inputs import (
    ExampleInputs,
    call_model,
    inputs_on_device_of,
    observing,
    with_batch_size,
)
from gumbel_plugin.sparsity.counting import count_macs, count_nonzero, count_parameters


@dataclass(frozen=True)
class Latency:
    """Time of one forward call.

    Attributes:
        median_ms: Median over the timed blocks, in milliseconds per call.
        iqr_ms: Interquartile range of the same, in milliseconds.
        runs: Number of timed calls.
    """

    median_ms: float
    iqr_ms: float
    runs: int


@dataclass(frozen=True)
class Profile:
    """The size and speed of one model.

    Attributes:
        parameters: Number of parameters.
        nonzero: How many of them are not zero.
        macs: Multiply-accumulates for one sample.
        file_bytes: Size of the state dict as a safetensors file.
        latency: By batch size.
    """

    parameters: int
    nonzero: int
    macs: int
    file_bytes: int
    latency: Mapping[int, Latency]

    @property
    def latency_ms(self) -> dict[int, float]:
        """Median milliseconds per call, by batch size."""
        return {batch: latency.median_ms for batch, latency in self.latency.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return plain types, ready for JSON or YAML."""
        return asdict(self)


def measure_latency(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    batch_sizes: Sequence[int] = (1,),
    min_run_time: float = 0.2,
    threads: int | None = None,
) -> dict[int, Latency]:
    """Time the forward in eval mode without gradients, on the model's device.

    Args:
        model: Left as it is.
        example_inputs: One batch; its samples are repeated or cut to each batch size.
        batch_sizes: What to measure.
        min_run_time: Seconds to spend on each batch size, at least.
        threads: CPU threads; None takes torch's present number.

    Returns:
        The latency of each batch size, in the order given.

    Raises:
        ConfigError: If an argument is out of range.
    """
    if min_run_time <= 0:
        raise ConfigError(f"min_run_time is {min_run_time}; it must be positive (seconds)")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; it must be at least 1, or None for torch's own number")
    inputs = inputs_on_device_of(model, example_inputs)
    batches = {size: with_batch_size(inputs, size) for size in batch_sizes}
    with observing(model):
        return {
            size: _time(partial(call_model, model, batch), min_run_time, threads or torch.get_num_threads())
            for size, batch in batches.items()
        }


def file_size(model: nn.Module) -> int:
    """Return the bytes of the state dict as a safetensors file; a tensor with two names is stored twice."""
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)  # a module's extra state may be anything
    }
    return len(save(tensors))


def profile(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    batch_sizes: Sequence[int] = (1,),
    min_run_time: float = 0.2,
    threads: int | None = None,
) -> Profile:
    """Measure everything; the arguments are those of `measure_latency`. No batch sizes, no timing."""
    return Profile(
        parameters=count_parameters(model),
        nonzero=count_nonzero(model),
        macs=count_macs(model, example_inputs),
        file_bytes=file_size(model),
        latency=measure_latency(
            model, example_inputs, batch_sizes=batch_sizes, min_run_time=min_run_time, threads=threads
        ),
    )


def _time(call: Callable[[], Any], min_run_time: float, threads: int) -> Latency:
    """Time a call with torch's own timer, which warms up, synchronizes a GPU and restores the thread count."""
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    measured = timer.blocked_autorange(min_run_time=min_run_time)
    runs = measured.number_per_run * len(measured.times)
    return Latency(median_ms=measured.median * 1e3, iqr_ms=measured.iqr * 1e3, runs=runs)
