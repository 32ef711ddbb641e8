"""Subnetworks of an untrained network: ASLP, with and without smart rescale, beside Supermask and edge-popup.

LeNet-300-100 on Fashion-MNIST with signed-constant weights that never change; a tenth of the training images validates.
"Epochs to" counts the epochs until the validation accuracy first reaches the best that plain ASLP with the
same optimizer ever has.

    python benchmarks/frozen.py --seeds 0 1 2 --output docs/data/frozen.json
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gumbel_plugin.runs.run import run
from gumbel_plugin.runs.run_config import RunConfig
from rows import add_row, read_rows, spread

ASLP = {"method": "gumbel_softmax", "options": {"initial_logit": 0.0}}
SUPERMASK = {**ASLP, "method": "supermask"}
ADAM = {"gate_optimizer": {"name": "adam", "lr": 0.2}}
"""Instead of each paper's own (SGD 50; edge-popup: SGD 0.1); chosen by another seed's validation data."""
PAPERS: dict[str, dict[str, Any]] = {
    "ASLP": ASLP,
    "ASLP, smart rescale": {**ASLP, "rescale": "learned"},
    "ASLP, dynamic rescale": {**ASLP, "rescale": "dynamic"},
    "Supermask": SUPERMASK,
    "Supermask, dynamic rescale": {**SUPERMASK, "rescale": "dynamic"},
    "edge-popup, half of the weights": {"method": "edge_popup"},
}
OURS = {f"{name}, Adam": {**own, **ADAM} for name, own in PAPERS.items() if "edge-popup" not in name}
METHODS = PAPERS | OURS


def measure(method: str, seed: int, epochs: int) -> dict[str, Any]:
    """Run one method and return its validation accuracies by epoch and its test accuracy."""
    rule: dict[str, Any] = {"op_types": ["Linear"], "granularity": "element"}
    if "edge-popup" in method:
        rule["sparse_ratio"] = 0.5
    config = RunConfig.load(
        {
            "seed": seed,
            "model": {"name": "lenet300"},
            "data": {"name": "fashion_mnist", "batch_size": 256, "validation_fraction": 0.1},
            "training": {"max_epochs": epochs},
            "pruning": {
                **METHODS[method],
                "weights": "frozen",
                "weight_init": "signed_constant",
                "config_list": [rule],
            },
            "report": {"html": False, "tensorboard": False, "latency_batches": ()},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        result = run(config, Path(folder) / "run")
        with (Path(folder) / "run" / "log.csv").open(newline="") as log:
            curve = [float(row["validation_score"]) for row in csv.DictReader(log)]
    return {
        "method": method,
        "seed": seed,
        "validation": curve,
        "test": result.columns["small"].score,
        "density": 1 - result.sparsity,
        "seconds_an_epoch": result.training_seconds / epochs,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| method | test accuracy | kept | epochs to plain ASLP's best | s an epoch | seeds |", "|---" * 6 + "|"]
    goals = {(row["method"], row["seed"]): max(row["validation"]) for row in rows if row["method"].startswith("ASLP")}
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        plain = "ASLP, Adam" if method in OURS else "ASLP"
        reached = [_first(row["validation"], goals[plain, row["seed"]]) for row in own if (plain, row["seed"]) in goals]
        density = statistics.mean(row["density"] for row in own)
        seconds = statistics.median(row["seconds_an_epoch"] for row in own)
        lines.append(
            f"| {method} | {spread([row['test'] for row in own])} | {density:.1%} | {', '.join(reached)} "
            f"| {seconds:.2f} | {len(own)} |"
        )
    return "\n".join(lines)


def _first(curve: Sequence[float], goal: float) -> str:
    return next((str(epoch) for epoch, score in enumerate(curve, 1) if score >= goal), "never")


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("docs/data/frozen.json"))
    options = parser.parse_args()
    rows = read_rows(options.output)
    done = {(row["method"], row["seed"]) for row in rows}
    for seed in options.seeds:
        for method in options.methods:
            if (method, seed) not in done:
                rows = add_row(options.output, measure(method, seed, options.epochs))
                print(method, seed, rows[-1]["test"], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
