"""Are gates on budget before the cut, whatever the loss, the number of steps and their optimizer?

Three networks, trained for a while without gates, learn masks on Fashion-MNIST with the task's loss as it is, 1/1024 of
it and 1024 times as much. The rate of the weights is divided by as much, so that only the gates notice. Cells are
appended to a JSON file, so that an interrupted run goes on where it was.

    python benchmarks/budgets.py --output docs/data/budgets.json
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin import GumbelGroupPruner, MaskingSession
from gumbel_plugin.runs.data import load_data
from gumbel_plugin.runs.models import build_model
from gumbel_plugin.training.loop import MaskingLoop

import torchvision  # isort: skip  (after gumbel_plugin, which makes it importable)
from rows import add_row, read_rows

SCALES = (1.0, 2.0**-10, 2.0**10)  # powers of two, so that rounding is the same and what differs is the steering
STEPS = (50, 200, 1000)
OPTIMIZERS = {
    "SGD 0.05": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "Adam 0.05": {"name": "adam", "lr": 0.05},
    "Adam 0.3": {"name": "adam", "lr": 0.3},
}
BATCH = 16
DENSE_STEPS = 500

Masking = tuple[MaskingSession, Callable[[], object], Callable[[], object]]
"""A session, what steps its gates before the weights' step, and what comes after that."""


def transformer() -> nn.Module:
    """Return a vision transformer of two blocks with four heads each."""
    return torchvision.models.VisionTransformer(28, 7, 2, 4, 32, 256, num_classes=10)


def images(steps: int, channels: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of training images in random order."""
    inputs, targets = load_data("fashion_mnist").train.tensors
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (BATCH,), generator=order)
        yield inputs[chosen].expand(-1, channels, -1, -1), targets[chosen]


def of_groups(model: nn.Module, example: Tensor, steps: int, optimizer: Mapping[str, Any]) -> Masking:
    """Gate channels and heads under half of the MACs."""
    attention = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    pruner = GumbelGroupPruner(
        model,
        example,
        target="macs",
        pruning_ratio=0.5,
        prune_num_heads=bool(attention),
        num_heads={module: module.num_heads for module in attention},
        ignored_layers=[
            module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 10
        ],
        pruning={"pruning": {"gate_optimizer": dict(optimizer)}},
        total_steps=steps,
    )
    return pruner.session, lambda: pruner.regularize(model), pruner.update_regularizer


def of_weights(model: nn.Module, example: Tensor, steps: int, optimizer: Mapping[str, Any]) -> Masking:
    """Gate single weights, of which one in twenty stays."""
    rule = {"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 0.95, "global_group_id": "all"}
    loop = MaskingLoop(MaskingSession(model, {"pruning": {"config_list": [rule], "gate_optimizer": dict(optimizer)}}))
    loop.start(steps)
    return loop.session, loop.before_step, loop.after_step


@functools.cache
def trained(network: str) -> nn.Module:
    """Return a network that was trained for a while, without gates."""
    build, channels, _ = NETWORKS[network]
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for inputs, targets in images(DENSE_STEPS, channels, seed=1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model


Start = Callable[[nn.Module, Tensor, int, Mapping[str, Any]], Masking]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, Start]] = {
    "ResNet-20": (lambda: build_model("resnet20", 10, 1), 1, of_groups),
    "LeNet-300-100": (lambda: build_model("lenet300", 10), 1, of_weights),
    "transformer": (transformer, 3, of_groups),
}


def learn(network: str, scale: float, steps: int, optimizer: str) -> tuple[dict[str, float], Tensor]:
    """Learn masks; return how far they were from their budget, and what they keep, bool, shape (gates,)."""
    _, channels, start = NETWORKS[network]
    model = copy.deepcopy(trained(network))
    session, before_step, after_step = start(model, torch.zeros(2, channels, 28, 28), steps, OPTIMIZERS[optimizer])
    (budget,) = session.plan.budgets
    weights = torch.optim.SGD(session.weight_parameters(), 0.01 / scale, momentum=0.9)
    worst = off = 0.0
    for inputs, targets in images(steps, channels):
        loss = scale * nn.functional.cross_entropy(model(inputs), targets)
        weights.zero_grad()
        loss.backward()
        before_step()
        weights.step()
        after_step()
        hard = {term.name: term.mask.decide(term.weight) for term in budget.terms}
        usage = float(budget.usage([gates.float() for gates in hard.values()]))
        off = abs(usage - session.controller.targets(session.progress)[0])
        worst = max(worst, off)
    cut = budget.cut()
    kept, own = (torch.cat([gates[name].flatten() for name in hard]) for gates in (cut, hard))
    return {"before_cut": off, "worst_step": worst, "cut_changes": float((kept != own).float().mean())}, kept


def cell(network: str, steps: int, optimizer: str, scales: Sequence[float]) -> dict[str, Any]:
    """Return the worst of all sizes of the loss, and how many gates agree with those of the first."""
    found = [learn(network, scale, steps, optimizer) for scale in scales]
    worst = {key: max(numbers[key] for numbers, _ in found) for key in found[0][0]}
    agree = min(float((kept == found[0][1]).float().mean()) for _, kept in found)
    return {"network": network, "steps": steps, "optimizer": optimizer, **worst, "agree": agree}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the cells as a Markdown table."""
    lines = [
        "| network | steps | optimizer of the gates | off budget before the cut | off at the worst step | gates that "
        "the cut changes | gates that agree under scaled losses |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = " | ".join(f"{100 * row[key]:.2f} %" for key in ("before_cut", "worst_step", "cut_changes", "agree"))
        lines.append(f"| {row['network']} | {row['steps']} | {row['optimizer']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="what the loss is multiplied by")
    parser.add_argument("--output", type=Path, default=Path("docs/data/budgets.json"))
    options = parser.parse_args()
    rows = read_rows(options.output)
    done = {(row["network"], row["steps"], row["optimizer"]) for row in rows}
    for network, steps, optimizer in itertools.product(options.networks, options.steps, OPTIMIZERS):
        if (network, steps, optimizer) in done:
            continue
        rows = add_row(options.output, cell(network, steps, optimizer, options.scales))
        print(rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
