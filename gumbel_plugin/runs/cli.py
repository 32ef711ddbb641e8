"""The command line: `gumbel-prune run` and `gumbel-prune check`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gumbel_plugin.config import PruningConfig, apply_overrides, read_yaml
from gumbel_plugin.errors import ConfigError, GumbelPluginError
from gumbel_plugin.runs.run import Column, RunResult, prepare
from gumbel_plugin.runs.run import run as run_config

app = typer.Typer(add_completion=True, no_args_is_help=True, help="Learn masks, shrink networks, prove it.",
    pretty_exceptions_enable=False)
_out = Console()
_err = Console(stderr=True)

ConfigArgument = Annotated[Path, typer.Argument(help="The run's YAML file.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Override a key: training.max_epochs=3 (repeatable).")]


@app.command()
def run(
    config: ConfigArgument,
    settings: SetOption = [],  # noqa: B006 (typer copies it)
    output: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
    force: Annotated[bool, typer.Option(help="Overwrite a finished run.")] = False,
    quiet: Annotated[bool, typer.Option(help="Only the result.")] = False,
) -> None:
    """Train with learnt masks, shrink the network, prove that it is equal, and print what it costs."""
    try:
        resolved = _load(config, settings)
        folder = output if output is not None else Path("runs") / config.stem
        progress = not quiet and sys.stderr.isatty()
        result = run_config(resolved, folder, force=force, progress=progress, say=_silent if quiet else _say)
    except GumbelPluginError as error:
        _fail(error)
    _out.print(result_table(result))
    _out.print(f"{result.equivalence}")
    _out.print(f"training with gates took {result.training_seconds:.0f} s; everything is in {folder}")


@app.command()
def check(config: ConfigArgument, settings: SetOption = []) -> None:  # noqa: B006
    """Check a configuration: build the network, find its data and what would be gated, train nothing."""
    try:
        prepared = prepare(_load(config, settings))
    except GumbelPluginError as error:
        _fail(error)
    plan = prepared.session.plan
    gates = sum(mask.hard.numel() for mask in plan.masks.values())
    _out.print(f"{config}: ok, {gates} gates in {len(plan.masks)} masks, {len(plan.scopes)} budgets")


def result_table(result: RunResult) -> Table:
    """Return the table dense / masked / small."""
    table = Table(title="result", title_justify="left")
    table.add_column("")
    for name in result.columns:
        table.add_column(name, justify="right")
    for label, cell in _ROWS:
        table.add_row(label, *(cell(column) for column in result.columns.values()))
    return table


def _latency(column: Column) -> str:
    return f"{column.profile.latency_ms[1]:.3f} ms"


def _score(column: Column) -> str:
    return "-" if column.score is None else f"{column.score:.2f}"


_ROWS: list[tuple[str, Any]] = [
    ("parameters", lambda column: f"{column.profile.parameters:,}"),
    ("non-zero", lambda column: f"{column.profile.nonzero:,}"),
    ("MACs", lambda column: f"{column.profile.macs:,}"),
    ("latency (batch 1)", _latency),
    ("file size", lambda column: f"{column.profile.file_bytes / 1024:.1f} KiB"),
    ("test score", _score),
]


def _load(path: Path, settings: list[str]) -> PruningConfig:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"config {str(path)!r} must be a mapping with a pruning section to be run")
    return PruningConfig.load(apply_overrides(values, settings))


def _say(line: str) -> None:
    _err.print(line, style="dim")


def _silent(line: str) -> None:
    pass


def _fail(error: GumbelPluginError) -> None:
    _err.print(f"error: {error}", style="red", markup=False, highlight=False)
    raise typer.Exit(1)
