"""Networks nobody here wrote: which of their channel groups are exact, and does the small network compute the same?

For each model all batch norm statistics, affine parameters, biases and whatever starts at zero are drawn at random. A
masking session then closes about half of the units of every exact group at random, and the model is shrunk with the
torch_pruning backend. The small model must return what the masked one returns, to a relative error of 1e-5 in float32.

    python benchmarks/zoo.py --kind all --json docs/data/zoo.json --output docs/zoo.md
    python benchmarks/zoo.py --source timm ultralytics transformers segmentation monai diffusers

Without a source these are all of torchvision's. Other sources need their packages, and ask Torch-Pruning's own pruner
for half of the channels too. Each model runs in a process of its own; rows are added to the JSON file as they come, and
an interrupted benchmark goes on where it was. Rows of older runs stay in the table; `--again` measures them anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.layers.example_inputs import call_model
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.shrinking.equivalence import verify_equivalence
from gumbel_plugin.shrinking.shrink import masked_copy, remove_dead_units
from gumbel_plugin.sparsity.counting import count_macs, count_parameters
from gumbel_plugin.training.session import MaskingSession

import torchvision  # isort: skip  (after gumbel_plugin, which makes it importable)
import torch_pruning as tp  # isort: skip
from gumbel_torch_pruning import find_groups  # isort: skip
from torchvision.ops import FrozenBatchNorm2d  # isort: skip
from zoo_networks import SOURCES  # isort: skip

KINDS = {
    "classification": torchvision.models,
    "segmentation": torchvision.models.segmentation,
    "detection": torchvision.models.detection,
    "video": torchvision.models.video,
}
TOLERANCE = 1e-5
COPIES = 5
"""How many times a model's weights are in memory at the worst moment, measured on the largest ones that ran."""

# Side of the square inputs where 64 pixels will not do: too small, or fixed by the model.
SIDES = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 70, "ssd300_vgg16": 300}
SIDES |= dict.fromkeys(("mvit_v1_b", "mvit_v2_s", "s3d"), 224)
FRAMES = 16

COMMANDS = (
    "python benchmarks/zoo.py --kind all --json docs/data/zoo.json --output docs/zoo.md",
    f"python benchmarks/zoo.py --source {' '.join(SOURCES)}",
)
READING_GUIDE = """\
A row says how many channel groups of a model can be cut exactly, how many only with other numbers (inexact) and how
many not at all, what random halves of the exact ones leave of it, and how far the small network's outputs are from the
masked one's, relative to their largest value. Groups that are not exact stay whole, so a model whose channels mostly
pass through layer norms or a channel shuffle keeps more of its parameters; the last section counts the reasons."""


