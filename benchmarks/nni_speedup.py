"""NNI's speedup on torchvision's classification models: exact for the masks of an NNI pruner, and how long it takes.

`L1NormPruner` masks half of the rows of every convolution and linear layer but the last. The wrapped model's outputs
are the reference: those of `gumbel_nni.speedup` must equal them to a relative error of 1e-5 in float32, whichever
backend removes the channels: Torch-Pruning (the default), or NNI's ModelSpeedup, made exact. Beside them stands what
NNI's own ModelSpeedup returns.

    python benchmarks/nni_speedup.py --json docs/data/nni_speedup.json --output docs/nni_speedup.md

Each model runs in a process of its own; an interrupted benchmark goes on where it was, `--again` measures anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gumbel_nni
from gumbel_nni.any_masks import Backend
from gumbel_plugin.layers.example_inputs import observing
from gumbel_plugin.sparsity.counting import count_parameters

from nni.compression.pruning import L1NormPruner  # isort: skip  (importable once gumbel_nni is)
from nni.compression.speedup import ModelSpeedup  # isort: skip
from zoo import build, randomize  # isort: skip

MODELS = (
    "alexnet", "convnext_tiny", "densenet121", "densenet169", "efficientnet_b0", "efficientnet_b1", "efficientnet_v2_s",
    "googlenet", "inception_v3", "mnasnet0_5", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small",
    "regnet_x_400mf", "regnet_x_800mf", "regnet_y_400mf", "regnet_y_800mf", "resnet18", "resnet34", "resnet50",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "squeezenet1_0", "squeezenet1_1", "vgg11_bn",
    "vit_b_32", "wide_resnet50_2",
)  # fmt: skip
TOLERANCE = 1e-5
BACKENDS: tuple[Backend, ...] = ("torch_pruning", "nni")  # the default, and NNI's ModelSpeedup made exact
READING_GUIDE = """\
`L1NormPruner` masks half of the rows of every convolution and linear layer but the last. Parameters are those of the
dense and of the small model, errors are relative to the largest output of the wrapped, masked model, seconds are of the
processor, on one thread. "alone" is NNI's own ModelSpeedup, as repaired by `gumbel_nni.compat` so that it runs."""


@dataclass
class Row:
    """What came of one model; `alone` is the error of NNI's own speedup, or what it said."""

    name: str
    inputs: str = ""
    parameters: tuple[int, ...] = (0, 0)
    errors: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    alone: str = ""
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether both small models compute what the wrapped model computes."""
        return not self.failure and all(error <= TOLERANCE for error in self.errors)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return a model's outputs in eval mode."""
    with observing(model):
        result: Tensor = model(inputs)
    return result


def error(expected: Tensor, actual: Tensor) -> float:
    """Return the largest difference, relative to the largest output."""
    return float((expected - actual).abs().max() / expected.abs().max())


def measure(name: str, seed: int) -> Row:
    """Prune one model, and shrink it three times."""
    torch.manual_seed(seed)
    model, inputs = build(name, "classification")
    randomize(model, torch.Generator().manual_seed(seed))
    layers = [path for path, module in model.named_modules() if type(module) in (nn.Conv2d, nn.Linear)]
    pruner = L1NormPruner(model, [{"op_names": layers[:-1], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    expected = outputs(model, inputs)
    pruner.unwrap_model()
    row = Row(name, "×".join(map(str, inputs.shape)))
    for backend in BACKENDS:
        start = time.process_time()
        small = gumbel_nni.speedup(model, masks, inputs, backend=backend, verify=False)
        row.seconds += (time.process_time() - start,)
        row.errors += (error(expected, outputs(small, inputs)),)
    row.parameters = count_parameters(model), count_parameters(small)
    row.alone = nnis_own(model, masks, inputs, expected)
    return row


def nnis_own(model: nn.Module, masks: dict[str, Any], inputs: Tensor, expected: Tensor) -> str:
    """Return the error of NNI's own ModelSpeedup, or the name of its exception."""
    small = copy.deepcopy(model)
    try:
        ModelSpeedup(small, inputs, copy.deepcopy(masks)).speedup_model()
        return f"{error(expected, outputs(small.eval(), inputs)):.0e}"
    except Exception as failure:  # whatever NNI raises is the result
        return type(failure).__name__


def measure_apart(name: str, options: argparse.Namespace) -> Row:
    """Measure a model in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--worker", name, "--seed", str(options.seed)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return Row(name, failure=f"not done after {options.timeout} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        return Row(name, failure=lines[-1][:300])
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def document(rows: Sequence[Row], seed: int) -> str:
    """Return the report as Markdown."""
    passed = sum(row.passed for row in rows)
    packages = ", ".join(f"{name} {version(name)}" for name in ("nni", "torch", "torchvision", "torch-pruning"))
    machine = platform.processor() or platform.machine()
    lines = [
        "# NNI's speedup on torchvision's models",
        "",
        READING_GUIDE,
        "",
        "    python benchmarks/nni_speedup.py --json docs/data/nni_speedup.json --output docs/nni_speedup.md",
        "",
        f"{packages}; {machine}; seed {seed}. {passed} of {len(rows)} equal the wrapped model (tolerance 1e-5).",
        "",
        "| model | input | parameters, M | error | error, backend nni | error, NNI alone | s | s, backend nni |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    return "\n".join([*lines, *map(line, rows), ""])


def line(row: Row) -> str:
    """Return a row of the table."""
    if row.failure:
        return f"| {row.name} | {row.inputs} | | {row.failure} | | | | |"
    parameters = " → ".join(f"{count / 1e6:.2f}" for count in row.parameters)
    errors, seconds = [f"{value:.1e}" for value in row.errors], [f"{value:.1f}" for value in row.seconds]
    return f"| {row.name} | {row.inputs} | {parameters} | {' | '.join(errors)} | {row.alone} | {' | '.join(seconds)} |"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("docs/data/nni_speedup.json"), help="rows measured so far")
    parser.add_argument("--output", type=Path, default=Path("docs/nni_speedup.md"))
    parser.add_argument("--again", action="store_true", help="measure models anew that have a row")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one model may take")
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, and write the report."""
    options = parse()
    if options.worker:
        torch.set_num_threads(1)
        logging.disable(logging.CRITICAL)
        print(json.dumps(asdict(measure(options.worker, options.seed))))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    known = json.loads(options.json.read_text()) if options.json.exists() else []
    rows = {values["name"]: Row(**values) for values in known}
    for name in options.models:
        if options.again or name not in rows:
            rows[name] = measure_apart(name, options)
            print(line(rows[name]), flush=True)
        ordered = [rows[key] for key in sorted(rows)]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(each) for each in ordered], indent=1) + "\n")
        options.output.write_text(document(ordered, options.seed))


if __name__ == "__main__":
    main()
