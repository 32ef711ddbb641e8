"""Pictures of what a pruned network's topology shows: a map of the inputs' importance, and the paths to the outputs."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import networkx as nx
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gumbel_plugin.insight.connections import INPUT, OUTPUT
from gumbel_plugin.insight.interpret import Importance, Node
from gumbel_plugin.insight.report_figures import BLUE, GRAY, INK, ORANGE
from gumbel_plugin.insight.report_figures import _style as figure_style

_PARTS = (BLUE, ORANGE, "#0f9d58", "#8b5cf6", "#d63384", "#0891b2", "#a16207", "#64748b")
_MOST_OUTPUTS = 20
_MOST_LABELS = 24  # in one column
_WIDEST = 5.0  # points
_SWEEPS = 9


def node_name(node: Node) -> str:
    """Return what a node is called where nothing better is known: its layer and its number, from 0."""
    return f"{node[0]} {node[1]}"


def importance_figure(importance: Importance, name: Callable[[Node], str] = node_name) -> Figure:
    """Draw how much every input can reach the outputs: an image for images, bars for other inputs.

    Channels are summed. The colors of all maps have one scale, by the square root, so that small values show.

    Args:
        importance: What `feature_importance` returned.
        name: What an input or an output is called, ``("input", i)`` or ``("output", k)``.
    """
    shape = importance.total.shape
    with figure_style():
        if len(shape) in (2, 3) and min(shape[-2:]) > 1:
            return _maps(importance, name)
        return _bars(importance, name)


def pathways_figure(graph: nx.DiGraph, name: Callable[[Node], str] = node_name) -> Figure:
    """Draw the paths from the inputs (left) to the outputs (right), lines as wide as their weights.

    A color is a part of the network that shares nothing with the others (the sign, if there is one part only); a
    dashed line is a negative weight. Widths are relative to the largest weight into the same layer.

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
        _draw_nodes(axis, graph, places, name)
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
    with figure_style(), matplotlib.rc_context({"svg.hashsalt": "gumbel-prune"}):  # or ids would be random
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return buffer.getvalue()


def _maps(importance: Importance, name: Callable[[Node], str]) -> Figure:
    maps = [importance.total, *importance.per_output[:_MOST_OUTPUTS]]
    images = [values.sum(0) if values.dim() == 3 else values for values in maps]
    titles = ["all outputs", *(name((OUTPUT, number)) for number in range(len(images) - 1))]
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


def _bars(importance: Importance, name: Callable[[Node], str]) -> Figure:
    """Draw a bar for every input, a color for every output."""
    values = importance.per_output.flatten(1)
    order = values.sum(0).argsort(descending=True, stable=True)[:60].sort().values
    shown = values[:, order]
    figure = Figure(figsize=(min(14.0, 3.0 + 0.32 * len(order)), 3.0), layout="constrained")
    axis = figure.subplots()
    base = shown.new_zeros(len(order))
    for number, heights in enumerate(shown):
        color = _PARTS[number % len(_PARTS)]
        axis.bar(range(len(order)), heights.numpy(), bottom=base.numpy(), color=color, label=name((OUTPUT, number)))
        base = base + heights
    names = [name((INPUT, number)) for number in order.tolist()]
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
        ranks = _untangled(graph, parts[part])
        for x, nodes in parts[part].items():
            for node in nodes:
                places[node] = (x, top + (ranks[node] + 0.5) * height / len(nodes))
        top += height + 0.6
    return places, top


def _untangled(graph: nx.DiGraph, columns: Mapping[int, Sequence[Node]]) -> dict[Node, int]:
    """Return every node's rank in its column, by the mean rank of its neighbors in turn from left and right."""
    ranks = {node: rank for nodes in columns.values() for rank, node in enumerate(nodes)}
    order = sorted(columns)
    for sweep in range(_SWEEPS):
        backwards = sweep % 2 == 1
        neighbors = graph.successors if backwards else graph.predecessors
        for x in reversed(order) if backwards else order:
            heights = {node: _height([ranks[other] for other in neighbors(node)], ranks[node]) for node in columns[x]}
            by_height = sorted((heights[node], ranks[node], node) for node in columns[x])
            for rank, (_, _, node) in enumerate(by_height):
                ranks[node] = rank
    return ranks


def _height(neighbors: Sequence[int], own: int) -> float:
    return sum(neighbors) / len(neighbors) if neighbors else float(own)


def _draw_edges(axis: Axes, graph: nx.DiGraph, places: Mapping[Node, tuple[int, float]]) -> None:
    largest: dict[int, float] = {}
    for _, target, weight in graph.edges(data="weight"):
        layer = graph.nodes[target]["layer"]
        largest[layer] = max(largest.get(layer, 0.0), weight)
    thickest = _WIDEST if graph.number_of_edges() <= 100 else 2.0
    several = _has_parts(graph)
    for positive in (True, False):
        edges = [edge for edge in graph.edges(data=True) if (edge[2]["value"] >= 0) == positive]
        axis.add_collection(
            LineCollection(
                [(places[source], places[target]) for source, target, _ in edges],
                linewidths=[0.3 + thickest * a["weight"] / largest[graph.nodes[t]["layer"]] for _, t, a in edges],
                colors=[_colour(graph, s) if several else BLUE if positive else ORANGE for s, _, _ in edges],
                linestyles="solid" if positive else (0, (2.0, 0.8)),
                alpha=0.75,
                zorder=1,
            )
        )
    colors = (GRAY, GRAY) if several else (BLUE, ORANGE)
    lines = [Line2D([], [], color=colors[0], linewidth=2, label="positive weight")]
    lines.append(Line2D([], [], color=colors[1], linewidth=2, linestyle=(0, (2.0, 0.8)), label="negative weight"))
    axis.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, handlelength=3)


def _draw_nodes(
    axis: Axes, graph: nx.DiGraph, places: Mapping[Node, tuple[int, float]], name: Callable[[Node], str]
) -> None:
    several = _has_parts(graph)
    columns: dict[int, list[Node]] = {}
    for node, (x, _) in places.items():
        columns.setdefault(x, []).append(node)
    for x, nodes in columns.items():
        crowded = len(nodes) > _MOST_LABELS
        colors = [_colour(graph, node) if several else INK for node in nodes]
        heights = [places[node][1] for node in nodes]
        axis.scatter([x] * len(nodes), heights, s=9 if crowded else 60, color=colors, zorder=2, linewidths=0)
        title = {INPUT: "inputs", OUTPUT: "outputs"}.get(nodes[0][0], nodes[0][0])
        axis.annotate(f"{title} ({len(nodes)})", (x, -0.75), ha="center", fontweight="bold")
        for node in () if crowded else nodes:
            _label(axis, node, places[node], name)


def _label(axis: Axes, node: Node, place: tuple[int, float], name: Callable[[Node], str]) -> None:
    """Name an input on its left, an output on its right, and nothing between them."""
    if node[0] in (INPUT, OUTPUT):
        left = node[0] == INPUT
        offset, align = ((-8, 0), "right") if left else ((8, 0), "left")
        axis.annotate(name(node), place, xytext=offset, textcoords="offset points", ha=align, va="center")


def _colour(graph: nx.DiGraph, node: Node) -> str:
    return _PARTS[graph.nodes[node]["part"] % len(_PARTS)]


def _has_parts(graph: nx.DiGraph) -> bool:
    return len({part for _, part in graph.nodes(data="part")}) > 1
