"""The command line, `gumbel-prune`: each command reads its arguments here, and its work lies in a file of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from gumbel_plugin.errors import ConfigError, GumbelPluginError, shorten, shown_path
from gumbel_plugin.insight.report_data import COMPARISON_HEADINGS, agreement_line, result_rows
from gumbel_plugin.runs.folder import CONFIG, SUMMARY
from gumbel_plugin.runs.interruption import Interruption
from gumbel_plugin.runs.lock import locked
from gumbel_plugin.runs.overrides import apply_overrides
from gumbel_plugin.runs.reporting import warnings_of
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.storage.yaml_files import read_yaml

if TYPE_CHECKING:  # the commands import these themselves: help is quick, and a missing extra is an error like others
    from gumbel_plugin.runs.run import RunResult

_USER_ERRORS = (GumbelPluginError, OSError, ImportError)  # the last from a module of the user's own

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
    config: Annotated[Path | None, typer.Argument(help="The run's YAML file.")] = None,
    settings: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; runs/<config> by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a finished run.")] = False,
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted run in this folder.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
) -> None:
    """Train with learned masks, shrink the network, prove that it is equal, and print what it costs."""
    if (config is None and resume is None) or (resume is not None and (output is not None or force)):
        raise typer.BadParameter("give a CONFIG, or --resume DIR alone or with the CONFIG that it was begun with")
    folder = resume or output or Path("runs") / (config or Path()).stem
    try:
        with Interruption() as interruption:
            from gumbel_plugin.runs.progress import following
            from gumbel_plugin.runs.run import run as run_config

            resolved, again = _load(config or folder / CONFIG, settings), resume is not None
            with following(quiet, interruption.check) as (log, followers):
                result = run_config(resolved, folder, force=force, resume=again, log=log, followers=followers)
            _print_result(result, folder)
    except _USER_ERRORS as error:
        _fail(error)
    except (KeyboardInterrupt, SystemExit) as stop:
        typer.secho(f"interrupted: {_after_interruption(folder)}", err=True, fg="red")
        code = getattr(stop, "code", None)  # 143 after SIGTERM
        raise typer.Exit(code if isinstance(code, int) else 130) from None


def _after_interruption(folder: Path) -> str:
    """Return what an interrupted run left, and how to go on."""
    if (folder / SUMMARY).exists():
        return f"{folder} holds a finished run; gumbel-prune report {folder} writes its report anew"
    if (folder / CONFIG).exists():
        return f"there is no result; gumbel-prune run --resume {folder} goes on"
    return "there is no result, and nothing was begun"


def _print_result(result: RunResult, folder: Path) -> None:
    if result.output is None:
        return  # the first process of a distributed run has written and prints
    _print_table(result_table(result))
    for warning in warnings_of(folder):
        typer.echo(f"warning: {warning}")
    if result.agreement is not None:
        typer.echo(f"agreement: {agreement_line(result.agreement.as_dict())}")
    typer.echo(str(result.equivalence))
    typer.echo(f"training with gates took {result.training_seconds:.0f} s; everything is in {folder}")
    if result.report is not None:
        typer.echo(f"report: {result.report}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
) -> None:
    """Write the report of a finished run anew."""
    try:
        from gumbel_plugin.runs.reporting import read_result, write_report

        with _hold(folder):
            page, data = write_report(folder), read_result(folder)
    except _USER_ERRORS as error:
        _fail(error)
    _print_table(_table("result", ["", *data.columns], [[label, *cells] for label, cells in result_rows(data.columns)]))
    if data.agreement is not None:
        typer.echo(f"agreement: {agreement_line(data.agreement)}")
    typer.echo(f"report: {page}")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="The folders of finished runs.")],
    output: Annotated[Path, typer.Option(help="The page with table and plot.")] = Path("comparison.html"),
) -> None:
    """Compare finished runs: one table, and one plot of score against MACs."""
    try:
        from gumbel_plugin.runs.reporting import write_comparison

        rows = write_comparison(folders, output)
    except _USER_ERRORS as error:
        _fail(error)
    _print_table(_table("comparison", COMPARISON_HEADINGS, rows))
    typer.echo(f"comparison: {output}")


@app.command()
def explain(folder: Annotated[Path, typer.Argument(help="The folder of a finished run.")]) -> None:
    """Interpret the small network's topology: which inputs matter, along which paths, and which are alike."""
    try:
        from gumbel_plugin.runs.explain import explain as explain_run

        with _hold(folder):
            written = explain_run(folder)
    except _USER_ERRORS as error:
        _fail(error)
    typer.echo(f"explanation: {written / 'explanation.md'}, with pictures beside it")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    kind: Annotated[str, typer.Option("--format", help="onnx, pt2 or safetensors.")],
    output: Annotated[Path | None, typer.Option(help="The file; <folder>/small.<format> by default.")] = None,
) -> None:
    """Export the small network, compared with the original before the file appears."""
    try:
        from gumbel_plugin.runs.export import export_run

        with _hold(folder) if output is None else nullcontext():
            file, error_found = export_run(folder, kind, output)
    except _USER_ERRORS as error:
        _fail(error)
    typer.echo(f"{file}: equal to the small network up to {error_found:.1e} of its output, at any batch size")


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The YAML file to write.")] = Path("gumbel-prune.yaml"),
    method: Annotated[str, typer.Option(help="The mask method.")] = "gumbel_softmax",
    model: Annotated[str, typer.Option(help="The network.")] = "digits_cnn",
    data: Annotated[str, typer.Option(help="The data set.")] = "digits",
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write a commented configuration to start from."""
    try:
        from gumbel_plugin.runs.starter import write_starter

        write_starter(file, method, model, data, force=force)
    except _USER_ERRORS as error:
        _fail(error)
    typer.echo(f"{file}: start with gumbel-prune run {file}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a configuration, for editors."""
    from gumbel_plugin.runs.starter import schema_text

    typer.echo(schema_text(), nl=False)


