"""The pictures of a report, as inline SVG; no pyplot, so that nothing global changes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gumbel_plugin.errors import MissingExtraError

try:
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
except ImportError as error:
    raise MissingExtraError("matplotlib", "report") from error

Rows = Sequence[Mapping[str, float]]

BLUE, ORANGE, GRAY, INK = "#2563eb", "#ea7317", "#b6bfcc", "#1f2937"
COLORS = {"dense": GRAY, "masked": ORANGE, "small": BLUE, "fine-tuned": "#0f9d58"}
_MOST_LAYERS = 24
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa4b2",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#5b6675",
    "ytick.color": "#5b6675",
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def training_figure(rows: Rows, score: str) -> str:
    """Draw loss, validation score and sparsity over the epochs.

    Args:
        rows: The epoch log; empty cells are NaN.
        score: What the validation score is called.
    """
    epochs = [row["epoch"] for row in rows]
    panels = [("training loss", "loss")]
    if any(not math.isnan(row.get("validation_score", math.nan)) for row in rows):
        panels.append((score, "validation_score"))
    with _style():
        figure = Figure(figsize=(3.6 * (len(panels) + 1), 2.7), layout="constrained")
        axes = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
        for axis, (title, key) in zip(axes, panels, strict=False):
            axis.plot(epochs, [row.get(key, math.nan) for row in rows], color=BLUE, marker=_marker(rows))
            axis.set_title(title)
        _draw_density(axes[-1], rows)
        for axis in axes:
            axis.set_xlabel("epoch")
            axis.grid(axis="y", color="#e5e9f0", linewidth=0.8)
            axis.xaxis.get_major_locator().set_params(integer=True)
        return _svg(figure, "training")


def _draw_density(axis: Any, rows: Rows) -> None:
    """Draw what the hard gates and a sample's leave, of the budget where there is one, and the target beside them."""
    has_budget = any(not math.isnan(row.get("hard_density", math.nan)) for row in rows)
    keys = ("hard_density", "expected_density") if has_budget else ("sparsity", "soft_sparsity")
    epochs = [row["epoch"] for row in rows]
    hard, soft = ([100 * row.get(key, math.nan) for row in rows] for key in keys)
    axis.fill_between(epochs, hard, soft, color=ORANGE, alpha=0.2, linewidth=0, label="soft-hard gap")
    axis.plot(epochs, hard, color=BLUE, label="hard", marker=_marker(rows))
    axis.plot(epochs, soft, color=ORANGE, linestyle="--", label="soft (expected)")
    if has_budget:
        targets = [100 * row.get("target_density", math.nan) for row in rows]
        axis.plot(epochs, targets, color="#64748b", linestyle=":", label="target")
    axis.set_title("what stays of the budget's cost (%)" if has_budget else "sparsity of what is gated (%)")
    axis.set_ylim(-2, 102)
    axis.legend()


def gates_figure(gates: Sequence[Mapping[str, Any]]) -> str:
    """Draw for every mask how many gates have which P(keep): a histogram of the end, and all epochs as columns.

    Args:
        gates: One entry an epoch: ``{"epoch": n, "masks": {name: counts per bin of [0, 1]}}``.
    """
    names = list(gates[-1]["masks"])[:_MOST_LAYERS]
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    width, height = 2.75 * columns + 0.6, 2.35 * rows + 0.3
    with _style():
        figure = Figure(figsize=(width, height))  # margins by hand: a layout engine takes seconds for so many axes
        top, bottom = 1 - 0.3 / height, 0.5 / height
        figure.subplots_adjust(0.6 / width, bottom, 1 - 0.1 / width, top, wspace=0.22, hspace=0.42)
        epochs = [entry["epoch"] for entry in gates]
        for number, name in enumerate(names):
            axis = figure.add_subplot(rows, columns, number + 1)
            _draw_gates(axis, [entry["masks"][name] for entry in gates], epochs)
            axis.set_title(_short(name, 30))
            if number % columns == 0:
                axis.set_ylabel("P(keep)")
            if number >= len(names) - columns:
                axis.set_xlabel("epoch")
        return _svg(figure, "gates")


