"""A run's result as one page that can be mailed: tables, pictures, the proof, and what it takes to repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gumbel_plugin.errors import MissingExtraError
from gumbel_plugin.insight.report_data import (
    COMPARISON_HEADINGS,
    ReportData,
    agreement_line,
    agreement_rows,
    comparison_rows,
    latency_warnings,
    recalibration_line,
    result_rows,
)

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
except ImportError as error:
    raise MissingExtraError("jinja2", "report") from error


def render_report(data: ReportData) -> str:
    """Return the report as one HTML page that needs no network.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    from gumbel_plugin.insight import report_figures as draw

    figures = {}
    if any(column["latency"] for column in data.columns.values()):
        figures["latency"] = draw.latency_figure(data.columns)
    if data.layers:
        figures["widths"] = draw.widths_figure(data.layers)
    if data.log:
        figures["training"] = draw.training_figure(data.log, data.validation)
    if data.gates:
        figures["gates"] = draw.gates_figure(data.gates)
    rows = result_rows(data.columns)
    agreement = None
    if data.agreement is not None:
        agreement = {"line": agreement_line(data.agreement), "rows": agreement_rows(data.agreement)}
    return _page(
        "report.html.j2",
        data=data,
        figures=figures,
        rows=rows,
        agreement=agreement,
        warnings=latency_warnings(data),
        recalibration=None if data.recalibration is None else recalibration_line(data.recalibration),
    )


def render_comparison(runs: Sequence[ReportData]) -> str:
    """Return one HTML page that compares runs: a table, and score against MACs."""
    from gumbel_plugin.insight import report_figures as draw

    points = [
        (run.name, network, float(column["macs"]), float(column["score"]))
        for run in runs
        for network, column in run.columns.items()
        if column["score"] is not None and network != "masked"  # it has the small network's score, and does more work
    ]
    figure = draw.comparison_figure(points, runs[0].score) if points else ""
    return _page("comparison.html.j2", runs=runs, figure=figure, rows=comparison_rows(runs))


def _page(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("gumbel_plugin.insight"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(headings=COMPARISON_HEADINGS, **values)