@app.command()
def check(config: ConfigArgument, settings: SetOption = None) -> None:
    """Check a configuration: build the network, find its data and what would be gated; train and write nothing."""
    try:
        from gumbel_plugin.runs.run import prepare

        prepared = prepare(_load(config, settings))
    except _USER_ERRORS as error:
        _fail(error)
    plan, metric = prepared.session.plan, prepared.config.pruning.budget.metric or "weights"
    gates = sum(mask.hard.numel() for mask in plan.masks.values())
    typer.echo(f"{config}: ok, {gates:,} gates in {len(plan.masks)} masks, {len(plan.budgets)} budgets")
    for budget in plan.budgets:
        units = sum(term.units for term in budget.terms)
        rule = "the gates decide" if budget.ratio is None else f"{100 * budget.ratio:g} % of the {metric} go"
        typer.echo(f"  {budget.name}: {units:,} gates, {rule}")


@app.command()
def groups(config: ConfigArgument, settings: SetOption = None) -> None:
    """List the network's channel groups: which can be removed exactly, which cannot, and why; train nothing."""
    try:
        from gumbel_plugin.runs.run import prepare

        prepared = prepare(_load(config, settings))
    except _USER_ERRORS as error:
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


def _hold(folder: Path) -> AbstractContextManager[None]:
    """Return what keeps a run, which may be replacing this one, out of its folder; one that is missing has no lock."""
    return locked(folder) if folder.is_dir() else nullcontext()


def result_table(result: RunResult) -> Table:
    """Return the table dense / masked / small."""
    columns = {name: column.as_dict() for name, column in result.columns.items()}
    return _table("result", ["", *columns], [[label, *cells] for label, cells in result_rows(columns)])


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _print_table(table: Table) -> None:
    """Print a table as wide as it is: a wrapped or shortened number is worse than a long line."""
    needed = Console(width=1000).measure(table).maximum
    Console(width=max(needed, Console().width)).print(table)


def _load(path: Path, settings: list[str] | None) -> RunConfig:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"config {shown_path(path)} must be a mapping with a pruning section to be run")
    return RunConfig.load(apply_overrides(values, settings or []))


def _fail(error: Exception) -> NoReturn:
    """Print in one line what is wrong, and exit with 1."""
    typer.secho(f"error: {shorten(' '.join(str(error).split()))}", err=True, fg="red")
    raise typer.Exit(1)
