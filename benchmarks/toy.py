"""Joint training on the toy problem of arXiv 2311.12526: does the pruned network show what depends on what?

    python benchmarks/toy.py --output docs/data/toy.json

A seed succeeds if at most 24 of the 160 weights lie on a path, in two separate parts, each of which computes one
output from its own two inputs, and if x1 and x2 are found to be interchangeable with opposite signs, x3 and x4 with
equal ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gumbel_plugin.errors import GumbelPluginError
from gumbel_plugin.insight.interpret import disjoint_parts, pathways, symmetries
from gumbel_plugin.runs.run import run
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.storage.versions import library_versions

CONFIG = Path(__file__).parent.parent / "configs" / "papers" / "joint_toy.yaml"
MOST_EDGES = 24
PARTS = [((0, 1), (0,)), ((2, 3), (1,))]
PAIRS = {((0, 1), (1, -1)), ((2, 3), (1, 1))}


def measure(config: RunConfig, seed: int) -> dict[str, Any]:
    """Run the toy with a seed and say what its network shows; inputs and outputs are counted from 0."""
    result = run(config.model_copy(update={"seed": seed}), log=lambda line: None)
    graph = pathways(result.small, {})
    parts, pairs = disjoint_parts(graph), symmetries(result.small, {})
    edges = graph.number_of_edges()
    found = [(part.inputs, part.outputs) for part in parts] == PARTS
    alike = {(pair.inputs, pair.signs) for pair in pairs} >= PAIRS
    return {
        "edges": edges,
        "parts": [{"inputs": part.inputs, "outputs": part.outputs, "edges": part.connections} for part in parts],
        "pairs": [{"inputs": pair.inputs, "signs": pair.signs, "score": round(pair.score, 4)} for pair in pairs],
        "test_mse": None if (score := result.columns["small"].score) is None else -score,
        "equivalence_float64": result.equivalence.errors["float64"],
        "parameters": result.columns["small"].profile.parameters,
        "seconds": round(result.training_seconds, 1),
        "succeeds": found and alike and edges <= MOST_EDGES,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| seed | edges of 160 | parts: inputs → output | pairs | test MSE | as asked |",
        "|---|---|---|---|---|---|",
    ]
    for seed, row in rows.items():
        parts = "; ".join(f"{named(part['inputs'], 'x')} → {named(part['outputs'], 'y')}" for part in row["parts"])
        pairs = "; ".join(f"{named(pair['inputs'], 'x')} ({pair['signs'][-1]:+d})" for pair in row["pairs"])
        success = "yes" if row["succeeds"] else "no"
        lines.append(f"| {seed} | {row['edges']} | {parts} | {pairs} | {row['test_mse']:.4f} | {success} |")
    return "\n".join(lines)


def named(numbers: list[int], letter: str) -> str:
    """Return x1, x2 for [0, 1]."""
    return ", ".join(f"{letter}{number + 1}" for number in numbers)


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description="Run the toy problem over seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, help="write all numbers there, as JSON")
    arguments = parser.parse_args()
    try:
        config = RunConfig.load(CONFIG)
        rows = {}
        for seed in arguments.seeds:
            print(f"seed {seed}", file=sys.stderr, flush=True)
            rows[str(seed)] = measure(config, seed)
    except GumbelPluginError as error:
        parser.exit(1, f"error: {error}\n")
    print(table(rows))
    print(f"\n{sum(row['succeeds'] for row in rows.values())} of {len(rows)} seeds as asked")
    if arguments.output is not None:
        document = {"config": f"papers/{CONFIG.name}", "versions": library_versions(), "seeds": rows}
        arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
