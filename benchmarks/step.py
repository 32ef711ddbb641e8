"""What gates cost a training step: ResNet-18 on 32x32 images, with and without `GumbelGroupPruner`, in one run.

    python benchmarks/step.py --repeats 20

Steps with and without gates take turns, so that a busy machine slows both alike; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from gumbel_plugin import GumbelGroupPruner

import torchvision  # isort: skip  (importable beside a CPU build of torch once gumbel_plugin is imported)


def step_of(gated: bool, batch: int, device: str) -> Callable[[], None]:
    """Return one training step of a fresh network: forward, backward, the gates' part, optimizer."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).to(device)
    inputs = torch.randn(batch, 3, 32, 32, device=device)
    targets = torch.randint(0, 10, (batch,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    pruner = None
    if gated:
        pruner = GumbelGroupPruner(model, inputs[:2], ignored_layers=[model.fc], pruning_ratio=0.5)
        optimizer.add_param_group({"params": pruner.gate_parameters(), "lr": 0.05})

    def step() -> None:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        if pruner is not None:
            pruner.regularize(model, loss)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    """Time both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    steps = {name: step_of(name == "gated", options.batch, options.device) for name in ("plain", "gated")}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if repeat >= 2:  # the first ones warm up
                times[name].append(1000 * (time.perf_counter() - began))
    plain, gated = (statistics.median(times[name]) for name in ("plain", "gated"))
    pairs = statistics.median(g / p for g, p in zip(times["gated"], times["plain"], strict=True))
    print(f"plain {plain:.1f} ms, gated {gated:.1f} ms: ratio of medians {gated / plain:.3f}, of pairs {pairs:.3f}")


if __name__ == "__main__":
    main()
