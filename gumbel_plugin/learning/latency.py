"""Latency as a budget: a table measured on the user's device, interpolated between the widths that were measured."""

from __future__ import annotations

import copy
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import DataError, TargetError
from gumbel_plugin.insight.profile import measure_latency
from gumbel_plugin.learning.cost import CostModel, LayerCost, LayerFunction, is_depthwise, is_matrix, layer_widths
from gumbel_plugin.masks.targets import ChannelGroup
from gumbel_plugin.shrinking.inputs import ExampleInputs, call_model, observing

_FORMAT = "gumbel-plugin-latency-1"
_FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)


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


@dataclass(frozen=True)
class LatencyTable:
    """Latencies of a network's layers as functions of their widths, measured on one device.

    Attributes:
        device: Where it was measured, in words.
        layers: By layer name.
        rest: Milliseconds of the whole network that no measured layer accounts for.
    """

    device: str
    layers: Mapping[str, LayerGrid]
    rest: float

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; the file appears whole or not at all."""
        temporary = Path(f"{path}.partial")
        temporary.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1), encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table that `save` wrote.

        Raises:
            DataError: If the file is missing or is no such table.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            layers = {
                name: LayerGrid(tuple(g["inputs"]), tuple(g["outputs"]), tuple(map(tuple, g["milliseconds"])))
                for name, g in content["layers"].items()
            }
            return cls(content["device"], layers, float(content["rest"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"latency table {str(path)!r} cannot be read: {error!r}") from error


def measure_table(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    example_inputs: ExampleInputs,
    min_run_time: float = 0.02,
) -> LatencyTable:
    """Measure every layer that a group reads or computes, at five widths on each side.

    Args:
        model: The plain model, on the device that counts.
        groups: The groups that would be gated.
        example_inputs: One batch of the size that counts.
        min_run_time: Seconds spent on each of a layer's (at most 25) widths.
    """
    widths = {name: pair for name, pair in layer_widths(model, groups).items() if is_matrix(model.get_submodule(name))}
    shapes = _input_shapes(model, list(widths), example_inputs)
    layers = {}
    for name in widths:
        if name in shapes:
            layers[name] = _measure_layer(model.get_submodule(name), shapes[name], min_run_time)
    whole = measure_latency(model, example_inputs, batch_sizes=(_batch(shapes),), min_run_time=10 * min_run_time)
    parts = sum(grid.milliseconds[-1][-1] for grid in layers.values())
    rest = max(0.0, next(iter(whole.values())).median_ms - parts)
    parameter = next(model.parameters())
    where = torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else f"{platform.processor()} CPU"
    return LatencyTable(f"{where}, {torch.get_num_threads()} threads", layers, rest)


def latency_cost(model: nn.Module, groups: Mapping[str, ChannelGroup], table: LatencyTable) -> CostModel:
    """Return the predicted latency, in milliseconds, as a function of the gates.

    Raises:
        TargetError: If the table was measured on another network.
    """
    widths = layer_widths(model, groups)
    missing = sorted(name for name in table.layers if name not in widths)
    if missing:
        raise TargetError(f"the latency table has layer {missing[0]!r}, which this network does not gate")
    layers = [
        LayerCost(name, inputs, outputs, _interpolate(table.layers[name]))
        for name, (inputs, outputs) in widths.items()
        if name in table.layers
    ]
    return CostModel("latency", layers, table.rest)


def _input_shapes(model: nn.Module, names: list[str], example_inputs: ExampleInputs) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            shapes[name] = args[0].shape

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    try:
        with observing(model):
            call_model(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _batch(shapes: Mapping[str, torch.Size]) -> int:
    return next(iter(shapes.values()))[0] if shapes else 1


def _measure_layer(module: nn.Module, shape: torch.Size, min_run_time: float) -> LayerGrid:
    """Time copies of a layer with fewer channels. Times are made monotone: noise must not reward a wider layer."""
    wide_in, wide_out = _width(module, "in"), _width(module, "out")
    step = int(getattr(module, "groups", 1))  # type: ignore[arg-type]
    if is_depthwise(module):
        inputs, step = (wide_in,), 1
    else:
        inputs = _points(wide_in, step)
    outputs = _points(wide_out, step)
    times = torch.empty(len(inputs), len(outputs))
    channel_dim = -1 if isinstance(module, nn.Linear) else 1
    weight = next(module.parameters())
    for row, in_channels in enumerate(inputs):
        for column, out_channels in enumerate(outputs):
            narrow_in = out_channels if is_depthwise(module) else in_channels
            size = list(shape)
            size[channel_dim] = narrow_in
            layer = _narrow(module, narrow_in, out_channels)
            found = measure_latency(
                layer, torch.randn(size).to(weight), batch_sizes=(size[0],), min_run_time=min_run_time
            )
            times[row, column] = next(iter(found.values())).median_ms
    times = times.cummax(0).values.cummax(1).values
    return LayerGrid(inputs, outputs, tuple(tuple(row) for row in times.tolist()))


def _points(width: int, step: int) -> tuple[int, ...]:
    return tuple(sorted({max(step, round(width * part / step) * step) for part in _FRACTIONS}))


def _width(module: nn.Module, side: str) -> int:
    return int(getattr(module, f"{side}_channels", None) or getattr(module, f"{side}_features"))


def _narrow(module: nn.Module, in_channels: int, out_channels: int) -> nn.Module:
    """Return a copy of a layer with the first channels only."""
    layer = copy.deepcopy(module)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    groups = int(getattr(module, "groups", 1))  # type: ignore[arg-type]
    kind = "features" if isinstance(module, nn.Linear) else "channels"
    if is_depthwise(module):
        layer.groups, rows, columns = out_channels, out_channels, 1
    else:
        rows, columns = out_channels, in_channels // groups
        if getattr(module, "transposed", False):
            rows, columns = in_channels, out_channels // groups
    layer.weight = nn.Parameter(weight.detach()[:rows, :columns].clone())
    if isinstance(layer.bias, Tensor):
        layer.bias = nn.Parameter(layer.bias.detach()[:out_channels].clone())
    setattr(layer, f"in_{kind}", in_channels)
    setattr(layer, f"out_{kind}", out_channels)
    return layer


def _interpolate(grid: LayerGrid) -> LayerFunction:
    """Return the bilinear interpolation of a grid, constant outside it."""
    values = torch.tensor(grid.milliseconds)

    def cost(inputs: Tensor, outputs: Tensor) -> Tensor:
        along_inputs = _hats(inputs, grid.inputs)
        return along_inputs @ values.to(along_inputs) @ _hats(outputs, grid.outputs).to(along_inputs)

    return cost


def _hats(width: Tensor, points: tuple[int, ...]) -> Tensor:
    """Return each point's weight in the linear interpolation at a width (constant outside the points)."""
    knots = width.new_tensor(points)
    if len(points) == 1:
        return width.new_ones(1)
    clamped = width.clamp(points[0], points[-1])
    upper = int(torch.searchsorted(knots, clamped.detach()).clamp(1, len(points) - 1))
    share = (clamped - knots[upper - 1]) / (knots[upper] - knots[upper - 1])
    weights = [width.new_zeros(()) for _ in points]
    weights[upper - 1], weights[upper] = 1 - share, share
    return torch.stack(weights)
