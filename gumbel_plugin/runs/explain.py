"""The topology of a finished run, interpreted in pictures and a summary: `gumbel-prune explain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.runs.data import load_data
from gumbel_plugin.runs.folder import CONFIG, SMALL, SUMMARY, RunFolder
from gumbel_plugin.runs.models import build_model
from gumbel_plugin.runs.result_files import write_json
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.shrinking.pruned_file import load_pruned
from gumbel_plugin.storage.files import write_bytes

if TYPE_CHECKING:
    from gumbel_plugin.insight.interpret import Importance, Node, Part, Symmetry

Namer: TypeAlias = "Callable[[Node], str]"

FOLDER = "explain"
_MOST_ROWS = 20


def explain(path: Path) -> Path:
    """Read the small network of a finished run, and write an interpretation of its topology into the run's folder.

    Files in ``explain/``: ``importance`` and ``pathways`` as PNG and SVG, ``explanation.json`` and ``explanation.md``.
    Only the network is read; the data set is asked for the shape of its inputs.

    Args:
        path: The run's folder.

    Returns:
        The folder of the explanation.

    Raises:
        DataError: If the folder holds no finished run, or a file that is needed is damaged.
        GraphError: If the network multiplies activations, so that weights on paths have no meaning.
        MissingExtraError: If matplotlib or networkx is not installed.
    """
    from gumbel_plugin.insight import interpret, pictures

    folder = RunFolder.read(path)
    folder.require(SUMMARY, CONFIG, SMALL)
    config: RunConfig = folder.contents[CONFIG]
    model, shape = _network(path, config), _input_shape(config)
    importance = interpret.feature_importance(model, {}, shape)
    graph = interpret.pathways(model, {}, shape)
    parts, alike = interpret.disjoint_parts(graph), interpret.symmetries(model, {}, shape)
    name = _namer(shape, graph.graph["input_units"], config.training.loss == "mse")
    figures = {
        "importance": pictures.importance_figure(importance, name),
        "pathways": pictures.pathways_figure(graph, name),
    }
    output = path / FOLDER
    try:
        output.mkdir(exist_ok=True)
        for title, figure in figures.items():
            write_bytes(output / f"{title}.png", pictures.as_png(figure))
            write_bytes(output / f"{title}.svg", pictures.as_svg(figure))
        write_json(output / "explanation.json", _as_json(importance, parts, alike))
        write_bytes(output / "explanation.md", _as_markdown(path, importance, (parts, alike), name).encode())
    except OSError as error:
        raise ConfigError(f"{str(output)!r} cannot be written: {error}") from error
    return output


def _network(path: Path, config: RunConfig) -> nn.Module:
    model = config.model
    if model is None:
        raise ConfigError(f"{path / CONFIG}: model: required to explain a run, but missing")
    return load_pruned(
        path / SMALL, lambda: build_model(model.name, model.num_classes, model.in_channels, **model.options)
    )


def _input_shape(config: RunConfig) -> tuple[int, ...]:
    data = config.data
    if data is None:
        raise ConfigError("data: required to explain a run, for the shape of its inputs, but missing")
    return load_data(data.name, root=data.root).input_shape


def _namer(shape: Sequence[int], input_units: int, numbers: bool) -> Namer:
    """Return what inputs and outputs are called.

    Numbers are x1, x2, ... and y1, y2, ...; channels, and rows and columns of pixels, are counted from 1, classes from
    0 as in their data sets.
    """

    def call(node: Node) -> str:
        kind, number = node
        if kind == "output":
            return f"y{number + 1}" if numbers else f"class {number}"
        if kind != "input":
            return f"{kind} {number}"
        if len(shape) == 1:
            return f"x{number + 1}"
        if input_units == shape[0]:
            return f"channel {number + 1}"
        channel, place = divmod(number, shape[-2] * shape[-1])
        row, column = divmod(place, shape[-1])
        return f"({row + 1}, {column + 1})" + f" of channel {channel + 1}" * (shape[0] > 1)

    return call


def _as_json(importance: Importance, parts: Sequence[Part], alike: Sequence[Symmetry]) -> dict[str, Any]:
    """Return plain values; inputs and outputs are counted from 0."""
    return {
        "importance": {"total": importance.total.tolist(), "per_output": importance.per_output.tolist()},
        "parts": [asdict(part) for part in parts],
        "symmetries": [asdict(group) for group in alike],
    }


def _as_markdown(
    path: Path, importance: Importance, found: tuple[Sequence[Part], Sequence[Symmetry]], name: Namer
) -> str:
    parts, alike = found
    connections = sum(part.connections for part in parts)
    lines = [
        f"# What the topology of {path.resolve().name} shows",
        "",
        f"{connections:,} weights lie on a path from an input to an output, in "
        + ("one part." if len(parts) == 1 else f"{len(parts)} parts that share nothing."),
        "",
        "![importance of the inputs](importance.svg)",
        "",
        "![paths from the inputs to the outputs](pathways.svg)",
        "",
        "## Parts",
        "",
        "| outputs | inputs | hidden units | weights |",
        "|---|---|---|---|",
        *(_part_row(part, name) for part in parts[:_MOST_ROWS]),
        *_more(len(parts)),
        "",
        "## Inputs by importance",
        "",
        "Path weight: the sum over all paths to the outputs of the product of the weights' magnitudes.",
        "",
        "| input | path weight | share |",
        "|---|---|---|",
        *_importance_rows(importance),
        "",
        "## Interchangeable inputs",
        "",
        *_symmetry_lines(alike, name),
    ]
    return "\n".join(lines) + "\n"


def _part_row(part: Part, name: Namer) -> str:
    outputs = ", ".join(name(("output", number)) for number in part.outputs)
    inputs = ", ".join(name(("input", number)) for number in part.inputs[:8]) + (
        f", … ({len(part.inputs)})" if len(part.inputs) > 8 else ""
    )
    return f"| {outputs} | {inputs or 'none: constant'} | {part.units} | {part.connections:,} |"


def _importance_rows(importance: Importance) -> list[str]:
    values = importance.total.flatten()
    everything = float(values.sum()) or 1.0
    label = _namer(importance.total.shape, len(values), False)  # of single numbers, also where units are channels
    best = values.argsort(descending=True, stable=True)[:_MOST_ROWS].tolist()
    rows = [f"| {label(('input', n))} | {float(values[n]):.4g} | {float(values[n]) / everything:.1%} |" for n in best]
    unused = int((values == 0).sum())
    return [*rows, *_more(len(values)), "", f"{unused:,} of {len(values):,} inputs reach no output."]


def _symmetry_lines(alike: Sequence[Symmetry], name: Namer) -> list[str]:
    if not alike:
        return ["None: no two inputs are connected to the same units with the same weights."]
    lines = ["| inputs | seen as | score |", "|---|---|---|"]
    for group in alike[:_MOST_ROWS]:
        names = [name(("input", number)) for number in group.inputs]
        signed = zip(names[1:], group.signs[1:], strict=True)
        seen = names[0] + "".join(f" {'+' if sign > 0 else '−'} {other}" for other, sign in signed)
        lines.append(f"| {', '.join(names)} | {seen} | {group.score:.3f} |")
    return lines + _more(len(alike))


def _more(count: int) -> list[str]:
    return ["", f"The first {_MOST_ROWS} of {count:,}."] if count > _MOST_ROWS else []