def widths_figure(layers: Sequence[Mapping[str, Any]]) -> str:
    """Draw the output channels of every layer, before and after."""
    shown = layers[:60]
    with _style():
        figure = Figure(figsize=(8.6, 0.7 + 0.27 * len(shown)), layout="constrained")
        axis = figure.subplots()
        before = [layer["before"][1] for layer in shown]
        after = [layer["after"][1] if layer["after"] else 0 for layer in shown]
        places = range(len(shown))
        axis.barh(places, before, color="#e3e8ef", height=0.72, label="dense")
        axis.barh(places, after, color=BLUE, height=0.46, label="small")
        for place, (old, new) in enumerate(zip(before, after, strict=True)):
            text = f"{old:,}" if old == new else f"{old:,} → {new:,}"
            axis.annotate(text, (old, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_yticks(places, [_short(layer["name"], 34) for layer in shown])
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.set_xlim(0, 1.14 * max(before))
        axis.set_xlabel("output channels")
        axis.tick_params(axis="y", length=0)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return _svg(figure, "widths")


def latency_figure(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw the milliseconds per sample of every network at every batch size, with their spread."""
    batches = list(next(iter(columns.values()))["latency"])
    with _style():
        figure = Figure(figsize=(8.6, 2.6), layout="constrained")
        axes = figure.subplots(1, len(batches), squeeze=False)[0]
        for axis, batch in zip(axes, batches, strict=True):
            times = [column["latency"][batch] for column in columns.values()]
            spreads = [time["iqr_ms"] / 2 for time in times]
            below = [min(spread, time["median_ms"]) for spread, time in zip(spreads, times, strict=True)]
            axis.bar(
                list(columns),
                [time["median_ms"] for time in times],
                yerr=[below, spreads],
                color=[COLORS.get(name, "#8b5cf6") for name in columns],
                error_kw={"elinewidth": 1, "ecolor": INK, "capsize": 3},
                width=0.62,
            )
            axis.set_title(f"batch of {batch}")
        axes[0].set_ylabel("ms per call")
        return _svg(figure, "latency")


def comparison_figure(points: Sequence[tuple[str, str, float, float]], score: str) -> str:
    """Draw the score of networks against their MACs.

    Args:
        points: (run, network, MACs, score) of each.
        score: What the score is called.
    """
    with _style():
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        axis = figure.subplots()
        for network in dict.fromkeys(point[1] for point in points):
            own = [point for point in points if point[1] == network]
            color = COLORS.get(network, "#8b5cf6")
            axis.scatter([p[2] for p in own], [p[3] for p in own], color=color, s=46, label=network, zorder=3)
        for run, network, macs, value in points:
            if network != "dense":
                axis.annotate(run, (macs, value), xytext=(7, -3), textcoords="offset points", fontsize=8)
        axis.set_xscale("log")
        axis.margins(x=0.18, y=0.15)
        for formatter in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            formatter(EngFormatter(sep=""))  # 500k, 2M
        axis.set_xlabel("multiply-accumulates")
        axis.set_ylabel(score)
        axis.grid(color="#e5e9f0", linewidth=0.8, zorder=0)
        axis.legend(loc="best")
        return _svg(figure, "comparison")


def _draw_gates(axis: Any, counts: Sequence[Sequence[int]], epochs: Sequence[int]) -> None:
    """Draw one column an epoch, and bars at the right for the last one.

    Few gates must be as visible as many, so the columns' colors go with the logarithm.
    """
    first, last = epochs[0] - 0.5, epochs[-1] + 0.5
    table = [[count or math.nan for count in row] for row in zip(*counts, strict=True)]  # (bins, epochs)
    norm = LogNorm(0.5, max(2, sum(counts[0])))
    axis.imshow(
        table, "Blues", norm=norm, origin="lower", aspect="auto", interpolation="nearest", extent=(first, last, 0, 1)
    )
    end, size, span = counts[-1], 1 / len(counts[-1]), last - first
    bars = [0.3 * span * count / max(1, *end) for count in end]
    places = [(number + 0.5) * size for number in range(len(end))]
    axis.barh(places, bars, height=0.9 * size, left=last + 0.06 * span, color=ORANGE)
    axis.set_xlim(first, last + 0.4 * span)
    axis.set_ylim(0, 1)
    axis.set_yticks([0, 0.5, 1])
    middle = (epochs[0] + epochs[-1]) // 2
    axis.set_xticks(sorted({epochs[0], middle, epochs[-1]}))


def _marker(rows: Rows) -> str:
    return "o" if len(rows) < 3 else ""  # a line through one point is invisible


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _style() -> Any:
    return matplotlib.rc_context(_STYLE)


def _svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element that can stand in a page beside others."""
    with matplotlib.rc_context({"svg.hashsalt": name}):  # ids that differ between figures, and not between runs
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = re.sub(r'"image[0-9a-f]{10}"', '"image"', buffer.getvalue())  # a random id that nothing refers to
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
