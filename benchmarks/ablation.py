"""What each part of the mask learning is worth: alone, left out, and together, on one trained ResNet-20.

The parts are the gates' price (benefit per cost, see docs/methods.md), the noise that falls to nothing, distillation
from the dense network, batch norms recalibrated after the cut, and a prior from the trained weights. Data, network and
training are those of trained.py, whose options of the same names these are. Rows are appended to a JSON file as they
come, so that an interrupted benchmark goes on where it was.

    python benchmarks/ablation.py --pixels 14 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gumbel_plugin import GumbelGroupPruner, recalibrate
from gumbel_plugin.sparsity import controller
from gumbel_plugin.sparsity.steered_gates import SteeredChannels, root_mean_square
from rows import add_row, read_rows, spread
from trained import TAUGHT, Task, classifier

PARTS = ("price", "annealing", "distillation", "recalibration")
PRIORS = ("magnitude", "group_norm", "bn_scale", "taylor")
VARIANTS: dict[str, frozenset[str]] = {
    "none of them": frozenset(),
    **{f"{part} alone": frozenset([part]) for part in (*PARTS, "magnitude")},
    **{f"all but {part}": frozenset(PARTS) - {part} for part in PARTS},
    "all": frozenset(PARTS),
    **{f"all, and prior {prior}": frozenset(PARTS) | {prior} for prior in PRIORS},
}


@contextlib.contextmanager
def learning(parts: frozenset[str]) -> Iterator[None]:
    """Take the price or the annealing out of the library where they are not among the parts."""

    def as_they_are(self: SteeredChannels, gradients: Tensor, latents: Tensor) -> Tensor:
        return gradients / root_mean_square(gradients)

    with contextlib.ExitStack() as stack:
        if "price" not in parts:
            stack.enter_context(mock.patch.object(SteeredChannels, "priced", as_they_are))
        if "annealing" not in parts:
            stack.enter_context(mock.patch.object(controller, "_noise", return_value=1.0))
        yield


def measure(task: Task, parts: frozenset[str], target: float) -> dict[str, Any]:
    """Learn gates with some of the parts, cut, and train on; return the accuracies."""
    model = copy.deepcopy(task.dense)
    task.options.distillation = TAUGHT if "distillation" in parts else 0.0
    pruning: dict[str, Any] = {"gate_optimizer": {"name": "adam", "lr": 0.05}}
    for prior in parts.intersection(PRIORS):
        pruning["gates"] = {"prior": prior}
    arguments: dict[str, Any] = {"target": "macs", "pruning_ratio": 1 - target, "ignored_layers": [classifier(model)]}
    with learning(parts):
        steps = len(task.before) * len(task.batches(0))
        settings = {"pruning": pruning, "seed": task.seed}
        pruner = GumbelGroupPruner(model, task.example, **arguments, pruning=settings, total_steps=steps)
        task.fit(model, task.extra, task.before, regularize=lambda loss: pruner.regularize(model, loss))
        pruner.step()
    model = task.placed(model)
    if "recalibration" in parts:
        recalibrate(model, task.batches(task.extra.last))
    cut = task.scores(model)["test"]
    task.fit(model, task.extra, task.after)
    return {"cut": cut, **task.measured(model)}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| parts | MACs | test, right after the cut | test, end | seeds |", "|---|---|---|---|---|"]
    for name in VARIANTS:
        own = [row for row in rows if row["variant"] == name]
        if own:
            macs = sum(row["macs"] for row in own) / len(own)
            cut, end = (spread([row[key] for row in own]) for key in ("cut", "test"))
            lines.append(f"| {name} | {macs:.3f} | {cut} | {end} | {len(own)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--target", type=float, default=0.25, help="the fraction of the MACs")
    parser.add_argument("--pixels", type=int, default=28)
    parser.add_argument("--samples", type=int, default=20000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--dense-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--gate-epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("docs/data/ablation.json"))
    options = parser.parse_args()
    options.network, options.tune = "resnet20", None
    torch.set_num_threads(1)
    done = {(row["variant"], row["seed"], row["target"]) for row in read_rows(options.output)}
    for seed in options.seeds:
        wanted = [name for name in options.variants if (name, seed, options.target) not in done]
        task = Task(options, seed) if wanted else None
        for name in wanted:
            assert task is not None
            torch.manual_seed(seed)
            row = {"variant": name, "seed": seed, "target": options.target}
            print(add_row(options.output, row | measure(task, VARIANTS[name], options.target))[-1], flush=True)
    print(table(read_rows(options.output)))


if __name__ == "__main__":
    main()