@dataclass
class Row:
    """What came of one model; times in seconds of the processor, memory in GiB.

    `groups` is the time to find the model's groups, `shrink` that to remove what was closed (its own look at the groups
    included).
    """

    name: str
    kind: str
    inputs: str = ""
    exact: int = 0
    inexact: int = 0
    unsupported: int = 0
    parameters: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    error: float | None = None
    groups: float = 0.0
    shrink: float = 0.0
    memory: float = 0.0
    failure: str = ""
    peer: str = ""
    peer_seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the small model computes the same."""
        return not self.failure and self.error is not None and self.error <= TOLERANCE


def build(name: str, kind: str) -> tuple[nn.Module, Any]:
    """Build a model with random weights, and inputs for it."""
    if kind in SOURCES:
        network = SOURCES[kind]()[name]
        return network.build().eval(), network.inputs()
    options: dict[str, object] = {"weights": None}
    side = SIDES.get(name, 64)
    if kind in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    if name.startswith("vit_"):
        options["image_size"] = side
    model: nn.Module = torchvision.models.get_model(name, **options)
    if kind == "detection":
        model = with_frozen_norms(model.backbone)
    shape = (2, 3, side, side) if kind != "video" else (1, 3, FRAMES, side, side)
    return model.eval(), torch.randn(shape)


def with_frozen_norms(model: nn.Module) -> nn.Module:
    """Replace batch norms by frozen ones, which torchvision's pretrained detection backbones have."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, FrozenBatchNorm2d(child.num_features, child.eps))
    return model


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw everything that is constant in a fresh model: norms, biases, scales, and weights that start at zero."""
    for module in model.modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        is_norm = any(name == "running_var" for name, _ in tensors) or isinstance(module, (nn.LayerNorm, nn.GroupNorm))
        for name, tensor in tensors:
            noise = torch.randn(tensor.shape, generator=generator)
            if is_norm and name in ("weight", "running_var"):
                tensor.copy_(0.5 + noise.sigmoid())
            elif is_norm and tensor.is_floating_point():
                tensor.copy_(0.3 * noise)
            elif name in ("bias", "layer_scale"):
                tensor.copy_(0.1 * noise + (name == "layer_scale"))
            elif isinstance(tensor, nn.Parameter) and not tensor.any():
                tensor.copy_(0.05 * noise)


def close_half(model: nn.Module, groups: Sequence[ChannelGroup], seed: int) -> dict[str, dict[str, Tensor]]:
    """Let a masking session close about half of the units of every exact group at random; return its masks."""
    rule = {"op_names": [group.name for group in groups if group.safety == "exact"]}
    session = MaskingSession(model, RunConfig.load([rule]).pruning, groups, seed=seed)
    session.start()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mask in session.plan.masks.values():
            mask.logit.copy_(torch.randn(mask.shape, generator=generator))
    masks = session.extract()
    session.detach()
    return masks


def measure(name: str, kind: str, seed: int) -> Row:
    """Do everything with one model."""
    torch.manual_seed(seed)
    row = Row(name, kind)
    model, inputs = build(name, kind)
    tensors = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
    row.inputs = ", ".join("×".join(map(str, tensor.shape)) for tensor in tensors)
    randomize(model, torch.Generator().manual_seed(seed))
    before = count_parameters(model), count_macs(model, inputs)

    start = time.process_time()
    groups = find_groups(model, inputs)
    row.groups = time.process_time() - start
    row.exact, row.inexact, row.unsupported = (
        sum(group.safety == safety for group in groups) for safety in ("exact", "inexact", "unsupported")
    )
    names = dict(model.named_modules())
    reasons = (" ".join(word for word in group.reason.split() if word not in names) for group in groups if group.reason)
    row.reasons = dict(Counter(reasons))

    model = masked_copy(model, close_half(model, groups, seed))
    start = time.process_time()
    small = remove_dead_units(model, inputs)
    row.shrink = time.process_time() - start
    row.parameters = before[0], count_parameters(small)
    row.macs = before[1], count_macs(small, inputs)
    report = verify_equivalence(
        model, small, inputs, samples=2, tolerance=TOLERANCE, dtypes=(torch.float32,), seed=seed
    )
    row.error = report.max_relative_error
    row.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return row


def measure_peer(name: str, kind: str, seed: int) -> Row:
    """Let Torch-Pruning's own pruner remove half of the channels, and see whether the network still runs."""
    torch.manual_seed(seed)
    row = Row(name, kind)
    model, inputs = build(name, kind)
    before = count_parameters(model)
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1:]
    start = time.process_time()
    importance = tp.importance.MagnitudeImportance()
    tp.pruner.MagnitudePruner(model, inputs, importance, pruning_ratio=0.5, ignored_layers=last).step()
    row.peer_seconds = time.process_time() - start
    with torch.no_grad():
        call_model(model, inputs)
    row.peer = f"{count_parameters(model) / before:.0%} left"
    return row


def measure_both(name: str, kind: str, options: argparse.Namespace) -> Row:
    """Measure a network of another package, and what Torch-Pruning's own pruner makes of it."""
    row = measure_apart(name, kind, options)
    peer = measure_apart(name, kind, options, "--peer")
    row.peer, row.peer_seconds = peer.peer or f"fails: {peer.failure[:80]}", peer.peer_seconds
    return row


