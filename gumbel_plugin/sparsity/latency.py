"""Latency as a budget: a table measured on the user's device, interpolated between the widths that were measured."""

from __future__ import annotations

import copy
import itertools
import json
import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark.utils.timer import timer  # waits for an accelerator before it reads the clock

from gumbel_plugin.errors import ConfigError, DataError, TargetError, nearest
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.layers.example_inputs import ExampleInputs, call_model, inputs_on_device_of, observing
from gumbel_plugin.layers.geometry import (
    channel_dimension,
    groups_of,
    is_depthwise,
    is_input_major,
    is_matrix,
    is_transposed,
    layer_channels,
)
from gumbel_plugin.layers.weights import read_weight
from gumbel_plugin.sparsity.cost_model import CostModel, WidthCosts, Widths
from gumbel_plugin.storage.files import write_bytes

_FORMAT = "gumbel-plugin-latency-1"
_FRACTIONS = (0.125, 0.25, 0.5, 1.0)
_RUNS = 6
"""How many forwards are timed; the first one warms up."""


@dataclass(frozen=True)
class LayerGrid:
    """One layer's measured latency.

    Attributes:
        inputs: Numbers of input channels, ascending.
        outputs: Numbers of output channels, ascending.
        milliseconds: One row per number of input channels, one column per number of output channels.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    milliseconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for points in (self.inputs, self.outputs):
            if not points or points[0] < 1 or any(low >= high for low, high in itertools.pairwise(points)):
                raise ValueError(f"numbers of channels must be positive and ascend, got {points}")
        if [len(row) for row in self.milliseconds] != [len(self.outputs)] * len(self.inputs):
            raise ValueError("milliseconds must have a row per number of inputs, a column per number of outputs")
        if not all(math.isfinite(time) and time >= 0 for row in self.milliseconds for time in row):
            raise ValueError("milliseconds must be finite and not negative")

    def scaled_to(self, milliseconds: float) -> LayerGrid:
        """Return a grid of the same form that has this time at the full widths."""
        factor = milliseconds / self.milliseconds[-1][-1] if self.milliseconds[-1][-1] > 0 else 1.0
        times = tuple(tuple(factor * time for time in row) for row in self.milliseconds)
        return LayerGrid(self.inputs, self.outputs, times)

    def plus(self, other: LayerGrid) -> LayerGrid:
        """Return the time of two calls of one layer."""
        times = torch.tensor(self.milliseconds) + torch.tensor(other.milliseconds)
        return LayerGrid(self.inputs, self.outputs, tuple(map(tuple, times.tolist())))


@dataclass(frozen=True)
class LatencyTable:
    """Latencies of a network's layers as functions of their widths, measured on one device.

    Attributes:
        device: Where it was measured, in words.
        layers: By layer name.
        rest: Milliseconds between the measured layers: normalizations, activations, pooling.
    """

    device: str
    layers: Mapping[str, LayerGrid]
    rest: float

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; the file appears whole or not at all."""
        write_bytes(path, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table that `save` wrote.

        Raises:
            DataError: If the file is missing or is no such table.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r}, not {_FORMAT!r}")
            layers = {
                name: LayerGrid(tuple(g["inputs"]), tuple(g["outputs"]), tuple(map(tuple, g["milliseconds"])))
                for name, g in content["layers"].items()
            }
            return cls(content["device"], layers, float(content["rest"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"latency table {str(path)!r} cannot be read: {error!r}") from error


def measure_table(model: nn.Module, example_inputs: ExampleInputs, *, min_run_time: float = 0.002) -> LatencyTable:
    """Measure every convolution and linear layer that a forward calls, at four widths on each side.

    Whole layers are timed in their places, where other layers' data have driven theirs out of the caches, and so is
    what lies between; how the time falls with the widths is measured on copies, once for all layers of one geometry.
    Times are the best of a few: other work on the machine only adds to them. The table depends on the network, the
    inputs' shapes and the device, not on what will be gated.

    Args:
        model: The plain model, on the device that counts; it is left as it is.
        example_inputs: One batch of the size that counts.
        min_run_time: Seconds spent on each of a geometry's (at most 16) widths, at least.

    Raises:
        ConfigError: If `min_run_time` is not positive.
    """
    if min_run_time <= 0:
        raise ConfigError(f"min_run_time is {min_run_time}; it must be positive (seconds)")
    modules = dict(model.named_modules())
    rest = 0.0
    known: dict[object, LayerGrid] = {}
    layers: dict[str, LayerGrid] = {}
    for call in _time_calls(model, example_inputs):
        if not call.shape:
            rest += call.milliseconds
            continue
        key = (_geometry(modules[call.layer]), call.shape)
        if key not in known:
            known[key] = _measure_layer(modules[call.layer], call.shape, min_run_time)
        grid = known[key].scaled_to(call.milliseconds)
        layers[call.layer] = layers[call.layer].plus(grid) if call.layer in layers else grid
    return LatencyTable(_device_of(model), layers, rest)


def latency_cost(model: nn.Module, groups: Mapping[str, ChannelGroup], table: LatencyTable) -> CostModel:
    """Return the predicted latency, in milliseconds, as a function of the gates.

    Raises:
        TargetError: If the table was measured on another network: a layer is missing on either side, or wider here.
    """
    modules = dict(model.named_modules())
    widths = Widths.of(model, groups)
    gated = [name for name in widths.layers if is_matrix(modules[name])]
    missing = [name for name in gated if name not in table.layers]
    if missing:
        raise TargetError(f"the latency table lacks layer {missing[0]!r}: was it measured on another network?")
    fixed = table.rest
    for name, grid in table.layers.items():
        if name not in modules or not is_matrix(modules[name]):
            raise TargetError(f"the latency table has layer {name!r}, which this network lacks{nearest(name, gated)}")
        before, after = layer_channels(modules[name])
        if before > grid.inputs[-1] or after > grid.outputs[-1]:
            raise TargetError(
                f"the latency table has layer {name!r} with up to {grid.inputs[-1]} and {grid.outputs[-1]} channels, "
                f"this network has it with {before} and {after}: was it measured on another network?"
            )
        if name not in widths.layers:
            fixed += float(_interpolate(grid)(torch.tensor(float(before)), torch.tensor(float(after))))
    times = [_interpolate(table.layers[name]) if name in gated else None for name in widths.layers]

    def of_widths(inputs: Tensor, outputs: Tensor) -> Tensor:
        pairs = zip(times, inputs.unbind(-1), outputs.unbind(-1), strict=True)
        costs = [torch.zeros_like(before) if time is None else time(before, after) for time, before, after in pairs]
        return torch.stack(costs, -1) if costs else inputs

    return CostModel("latency", widths, of_widths, fixed)


class _Call(NamedTuple):
    """One call of a layer in a forward, or (without a layer) what runs between two of them."""

    layer: str
    shape: torch.Size  # of its input
    milliseconds: float


def _time_calls(model: nn.Module, example_inputs: ExampleInputs) -> list[_Call]:
    """Time each call of a convolution or linear layer, and what lies between: the best of several forwards for each."""
    names = {module: name for name, module in model.named_modules() if is_matrix(module)}
    runs: list[list[_Call]] = []
    last = 0.0

    def note(layer: str, shape: torch.Size) -> None:
        nonlocal last
        now = timer()
        runs[-1].append(_Call(layer, shape, 1e3 * (now - last)))
        last = timer()

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        note("", torch.Size())

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        note(names[module], args[0].shape if args and isinstance(args[0], Tensor) else torch.Size())

    handles = [module.register_forward_pre_hook(before) for module in names]
    handles += [module.register_forward_hook(after) for module in names]
    inputs = inputs_on_device_of(model, example_inputs)
    try:
        with observing(model):
            for _ in range(_RUNS):
                runs.append([])
                last = timer()
                call_model(model, inputs)
                note("", torch.Size())
    finally:
        for handle in handles:
            handle.remove()
    return [min(calls, key=lambda call: call.milliseconds) for calls in zip(*runs, strict=True)]


def _geometry(module: nn.Module) -> object:
    """Return what a layer's time depends on besides its input's shape."""
    weight = read_weight(module)
    words = ("stride", "padding", "dilation", "groups", "transposed", "output_padding", "padding_mode")
    options = tuple(getattr(module, word, None) for word in words)
    has_bias = getattr(module, "bias", None) is not None
    return type(module), weight.shape, weight.dtype, weight.device, has_bias, options


def _measure_layer(module: nn.Module, shape: torch.Size, min_run_time: float) -> LayerGrid:
    """Time copies of a layer with fewer channels.

    Times are made monotone, or noise would reward a wider layer. As noise only ever adds, the smaller of two times
    that contradict each other is the better one: no layer takes longer than a wider one was seen to.
    """
    wide_in, wide_out = layer_channels(module)
    groups = groups_of(module)
    depthwise = is_depthwise(module)
    outputs = _points(wide_out, 1 if depthwise else groups)
    inputs = (wide_in,) if depthwise else _points(wide_in, groups)
    times = torch.empty(len(inputs), len(outputs))
    for row, in_channels in enumerate(inputs):
        for column, out_channels in enumerate(outputs):
            size = list(shape)
            size[channel_dimension(module)] = out_channels if depthwise else in_channels
            layer = _narrow(module, size[channel_dimension(module)], out_channels).eval()
            batch = layer.weight.new_ones(size)  # times do not depend on the values
            with torch.no_grad():
                times[row, column] = _milliseconds(partial(layer, batch), min_run_time)
    times = times.flip(0, 1).cummin(0).values.cummin(1).values.flip(0, 1)
    return LayerGrid(inputs, outputs, tuple(map(tuple, times.tolist())))


def _milliseconds(call: Callable[[], Any], min_run_time: float) -> float:
    """Return the best time of a call, in milliseconds: blocks of calls of about a third of the time each."""
    call()  # warms up: memory, kernels chosen by shape
    start = timer()
    call()
    once = max(timer() - start, 1e-7)
    number = max(1, round(min_run_time / 3 / once))
    best = once if number == 1 else math.inf
    for _ in range(3):
        start = timer()
        for _ in range(number):
            call()
        best = min(best, (timer() - start) / number)
    return 1e3 * best


def _device_of(model: nn.Module) -> str:
    """Return where a model was measured, in words."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    where = platform.processor() or platform.machine()
    return f"{where} {device.type.upper()}, {torch.get_num_threads()} threads"


def _points(width: int, step: int) -> tuple[int, ...]:
    return tuple(sorted({max(step, round(width * part / step) * step) for part in _FRACTIONS}))


def _narrow(module: nn.Module, in_channels: int, out_channels: int) -> Any:
    """Return a copy of a layer with the first channels only."""
    layer: Any = copy.deepcopy(module)
    groups = groups_of(module)
    kind = "features" if isinstance(module, nn.Linear) else "channels"
    rows, columns = out_channels, in_channels // groups
    if is_depthwise(module):
        layer.groups, columns = out_channels, 1
    elif is_transposed(module):
        rows, columns = in_channels, out_channels // groups
    layer.weight = nn.Parameter(layer.weight.detach()[:rows, :columns].clone())
    if isinstance(layer.bias, Tensor):
        layer.bias = nn.Parameter(layer.bias.detach()[:out_channels].clone())
    names = ("nx", "nf") if is_input_major(module) else (f"in_{kind}", f"out_{kind}")
    for name, width in zip(names, (in_channels, out_channels), strict=True):
        setattr(layer, name, width)
    return layer


def _interpolate(grid: LayerGrid) -> WidthCosts:
    """Return the bilinear interpolation of a grid, constant outside it."""
    values = torch.tensor(grid.milliseconds)

    def cost(inputs: Tensor, outputs: Tensor) -> Tensor:
        along_inputs = _hats(inputs, grid.inputs)
        return (along_inputs @ values.to(along_inputs) * _hats(outputs, grid.outputs).to(along_inputs)).sum(-1)

    return cost


def _hats(width: Tensor, points: tuple[int, ...]) -> Tensor:
    """Return each point's weight in the linear interpolation at widths (constant outside), shape (..., points)."""
    knots = width.new_tensor(points)
    if len(points) == 1:
        return torch.ones_like(width)[..., None]
    inside = (width >= points[0]) & (width <= points[-1])
    # Not clamp alone: from torch 2.14 on it has no gradient at its bounds, and the full width is one of them.
    clamped = torch.where(inside, width, width.detach().clamp(points[0], points[-1]))
    upper = torch.searchsorted(knots, clamped.detach().contiguous()).clamp(1, len(points) - 1)
    share = ((clamped - knots[upper - 1]) / (knots[upper] - knots[upper - 1]))[..., None]
    weights = width.new_zeros(*width.shape, len(points)).scatter(-1, upper[..., None] - 1, 1 - share)
    return weights.scatter(-1, upper[..., None], share)
