"""GumbelGroupPruner beside Torch-Pruning's own pruners: ResNet-20 on Fashion-MNIST, the same epochs for everyone.

Every method trains, prunes to the same MACs and trains on, within the same number of epochs and on one learning rate
schedule. Results are appended to a JSON file as they come, so that an interrupted benchmark goes on where it was.

    python benchmarks/group_pruners.py --seeds 0 1 2 --output docs/data/group_pruners.json
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin import GumbelGroupPruner
from gumbel_plugin.config import PhaseConfig, PruningSection
from gumbel_plugin.layers.weights import GATES
from gumbel_plugin.runs.data import load_data, make_loader
from gumbel_plugin.runs.models import build_model
from gumbel_plugin.runs.train import evaluate
from gumbel_plugin.sparsity.counting import count_macs, count_parameters

import torch_pruning as tp  # isort: skip  (after gumbel_plugin, which makes torchvision importable)
from rows import add_row, read_rows, spread

TARGETS = (0.5, 0.25)


class Task:
    """One seed's data, network and learning rate schedule."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        torch.manual_seed(seed)
        self.options = options
        bundle = load_data("fashion_mnist")
        chosen = torch.randperm(len(bundle.train))[: options.samples]
        part = torch.utils.data.TensorDataset(*(tensor[chosen] for tensor in bundle.train.tensors))
        self.train = make_loader(part, options.batch_size, shuffle=True, seed=seed)
        self.test = make_loader(bundle.test, 500, shuffle=False, seed=seed)
        self.model = build_model("resnet20", 10, 1)
        self.example = torch.randn(1, 1, 28, 28)
        self.macs = count_macs(self.model, self.example)
        self.total = options.epochs * len(self.train)
        self.before = options.epochs - options.finetune

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """Return the optimizer that every method trains the weights with."""
        return torch.optim.SGD(model.parameters(), self.options.lr, 0.9, weight_decay=5e-4)

    def fit(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        first: int,
        last: int,
        regularize: Callable[[Tensor], None],
    ) -> None:
        """Train from one epoch to another of the one schedule that everybody has."""
        model.train()
        for epoch in range(first, last):
            for index, (inputs, targets) in enumerate(self.train):
                step = epoch * len(self.train) + index
                optimizer.param_groups[0]["lr"] = self.options.lr * (0.5 + 0.5 * math.cos(math.pi * step / self.total))
                loss = nn.functional.cross_entropy(model(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                regularize(loss)
                optimizer.step()

    def finish(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Train on after pruning, and measure."""
        pruned = evaluate(model, self.test)
        self.fit(model, optimizer, self.before, self.options.epochs, lambda loss: None)
        return {
            "after_pruning": pruned,
            "accuracy": evaluate(model, self.test),
            "macs": count_macs(model, self.example) / self.macs,
            "parameters": count_parameters(model),
        }


def gumbel(task: Task) -> dict[float, dict[str, float]]:
    """Gates are learned in one pass with the weights, to the MAC budget; then the small network trains on."""
    results = {}
    for target in task.options.targets:
        model = copy.deepcopy(task.model)
        steps = task.before * len(task.train)
        settings = PruningSection(
            phases=PhaseConfig(dense=task.options.dense, fixed=task.options.fixed),
            options={"initial_logit": task.options.initial_logit},
        )
        pruner = GumbelGroupPruner(
            model,
            task.example,
            target="macs",
            pruning_ratio=1 - target,
            ignored_layers=[model.fc],
            pruning=settings,
            total_steps=steps,
        )
        optimizer = task.optimizer(model)
        optimizer.param_groups[0]["params"] = [p for n, p in model.named_parameters() if GATES not in n]
        gates = torch.optim.Adam(pruner.gate_parameters(), task.options.gate_lr)

        def regularize(loss: Tensor, pruner: GumbelGroupPruner = pruner, gates: torch.optim.Adam = gates) -> None:
            pruner.regularize(pruner.model, loss)
            gates.step()
            gates.zero_grad()

        task.fit(model, optimizer, 0, task.before, regularize)
        pruner.step()
        pruner.update_optimizer(optimizer)
        results[target] = task.finish(model, optimizer)
    return results


def torch_pruning_method(name: str) -> Callable[[Task], dict[float, dict[str, float]]]:
    """Return the run of one of Torch-Pruning's pruners: (sparse) training, pruning to the MACs, training on."""
    kinds = {
        "magnitude (uniform)": (tp.pruner.MagnitudePruner, tp.importance.MagnitudeImportance(p=2), False),
        "magnitude (global)": (tp.pruner.MagnitudePruner, tp.importance.MagnitudeImportance(p=2), True),
        "bn scale (global)": (tp.pruner.BNScalePruner, tp.importance.BNScaleImportance(), True),
        "group norm (global)": (tp.pruner.GroupNormPruner, tp.importance.MagnitudeImportance(p=2), True),
    }
    kind, importance, shared = kinds[name]

    def build(model: nn.Module, task: Task) -> tp.pruner.BasePruner:
        arguments = {"reg": task.options.reg} if kind is not tp.pruner.MagnitudePruner else {}
        return kind(
            model,
            task.example,
            importance,
            global_pruning=shared,
            pruning_ratio=1.0,
            max_pruning_ratio=0.9,
            iterative_steps=400,  # fine steps, until the MACs are reached
            ignored_layers=[model.fc],
            **arguments,
        )

    def run(task: Task) -> dict[float, dict[str, float]]:
        trained = copy.deepcopy(task.model)
        pruner, optimizer = build(trained, task), task.optimizer(trained)

        def regularize(loss: Tensor) -> None:
            if kind is not tp.pruner.MagnitudePruner:
                pruner.regularize(trained)

        for epoch in range(task.before):
            pruner.update_regularizer()
            task.fit(trained, optimizer, epoch, epoch + 1, regularize)
        results = {}
        for target in task.options.targets:
            model = copy.deepcopy(trained)
            pruner = build(model, task)
            while count_macs(model, task.example) > target * task.macs:
                pruner.step()
            results[target] = task.finish(model, task.optimizer(model))
        return results

    return run


METHODS: dict[str, Callable[[Task], dict[float, dict[str, float]]]] = {
    "GumbelGroupPruner": gumbel,
    **{
        name: torch_pruning_method(name)
        for name in ("magnitude (uniform)", "magnitude (global)", "bn scale (global)", "group norm (global)")
    },
}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table: mean ± standard deviation over the seeds."""
    lines = ["| method | MACs | accuracy after pruning | accuracy at the end | seeds |", "|---|---|---|---|---|"]
    for target in TARGETS:
        for method in METHODS:
            own = [row for row in rows if row["method"] == method and row["target"] == target]
            if not own:
                continue
            cells = [spread([row[key] for row in own]) for key in ("after_pruning", "accuracy")]
            macs = statistics.mean(row["macs"] for row in own)
            lines.append(f"| {method} | {macs:.3f} | {cells[0]} | {cells[1]} | {len(own)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--finetune", type=int, default=6, help="epochs after pruning, of all epochs")
    parser.add_argument("--samples", type=int, default=5120)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--gate-lr", type=float, default=0.3)
    parser.add_argument("--initial-logit", type=float, default=3.0)
    parser.add_argument("--dense", type=float, default=0.6, help="share of the epochs before pruning without gates")
    parser.add_argument("--fixed", type=float, default=0.0, help="share of them with gates decided but not removed")
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS, help="fractions of the MACs that stay")
    parser.add_argument("--reg", type=float, default=1e-4, help="strength of the baselines' sparse training")
    parser.add_argument("--output", type=Path, default=Path("docs/data/group_pruners.json"))
    options = parser.parse_args()
    rows = read_rows(options.output)
    done = {(row["method"], row["seed"]) for row in rows}
    for seed in options.seeds:
        for method in options.methods:
            if (method, seed) in done:
                continue
            began = time.perf_counter()
            for target, found in METHODS[method](Task(options, seed)).items():
                rows = add_row(options.output, {"method": method, "seed": seed, "target": target, **found})
            print(f"seed {seed}, {method}: {time.perf_counter() - began:.0f} s", rows[-2:], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
