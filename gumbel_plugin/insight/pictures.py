"""Pictures of what a pruned network's topology says: a map of the inputs' importance, and the paths to the outputs."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence

import networkx as nx
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gumbel_plugin.insight.connections import INPUT
from gumbel_plugin.insight.interpret import OUTPUT, Importance, Node
from gumbel_plugin.insight.report_figures import BLUE, GREY, INK, ORANGE
from gumbel_plugin.insight.report_figures import _style as figure_style

_PARTS = (BLUE, ORANGE, "#0f9d58", "#8b5cf6", "#d63384", "#0891b2", "#a16207", "#64748b")
_MOST_OUTPUTS = 20
_MOST_LABELS = 24  # in one column
_WIDEST = 5.0  # points


def importance_figure(importance: Importance, name: Callable[[int], str] | None = None) -> Figure:
    """Draw how much every input can reach the outputs: an image for images, bars for other inputs.

    Channels are summed. The colours of all maps have one scale, by the square root, so that small values show.

    Args:
        importance: What `feature_importance` returned.
        name: What an input is called in a bar chart, by its number.
    """
    shape = importance.total.shape
    with figure_style():
        if len(shape) in (2, 3) and min(shape[-2:]) > 1:
            return _maps(importance)
        return _bars(importance, name or str)


def pathways_figure(graph: nx.DiGraph, name: Callable[[Node], str] | None = None) -> Figure:
    """Draw the paths from the inputs (left) to the outputs (right), lines as wide as their weights.

    A colour is a part of the network that shares nothing with the others; a dashed line is a negative weight. Widths
    are relative to the largest weight into the same layer.

    Args:
        graph: What `pathways` returned.
        name: What a node is called.
    """
    places, rows = _layout(graph)
    columns = max((x for x, _ in places.values()), default=0) + 1
    with figure_style():
        figure = Figure(figsize=(2.0 + 2.1 * columns, min(14.0, 1.2 + 0.42 * rows)), layout="constrained")
        axis = figure.subplots()
        _draw_edges(axis, graph, places)
        _draw_nodes(axis, graph, places, name or (lambda node: f"{node[0]} {node[1]}"))
        axis.set_xlim(-0.6, columns - 0.4)
        axis.set_ylim(rows - 0.4, -1.0)
        axis.set_axis_off()
        return figure


def as_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return buffer.getvalue()


def as_svg(figure: Figure) -> bytes:
    """Return a figure as an SVG file, the same for the same figure."""
    buffer = io.BytesIO()
    with figure_style():
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return buffer.getvalue()


def _maps(importance: Importance) -> Figure:
    maps = [importance.total, *importance.per_output[:_MOST_OUTPUTS]]
    images = [values.sum(0) if values.dim() == 3 else values for values in maps]
    titles = ["all outputs", *(f"output {number}" for number in range(len(images) - 1))]
    columns = min(4, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.2 * columns + 0.6, 2.35 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    scales = [float(images[0].max()), max([float(image.max()) for image in images[1:]], default=0.0)]
    for number, (axis, image, title) in enumerate(zip(axes, images, titles, strict=False)):
        norm = PowerNorm(0.5, 0.0, scales[min(number, 1)] or 1.0)
        drawn = axis.imshow(image.numpy(), cmap="magma", norm=norm, interpolation="nearest")
        axis.set_title(title)
        if number < 2:
            last = drawn
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_axis_on()
    for axis in axes[len(images) :]:
        axis.set_visible(False)
    figure.colorbar(last, ax=axes.tolist(), label="path weight (one output)", shrink=0.6)
    return figure


def _bars(importance: Importance, name: Callable[[int], str]) -> Figure:
    """Draw a bar for every input, a colour for every output."""
    values = importance.per_output.flatten(1)
    order = values.sum(0).argsort(descending=True, stable=True)[:60].sort().values
    shown = values[:, order]
    figure = Figure(figsize=(min(14.0, 2.4 + 0.32 * len(order)), 3.0), layout="constrained")
    axis = figure.subplots()
    base = shown.new_zeros(len(order))
    for number, heights in enumerate(shown):
        colour = _PARTS[number % len(_PARTS)]
        axis.bar(range(len(order)), heights.numpy(), bottom=base.numpy(), color=colour, label=f"output {number}")
        base = base + heights
    names = [name(number) for number in order.tolist()]
    axis.set_xticks(range(len(order)), names, rotation=90 if len(order) > 12 else 0)
    axis.set_ylabel("path weight")
    axis.set_title("importance of the inputs" + (f" (the first {len(order)})" if len(order) < values.shape[1] else ""))
    if len(shown) <= _MOST_OUTPUTS:
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _layout(graph: nx.DiGraph) -> tuple[dict[Node, tuple[int, float]], float]:
    """Return every node's column and row, and how many rows there are: parts from top to bottom, few lines crossed."""
    columns = {layer: x for x, layer in enumerate(sorted({layer for _, layer in graph.nodes(data="layer")}))}
    parts: dict[int, dict[int, list[Node]]] = {}
    for node, about in sorted(graph.nodes(data=True)):
        parts.setdefault(about["part"], {}).setdefault(columns[about["layer"]], []).append(node)
    places: dict[Node, tuple[int, float]] = {}
    top = 0.0
    for part in sorted(parts):
        height = float(max(len(nodes) for nodes in parts[part].values()))
        for x, nodes in sorted(parts[part].items()):
            means = {node: _mean([places[other][1] for other in graph.predecessors(node)]) for node in nodes}
            for rank, node in enumerate(sorted(nodes, key=lambda node: (means[node], node))):
                places[node] = (x, top + (rank + 0.5) * height / len(nodes))
        top += height + 0.6
    return places, top


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _draw_edges(axis: Axes, graph: nx.DiGraph, places: Mapping[Node, tuple[int, float]]) -> None:
    largest: dict[int, float] = {}
    for _, target, weight in graph.edges(data="weight"):
        layer = graph.nodes[target]["layer"]
        largest[layer] = max(largest.get(layer, 0.0), weight)
    thickest = _WIDEST if graph.number_of_edges() <= 100 else 2.0
    for positive in (True, False):
        edges = [edge for edge in graph.edges(data=True) if (edge[2]["value"] >= 0) == positive]
        axis.add_collection(
            LineCollection(
                [(places[source], places[target]) for source, target, _ in edges],
                linewidths=[0.3 + thickest * a["weight"] / largest[graph.nodes[t]["layer"]] for _, t, a in edges],
                colors=[_colour(graph, source) for source, _, _ in edges],
                linestyles="solid" if positive else (0, (2.0, 0.8)),
                alpha=0.75,
                zorder=1,
            )
        )
    lines = [Line2D([], [], color=GREY, linewidth=2, label="positive weight")]
    lines.append(Line2D([], [], color=GREY, linewidth=2, linestyle=(0, (2.0, 0.8)), label="negative weight"))
    axis.legend(handles=lines, loc="upper right", bbox_to_anchor=(1.0, 1.04), ncols=2, handlelength=3)


def _draw_nodes(
    axis: Axes, graph: nx.DiGraph, places: Mapping[Node, tuple[int, float]], name: Callable[[Node], str]
) -> None:
    counts: dict[int, int] = {}
    titles: dict[int, str] = {}
    for node, (x, _) in places.items():
        counts[x] = counts.get(x, 0) + 1
        titles[x] = {INPUT: "inputs", OUTPUT: "outputs"}.get(node[0], node[0])
    for node, (x, y) in places.items():
        crowded = counts[x] > _MOST_LABELS
        axis.scatter([x], [y], s=9 if crowded else 60, color=_colour(graph, node), zorder=2, linewidths=0)
        if not crowded and node[0] in (INPUT, OUTPUT):
            left = node[0] == INPUT
            offset, align = ((-8, 0), "right") if left else ((8, 0), "left")
            axis.annotate(
                name(node), (x, y), xytext=offset, textcoords="offset points", ha=align, va="center", color=INK
            )
    for x, title in titles.items():
        axis.annotate(f"{title} ({counts[x]})", (x, -0.75), ha="center", fontweight="bold")


def _colour(graph: nx.DiGraph, node: Node) -> str:
    return _PARTS[graph.nodes[node]["part"] % len(_PARTS)]
