"""The command line: `gumbel-prune run`, `check` and `groups`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from gumbel_plugin.config import PruningConfig, apply_overrides, read_yaml
from gumbel_plugin.errors import ConfigError, GumbelPluginError

if TYPE_CHECKING:  # the commands import these themselves: help is quick, and a missing extra is an error like others
    from gumbel_plugin.runs.run import Column, RunResult

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

ConfigArgument = Annotated[Path, typer.Argument(help="The run's YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key, e.g. training.max_epochs=3 (repeatable).")
]


@app.callback()
def main() -> None:
    """Learn masks, shrink networks, and prove that what is left computes the same."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that a configuration can name a factory that lies in the current folder


@app.command()
def run(
    config: ConfigArgument,
    settings: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; runs/<config> by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
) -> None:
    """Train with learnt masks, shrink the network, prove that it is equal, and print what it costs."""
    try:
        from gumbel_plugin.runs.run import run as run_config

        folder = output if output is not None else Path("runs") / config.stem
        result = run_config(_load(config, settings), folder, force=force, say=_silent if quiet else _say)
    except (GumbelPluginError, OSError) as error:
        _fail(error)
    except (KeyboardInterrupt, SystemExit) as stop:
        typer.secho("interrupted: there is no result", err=True, fg="red")
        code = getattr(stop, "code", None)  # 143 after SIGTERM
        raise typer.Exit(code if isinstance(code, int) else 130) from None
    if result.output is None:
        return  # the first process of a distributed run has written and prints
    _print_table(result_table(result))
    typer.echo(str(result.equivalence))
    typer.echo(f"training with gates took {result.training_seconds:.0f} s; everything is in {folder}")


@app.command()
def check(config: ConfigArgument, settings: SetOption = None) -> None:
    """Check a configuration: build the network, find its data and what would be gated; train and write nothing."""
    try:
        from gumbel_plugin.runs.run import prepare

        plan = prepare(_load(config, settings)).session.plan
    except (GumbelPluginError, OSError) as error:
        _fail(error)
    gates = sum(mask.hard.numel() for mask in plan.masks.values())
    typer.echo(f"{config}: ok, {gates:,} gates in {len(plan.masks)} masks, {len(plan.scopes)} budgets")
    for scope in plan.scopes:
        units = sum(member.units for member in scope.members)
        rule = "the gates decide" if scope.ratio is None else f"{100 * scope.ratio:g} % of the weights go"
        typer.echo(f"  {scope.name}: {units:,} gates, {rule}")


@app.command()
def groups(config: ConfigArgument, settings: SetOption = None) -> None:
    """List the network's channel groups: which can be removed exactly, which cannot, and why; train nothing."""
    try:
        from gumbel_plugin.runs.run import prepare

        prepared = prepare(_load(config, settings))
    except (GumbelPluginError, OSError) as error:
        _fail(error)
    table = Table(title="channel groups", title_justify="left")
    for heading in ("group", "units", "computed by", "read by", "safety", "gated", "why not"):
        table.add_column(heading, justify="right" if heading == "units" else "left")
    places = {name: place for place, (name, _) in enumerate(prepared.model.named_modules())}
    for group in sorted(prepared.groups, key=lambda group: places.get(group.name, len(places))):
        computed, read = (", ".join(part.module for part in parts) for parts in (group.producers, group.consumers))
        gated = "yes" if group.name in prepared.session.plan.groups else "no"
        table.add_row(group.name, str(group.size), computed, read, group.safety, gated, group.reason)
    _print_table(table)


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
    ("file size", lambda column: f"{column.profile.file_bytes / 1024:,.1f} KiB"),
    ("test score", _score),
]


def _print_table(table: Table) -> None:
    """Print a table as wide as it is: a wrapped or shortened number is worse than a long line."""
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(needed, Console().width)).print(table)


def _load(path: Path, settings: list[str] | None) -> PruningConfig:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"config {str(path)!r} must be a mapping with a pruning section to be run")
    return PruningConfig.load(apply_overrides(values, settings or []))


def _say(line: str) -> None:
    typer.secho(line, err=True, dim=True)


def _silent(line: str) -> None:
    pass


def _fail(error: Exception) -> NoReturn:
    """Say in one line what is wrong, and exit with 1."""
    typer.secho(f"error: {' '.join(str(error).split())}", err=True, fg="red")
    raise typer.Exit(1)