def measure_apart(name: str, kind: str, options: argparse.Namespace, *more: str) -> Row:
    """Measure a model in a process of its own, so that its memory is given back and a crash stays there."""
    needed = 0 if kind in SOURCES else weights_of(name) * 4 * COPIES / 2**30
    if needed > options.memory:
        return Row(name, kind, failure=f"does not fit in {options.memory:g} GiB (needs about {needed:.0f})")
    command = [sys.executable, "-W", "ignore", __file__, "--worker", name, kind, "--seed", str(options.seed), *more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return Row(name, kind, failure=f"not done after {options.timeout} s")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        return Row(name, kind, failure=lines[-1][:300])
    return row_from(json.loads(done.stdout.splitlines()[-1]))


def weights_of(name: str) -> int:
    """Return how many parameters torchvision says that a model has."""
    return int(torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"])


def row_from(values: dict[str, object]) -> Row:
    """Read a row from JSON; lists become tuples again."""
    known = {each.name for each in fields(Row)}
    return Row(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})  # type: ignore[arg-type]


def document(rows: Sequence[Row], environment: str) -> str:
    """Return the report as Markdown."""
    lines = ["# The zoo: networks nobody here wrote, shrunk", "", READING_GUIDE, ""]
    lines += [*(f"    {command}" for command in COMMANDS), "", environment, ""]
    for kind in (*KINDS, *SOURCES):
        own = [row for row in rows if row.kind == kind]
        if own:
            passed = [row for row in own if row.passed]
            lines += [f"## {kind.capitalize()}: {len(passed)} of {len(own)} pass", "", *table(own), ""]
    reasons: Counter[str] = sum((Counter(row.reasons) for row in rows), start=Counter())
    lines += ["## Why groups are not exact", "", *(f"- {count} × {why}" for why, count in reasons.most_common()), ""]
    failures = [f"- {row.name}: {row.failure or f'error {row.error}'}" for row in rows if not row.passed]
    if failures:
        lines += ["## What did not pass", "", *failures, ""]
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> list[str]:
    """Return a Markdown table."""
    has_peer = any(row.peer for row in rows)
    lines = [
        "| model | input | exact | inexact | unsupported | parameters, M | MACs, G | error | groups, s | shrink, s |"
        + (" Torch-Pruning's own |" if has_peer else ""),
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|" + ("---|" if has_peer else ""),
    ]
    for row in rows:
        peer = f" {row.peer}, {row.peer_seconds:.1f} s |" if has_peer else ""
        if row.failure:
            lines.append(f"| {row.name} | {row.inputs} | | | | | | {row.failure} | | |{peer}")
            continue
        parameters = " → ".join(f"{count / 1e6:.2f}" for count in row.parameters)
        macs = " → ".join(f"{count / 1e9:.3f}" for count in row.macs)
        lines.append(
            f"| {row.name} | {row.inputs} | {row.exact} | {row.inexact} | {row.unsupported} | {parameters} | {macs} "
            f"| {row.error:.1e} | {row.groups:.1f} | {row.shrink:.1f} |{peer}"
        )
    return lines


def environment(seed: int) -> str:
    """Say where the numbers come from."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "torch-pruning"))
    machine = platform.processor() or platform.machine()
    return f"{packages}; {machine}, one thread, seconds of processor time; seed {seed}."


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], help="only these")
    parser.add_argument("--source", nargs="+", choices=list(SOURCES), default=[], help="instead of torchvision")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=(*KINDS, "all"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("docs/data/zoo.json"), help="rows measured so far")
    parser.add_argument("--output", type=Path, default=Path("docs/zoo.md"))
    parser.add_argument("--again", action="store_true", help="measure models anew that have a row")
    parser.add_argument("--memory", type=float, default=19.0, help="GiB that one model may need")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one model may take")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "KIND"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, and write the report."""
    options = parse()
    if options.worker:
        torch.set_num_threads(1)
        logging.disable(logging.WARNING)
        work = measure_peer if options.peer else measure
        print(json.dumps(asdict(work(*options.worker, options.seed))))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    known = json.loads(options.json.read_text()) if options.json.exists() else []
    rows = {(row.name, row.kind): row for row in map(row_from, known)}
    wanted = [
        (name, kind)
        for kind, module in KINDS.items()
        for name in torchvision.models.list_models(module=module)
        if options.kind in (kind, "all") and not options.source
    ]
    wanted += [(name, source) for source in options.source for name in SOURCES[source]()]
    for name, kind in [each for each in wanted if not options.models or each[0] in options.models]:
        if options.again or (name, kind) not in rows:
            row = rows[name, kind] = (measure_both if kind in SOURCES else measure_apart)(name, kind, options)
            print(*table([row])[2:], sep="\n", flush=True)
        ordered = [rows[key] for key in sorted(rows, key=lambda key: ([*KINDS, *SOURCES].index(key[1]), key[0]))]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(each) for each in ordered], indent=1) + "\n")
        options.output.write_text(document(ordered, environment(options.seed)))


if __name__ == "__main__":
    main()
