"""Every method on one network, the same data, epochs and seeds, at rising sparsity; NNI's pruners beside them.

    python benchmarks/methods.py --task digits --seeds 0 1 2
    python benchmarks/methods.py --task fashion_mnist --seeds 0 1 2 --kept 0.05 0.005 0.0015

The network is LeNet-300-100. Rows are appended to a JSON file as they come, so that an interrupted benchmark goes on
where it was; ``--report`` only makes the table and the plot from it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gumbel_plugin.runs.run import run
from gumbel_plugin.runs.run_config import RunConfig
from gumbel_plugin.runs.train import evaluate, load_config_data, loaders
from gumbel_plugin.training.session import MaskingSession

import lightning.pytorch as pl  # isort: skip  (after gumbel_plugin, which makes torchvision importable)
from nni_baselines import BASELINES, Baseline  # isort: skip
from rows import add_row, read_rows, spread

KEPT = (0.5, 0.1, 0.05, 0.03, 0.02, 0.005, 0.0015)
# Rates, phases and loss on Fashion-MNIST were chosen for the joint method on 10,000 training images held out.
TASKS: dict[str, dict[str, Any]] = {
    "digits": {
        "model": {"name": "lenet300", "options": {"in_features": 64}},
        "data": {"name": "digits", "batch_size": 64},
        "training": {"max_epochs": 40, "optimizer": {"name": "adam", "lr": 0.003}, "lr_decay": 0.85},
    },
    "fashion_mnist": {
        "model": {"name": "lenet300"},
        "data": {"name": "fashion_mnist", "batch_size": 256},
        "training": {
            "max_epochs": 20,
            "optimizer": {"name": "adam", "lr": 0.003},
            "lr_decay": 0.7,
            "label_smoothing": 0.05,
        },
        "pruning": {"gate_optimizer": {"name": "adam", "lr": 0.1}},
    },
}
# All trained methods, NNI's included, share the phases of the first: dense, learning masks, fixed masks.
PHASES = {"dense": 0.15, "fixed": 0.5}
FROZEN = {"weights": "frozen", "weight_init": "signed_constant"}
METHODS: dict[str, dict[str, Any]] = {
    "Gumbel-Softmax, joint (C)": {"method": "gumbel_softmax", "phases": PHASES},
    "hard concrete": {"method": "hard_concrete", "phases": PHASES},
    "Gibbs (D)": {"method": "gibbs", "phases": PHASES},
    "reparametrization, no fine-tuning (B)": {"method": "reparametrization"},
    "magnitude, no fine-tuning": {"method": "magnitude", "phases": {"dense": 0.999}},
    "magnitude, fine-tuned": {"method": "magnitude", "phases": {"dense": 0.499, "fixed": 0.5}},
    "random": {"method": "random", "phases": {"dense": 0.0, "fixed": 0.999}},
    "Gumbel-Softmax, frozen (A)": {"method": "gumbel_softmax", **FROZEN},
    "Gumbel-Softmax, frozen, smart rescale (A)": {"method": "gumbel_softmax", "rescale": "learned", **FROZEN},
    "Supermask, frozen": {"method": "supermask", **FROZEN},
    "edge-popup, frozen": {"method": "edge_popup", **FROZEN},
}
PER_LAYER = ("gibbs", "edge_popup")
"""Methods that rank each layer by itself; the others share one budget over the network."""


class BeforeTheCut(pl.Callback):  # type: ignore[misc]
    """Scores the network with sampled and with hard masks one step before the masks are decided."""

    def __init__(self, config: RunConfig) -> None:
        self.scores: dict[str, float] = {}
        self._config = config
        self._test = loaders(config, load_config_data(config))[2]

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        """Score both on the test data."""
        session: MaskingSession | None = task.session
        if session is None or session.total_steps is None:
            return
        if session.steps == round(session.total_steps * (1 - self._config.pruning.phases.fixed)) - 1:
            self.scores["hard"] = evaluate(task.model, self._test)
            with sampling(session):
                self.scores["sampled"] = evaluate(task.model, self._test)


@contextmanager
def sampling(session: MaskingSession) -> Iterator[None]:
    """Let the masks be drawn anew for every batch although the model is in eval mode."""
    noise = session.plan.noise
    before = noise.forward

    def draw(*_: Any) -> None:
        noise.forward += 1
        for mask in session.plan.masks.values():
            mask.train()

    handle = session.model.register_forward_pre_hook(draw, prepend=True)
    try:
        yield
    finally:
        handle.remove()
        noise.forward = before


def config_of(task: str, method: str, kept: float, seed: int) -> RunConfig:
    """Return the run of one method at one sparsity."""
    own = METHODS.get(method, {"method": "magnitude", "phases": PHASES})  # NNI's pruners take the phases from it
    rule = {"op_types": ["Linear"], "granularity": "element", "sparse_ratio": 1 - kept}
    if own["method"] not in PER_LAYER:
        rule["global_group_id"] = "network"
    report = {"html": False, "tensorboard": False, "latency_batches": ()}
    pruning = {**TASKS[task].get("pruning", {}), **own, "config_list": [rule]}
    return RunConfig.load({**TASKS[task], "seed": seed, "report": report, "pruning": pruning})


def measure(task: str, method: str, kept: float, seed: int) -> dict[str, float]:
    """Run one method once and return its row."""
    config = config_of(task, method, kept, seed)
    if method in BASELINES:
        return Baseline(config).run(method, 1 - kept)
    before = BeforeTheCut(config)
    result = run(config, followers=[before])
    small = result.columns["small"]
    assert small.score is not None
    return {
        **before.scores,
        "small": small.score,
        "density": 1 - result.sparsity,
        "parameters": small.profile.nonzero,
        "seconds_an_epoch": result.training_seconds / config.training.max_epochs,
    }


COLUMNS = {"sampled": "sampled masks", "hard": "hard masks", "small": "small network, end"}


def table(rows: Sequence[Mapping[str, Any]], task: str) -> str:
    """Return one task's rows as a Markdown table: mean ± standard deviation over the seeds (median of the last)."""
    lines = ["| kept | method | " + " | ".join(COLUMNS.values()) + " | median | kept really | s an epoch | seeds |"]
    lines.append("|---" * (len(COLUMNS) + 6) + "|")
    for kept in sorted({row["kept"] for row in rows if row["task"] == task}, reverse=True):
        for method in (*METHODS, *BASELINES):
            own = [row for row in rows if (row["task"], row["method"], row["kept"]) == (task, method, kept)]
            if not own:
                continue
            cells = [spread([row[key] for row in own if key in row]) for key in COLUMNS]
            median = statistics.median(row["small"] for row in own)
            density = statistics.mean(row["density"] for row in own)
            seconds = statistics.median(row["seconds_an_epoch"] for row in own)
            lines.append(
                f"| {kept:.2%} | {method} | {' | '.join(cells)} | {median:.2f} | {density:.3%} | {seconds:.2f} "
                f"| {len(own)} |"
            )
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], task: str, path: Path) -> None:
    """Draw the accuracy against what is kept, one line a method."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for number, method in enumerate((*METHODS, *BASELINES)):
        own = [row for row in rows if row["task"] == task and row["method"] == method]
        points = sorted({row["kept"] for row in own})
        heights = [statistics.mean(row["small"] for row in own if row["kept"] == kept) for kept in points]
        style = {"linestyle": "--" if "frozen" in method else ":" if method in BASELINES else "-", "marker": "o"}
        axes.plot(
            [100 * kept for kept in points], heights, label=method, color=f"C{number % 10}", markersize=3, **style
        )
    axes.set(xscale="log", xlabel="weights kept, %", ylabel="test accuracy of the small network, %", title=task)
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run what is missing, write the rows, print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="digits")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *BASELINES], choices=[*METHODS, *BASELINES])
    parser.add_argument("--kept", type=float, nargs="+", default=KEPT)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("docs/data/methods.json"))
    parser.add_argument("--plot", type=Path, help="by default docs/methods_TASK.svg")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    rows = read_rows(options.output)
    done = {(row["task"], row["method"], row["kept"], row["seed"]) for row in rows}
    wanted = [(options.task, m, k, s) for s in options.seeds for k in options.kept for m in options.methods]
    for task, method, kept, seed in [each for each in wanted if each not in done] if not options.report else []:
        row = {"task": task, "method": method, "kept": kept, "seed": seed, **measure(task, method, kept, seed)}
        print(row, flush=True)
        rows = add_row(options.output, row)
    print(table(rows, options.task))
    plot(rows, options.task, options.plot or Path(f"docs/methods_{options.task}.svg"))


if __name__ == "__main__":
    main()
