"""What exactness costs: building `GumbelGroupPruner` and one `step`, against Torch-Pruning's own pruner, in one run.

    OMP_NUM_THREADS=1 python benchmarks/construct.py --repeats 5

Both prune the same share of every group of channels of the same torchvision network. CPU time is counted, and repeats
take turns, so that a busy machine slows both alike; medians are compared.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch_pruning as tp
from torch import nn

from gumbel_plugin import GumbelGroupPruner

import torchvision  # isort: skip  (importable beside a CPU build of torch once gumbel_plugin is imported)

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "vit_b_16")


def build_torch_pruning(model: nn.Module, inputs: torch.Tensor, ratio: float) -> tp.pruner.BasePruner:
    """Build Torch-Pruning's pruner on the whole network but for its last layer."""
    heads = {
        layer: layer.num_heads for layer in model.modules() if isinstance(layer, nn.MultiheadAttention)
    }  # without them it would take channels out of heads
    return tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=ratio,
        num_heads=heads,
        ignored_layers=[last_layer(model)],
    )


def build_gumbel(model: nn.Module, inputs: torch.Tensor, ratio: float) -> GumbelGroupPruner:
    """Build ours, for the same channels."""
    return GumbelGroupPruner(model, inputs, pruning_ratio=ratio, ignored_layers=[last_layer(model)])


def last_layer(model: nn.Module) -> nn.Module:
    """Return the classifier, which both leave alone."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]


def seconds(build: Callable[..., tp.pruner.BasePruner], dense: nn.Module, ratio: float) -> float:
    """Return the CPU seconds of construction and one step, on a copy of the network."""
    model, inputs = copy.deepcopy(dense), torch.randn(1, 3, 224, 224)
    began = time.process_time()
    build(model, inputs, ratio).step()
    return time.process_time() - began


def main() -> None:
    """Time both on every network and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(f"{torch.get_num_threads()} thread(s), medians of {options.repeats} repeats")
    print("| network | Torch-Pruning s | ours s | ratio of medians | of pairs |\n|---|---:|---:|---:|---:|")
    for network in options.networks:
        torch.manual_seed(0)
        dense = getattr(torchvision.models, network)(weights=None).eval()
        times: dict[str, list[float]] = {"theirs": [], "ours": []}
        for repeat in range(options.repeats + 1):
            for name, build in (("theirs", build_torch_pruning), ("ours", build_gumbel)):
                taken = seconds(build, dense, options.ratio)
                if repeat > 0:  # the first one warms up
                    times[name].append(taken)
        theirs, ours = (statistics.median(each) for each in times.values())
        pairs = statistics.median(o / t for t, o in zip(times["theirs"], times["ours"], strict=True))
        print(f"| {network} | {theirs:.2f} | {ours:.2f} | {ours / theirs:.1f} | {pairs:.1f} |", flush=True)


if __name__ == "__main__":
    main()
