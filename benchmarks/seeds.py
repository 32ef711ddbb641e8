"""Repeat a run over seeds and print what it reaches: each seed, and the median.

    python benchmarks/seeds.py configs/digits.yaml --seeds 0 1 2 --output seeds.json

The dense baseline is trained as well, whether or not the configuration asks for it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path

import torch

from gumbel_plugin.errors import GumbelPluginError
from gumbel_plugin.runs.run import RunResult, run
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.storage.versions import library_versions

COLUMNS = {
    "dense": "dense score",
    "small": "small score",
    "macs_ratio": "MACs small/dense",
    "nonzero_ratio": "non-zero kept",
    "error": "float32 error",
    "seconds": "seconds with gates",
}
FORMATS = {"macs_ratio": ".3f", "nonzero_ratio": ".4f", "error": ".1e", "seconds": ".1f"}


def measure(config: RunConfig, seed: int) -> dict[str, float]:
    """Run a configuration with another seed and return its numbers."""
    training = config.training.model_copy(update={"dense_baseline": True})
    result = run(config.model_copy(update={"seed": seed, "training": training}), log=log)
    return numbers(result)


def numbers(result: RunResult) -> dict[str, float]:
    """Return what the table shows of one run."""
    dense, small = result.columns["dense"], result.columns["small"]
    return {
        "dense": float("nan") if dense.score is None else dense.score,
        "small": float("nan") if small.score is None else small.score,
        "macs_ratio": small.profile.macs / dense.profile.macs,
        "nonzero_ratio": small.profile.nonzero / dense.profile.nonzero,
        "error": result.equivalence.max_relative_error,
        "seconds": result.training_seconds,
    }


def log(line: str) -> None:
    """Show progress beside the table, not in it."""
    print(line, file=sys.stderr, flush=True)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| seed | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[key]:{FORMATS.get(key, '.2f')}}" for key in COLUMNS) + " |")
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """Return what the times depend on."""
    return {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **library_versions(),
    }


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description="Repeat a run over seeds and print the median.")
    parser.add_argument("config", type=Path, help="the run's YAML file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="write all numbers there, as JSON")
    arguments = parser.parse_args()
    try:
        config = RunConfig.load(arguments.config)
        rows: dict[str, dict[str, float]] = {}
        for seed in arguments.seeds:
            log(f"seed {seed}")
            rows[str(seed)] = measure(config, seed)
    except GumbelPluginError as error:
        parser.exit(1, f"error: {error}\n")
    rows["median"] = {key: statistics.median(row[key] for row in rows.values()) for key in COLUMNS}
    print(table(rows))
    if arguments.output is not None:
        document = {"config": arguments.config.name, "machine": machine(), "rows": rows}
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
