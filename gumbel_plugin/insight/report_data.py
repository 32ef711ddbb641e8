"""What a report shows, in plain values: the tables, and the warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gumbel_plugin.insight.widths import LayerWidth, misaligned


@dataclass(frozen=True)
class ReportData:
    """What a report shows, in plain values, as a run's folder holds them.

    Attributes:
        name: What the run is called.
        columns: By network: parameters, nonzero, macs, file_bytes, score and latency by batch size.
        score: What the score of the columns is called.
        validation: What the validation score of the log is called.
        equivalence: See `gumbel_plugin.shrinking.equivalence.EquivalenceReport.as_dict`.
        sparsity: The fraction of gated weights that was closed.
        layers: The widths of the layers.
        log: The epoch log's rows; empty cells are NaN.
        gates: The histograms of P(keep): ``{"epoch": n, "masks": {name: counts}}`` for every epoch.
        lead: What was run, in a line.
        facts: What else is worth a line, for instance the seed and the git revision.
        versions: Of the libraries.
        config: The resolved configuration, as YAML.
        agreement: Where each sample had gates of its own, `gumbel_plugin.training.agreement.Agreement.as_dict`.
        recalibration: Where statistics of batch norms were estimated anew: norms, batches, and the score before, after.
    """

    name: str
    columns: Mapping[str, Mapping[str, Any]]
    score: str
    validation: str
    equivalence: Mapping[str, Any]
    sparsity: float
    layers: Sequence[Mapping[str, Any]] = ()
    log: Sequence[Mapping[str, float]] = ()
    gates: Sequence[Mapping[str, Any]] = ()
    lead: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    agreement: Mapping[str, Any] | None = None
    recalibration: Mapping[str, Any] | None = None


def latency_warnings(data: ReportData) -> list[str]:
    """Return a sentence for every batch size at which the small network is slower than the dense one, and why."""
    if not {"dense", "small"} <= set(data.columns):
        return []
    dense, small = (data.columns[name]["latency"] for name in ("dense", "small"))
    found = []
    for batch in dense:
        before, after = dense[batch], small[batch]
        noise = (before["iqr_ms"] + after["iqr_ms"]) / 2
        if after["median_ms"] > before["median_ms"] + noise:
            found.append(
                f"The small network is slower at a batch of {batch}: {after['median_ms']:.3f} ms against "
                f"{before['median_ms']:.3f} ms. {_why_slower(data)}"
            )
    return found


def _why_slower(data: ReportData) -> str:
    uneven = misaligned(
        [LayerWidth(*(layer[key] for key in ("name", "kind", "before", "after"))) for layer in data.layers]
    )
    if not uneven:
        return (
            "Its widths are even; the network is so small that fixed costs per layer outweigh the arithmetic, or the "
            "machine was busy: measure again."
        )
    shown = ", ".join(f"{layer.name} ({layer.after[1]})" for layer in uneven[:4] if layer.after)
    return (
        f"Widths that are no multiple of 8 make kernels slower: {shown}{', …' if len(uneven) > 4 else ''}. Channels "
        "kept in multiples of 8 are the cure: GumbelGroupPruner(round_to=8), or a sparse_ratio that leaves such."
    )


def result_rows(columns: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the table of a result: a label, and a cell for every network."""
    first = next(iter(columns.values()))
    rows = [
        ("parameters", [f"{column['parameters']:,}" for column in columns.values()]),
        ("non-zero", [f"{column['nonzero']:,}" for column in columns.values()]),
        ("MACs", [f"{column['macs']:,}" for column in columns.values()]),
        ("file size", [f"{column['file_bytes'] / 1024:,.1f} KiB" for column in columns.values()]),
    ]
    for batch in first["latency"]:
        cells = [_time(column["latency"][batch]) for column in columns.values()]
        rows.append((f"latency (batch {batch})", cells))
    scores = ["-" if column["score"] is None else f"{column['score']:.2f}" for column in columns.values()]
    return [*rows, ("test score", scores)]


def recalibration_line(recalibration: Mapping[str, Any]) -> str:
    """Return in a sentence what new statistics of batch norms changed."""
    before, after = ("-" if (score := recalibration[key]) is None else f"{score:.2f}" for key in ("before", "after"))
    return (
        f"Once the masks were decided, the statistics of {recalibration['norms']} batch norms were estimated anew from "
        f"{recalibration['batches']} training batches: test score {before} before, {after} after"
    )


def agreement_line(agreement: Mapping[str, Any]) -> str:
    """Return in a sentence how far samples agree with the decided gates."""
    unanimous = f"{100 * agreement['unanimous']:.1f} % of {agreement['samples']:,} held-out samples"
    return f"{unanimous} have exactly the decided gates as their own"


def agreement_rows(agreement: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for every mask: its name, how many gates it has, and the samples that agree with them.

    Of the samples, the mean over the gates comes first, then the gate that fewest samples agree with.
    """
    return [
        [name, f"{len(shares):,}", f"{100 * sum(shares) / len(shares):.1f} %", f"{100 * min(shares):.1f} %"]
        for name, shares in agreement["gates"].items()
    ]


def comparison_rows(runs: Sequence[ReportData]) -> list[list[str]]:
    """Return the table of a comparison: run, scores, sizes and the proof, a row for every run."""
    rows = []
    for run in runs:
        dense, small = run.columns["dense"], run.columns["small"]
        first = next(iter(small["latency"]), None)
        rows.append(
            [
                run.name,
                "-" if dense["score"] is None else f"{dense['score']:.2f}",
                "-" if small["score"] is None else f"{small['score']:.2f}",
                f"{small['parameters']:,} ({_part(small, dense, 'parameters')})",
                f"{small['macs']:,} ({_part(small, dense, 'macs')})",
                "-" if first is None else _time(small["latency"][first]),
                f"{100 * run.sparsity:.2f} %",
                "equal" if run.equivalence["passed"] else "NOT EQUAL",
            ]
        )
    return rows


COMPARISON_HEADINGS = (
    "run",
    "dense score",
    "small score",
    "parameters",
    "MACs",
    "latency",
    "sparsity",
    "proof",
)


def _part(small: Mapping[str, Any], dense: Mapping[str, Any], key: str) -> str:
    return f"{100 * small[key] / max(1, dense[key]):.1f} %"


def _time(latency: Mapping[str, float]) -> str:
    return f"{latency['median_ms']:.3f} ± {latency['iqr_ms'] / 2:.3f} ms"
