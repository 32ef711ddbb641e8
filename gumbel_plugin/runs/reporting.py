"""Reports of finished runs: `gumbel-prune report` and `compare`, and the page that every run writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.insight.report_data import ReportData, comparison_rows, latency_warnings
from gumbel_plugin.runs.folder import CONFIG, GATES, LOG, REPORT, SUMMARY, RunFolder, check_output
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.storage.files import write_bytes

_SCORES = {"cross_entropy": "test accuracy (%)", "mse": "test score (negative mean squared error)"}
_VALIDATION = {"cross_entropy": "validation accuracy (%)", "mse": "validation score"}


def write_report(path: Path) -> Path:
    """Write ``report.html`` into the folder of a finished run; needs nothing but that folder.

    Returns:
        The file.

    Raises:
        DataError: If the run is not finished, or a file that is needed is damaged.
        ConfigError: If the page cannot be written.
        MissingExtraError: If jinja2 or matplotlib is not installed.
    """
    from gumbel_plugin.insight.report import render_report

    write_bytes(path / REPORT, render_report(read_result(path)).encode())
    return path / REPORT


def write_comparison(paths: Sequence[Path], file: Path) -> list[list[str]]:
    """Write a page that compares finished runs, and return its table.

    Args:
        paths: The runs' folders.
        file: The page.

    Raises:
        DataError: If one of the runs is not finished, or a file that is needed is damaged.
        ConfigError: If the runs have different kinds of scores, or the page cannot be written or is a file of a run.
    """
    from gumbel_plugin.insight.report import render_comparison

    check_output(file)
    runs = [read_result(path) for path in paths]
    scores = {run.score: run.name for run in runs}
    if len(scores) > 1:
        listed = "; ".join(f"{name!r} has the {score}" for score, name in scores.items())
        raise ConfigError(f"runs of different scores cannot be compared: {listed}")
    names = [run.name for run in runs]
    runs = [
        replace(run, name=str(path)) if names.count(run.name) > 1 else run
        for run, path in zip(runs, paths, strict=True)
    ]
    write_bytes(file, render_comparison(runs).encode())
    return comparison_rows(runs)


def read_result(path: Path) -> ReportData:
    """Read what a report shows from the folder of a finished run.

    Raises:
        DataError: If the run is not finished, or a file that is needed is damaged.
    """
    folder = RunFolder.read(path)
    folder.require(SUMMARY, CONFIG)
    summary, config = folder.contents[SUMMARY], folder.contents[CONFIG]
    facts = _facts(config, summary)
    return ReportData(
        name=path.resolve().name,
        columns=summary["columns"],
        score=_SCORES[config.training.loss],
        validation=_VALIDATION[config.training.loss],
        equivalence=summary["equivalence"],
        sparsity=summary["sparsity"],
        layers=summary["layers"],
        log=folder.contents.get(LOG, ()),
        gates=folder.contents.get(GATES, ()),
        lead=" · ".join(facts[key] for key in ("network", "data", "method")) + f" · seed {config.seed}",
        facts=facts,
        versions=summary["versions"],
        config=config.to_yaml(),
        agreement=summary.get("agreement"),
        recalibration=summary.get("recalibration"),
    )


def _facts(config: RunConfig, summary: Mapping[str, Any]) -> dict[str, str]:
    return {
        "network": config.model.name if config.model else "-",
        "data": config.data.name if config.data else "-",
        "method": config.pruning.method,
        "seed": str(config.seed),
        "finished": summary["finished"],
        "training with gates": f"{summary['training_seconds']:.0f} s",
        "machine": summary["machine"],
        "git revision": summary["git"] or "none: the current folder is in no git repository",
    }


def warnings_of(path: Path) -> list[str]:
    """Return what a finished run's report warns of."""
    return latency_warnings(read_result(path))
