"""Pruning a trained network: GumbelGroupPruner beside Torch-Pruning's pruners, the same extra epochs for everyone.

A network is trained dense on Fashion-MNIST. Every method gets it, and the same number of epochs on top: images in the
same order, learning rates, distillation from the dense network. Who learns masks or trains for sparsity does so in the
first of them; the others cut at once. After the cut everybody's batch norms are recalibrated. Rows are appended to a
JSON file as they come, so that an interrupted benchmark goes on where it was; ``--report`` only makes the table. Beside
it are the dense networks, one a seed, and our small ones, whose shapes are trained from scratch too.

    python benchmarks/trained.py --tune 1e-5 1e-4 1e-3 1e-2 --targets 0.4   # accuracy on validation images only
    python benchmarks/trained.py --reg 1e-4 1e-3 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gumbel_plugin import GumbelGroupPruner, load_pruned, recalibrate, save_pruned
from gumbel_plugin.layers.weights import GATES
from gumbel_plugin.runs.data import load_data, make_loader
from gumbel_plugin.runs.models import build_model
from gumbel_plugin.runs.train import evaluate
from gumbel_plugin.sparsity.counting import count_macs, count_parameters, macs_of_layers

import torch_pruning as tp  # isort: skip  (after gumbel_plugin, which makes torchvision importable)
import torchvision  # isort: skip
from rows import add_row, read_rows, spread

VALIDATION = 5000
TEMPERATURE, TAUGHT = 2.0, 0.5  # of the distillation, and its share of the loss
DENSE_RATE = 0.1
TAYLOR_BATCHES = 10
CUTS = 400  # into how many steps Torch-Pruning's pruners divide their way to nothing; they stop at the target


def vgg16_bn() -> nn.Module:
    """Return torchvision's VGG-16 with batch norm, for one channel of 28×28 pixels and with one linear layer."""
    features = torchvision.models.vgg16_bn().features
    features[0] = nn.Conv2d(1, 64, 3, padding=1)
    return nn.Sequential(features[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: build_model("resnet20", 10, 1),
    "resnet56": lambda: build_model("resnet56", 10, 1),
    "vgg16_bn": vgg16_bn,
}


def scaled(images: Any, pixels: int) -> TensorDataset:
    """Return images averaged down to some pixels a side."""
    inputs, labels = images.tensors
    return TensorDataset(nn.functional.adaptive_avg_pool2d(inputs, pixels), labels)


class Cosine(NamedTuple):
    """A learning rate that falls to 0 from one epoch to another."""

    peak: float
    first: int
    last: int

    def rate(self, epoch: float) -> float:
        """Return the rate at an epoch, which may be a fraction."""
        return self.peak * (0.5 + 0.5 * math.cos(math.pi * (epoch - self.first) / (self.last - self.first)))


class Task:
    """One seed's data, and its network trained dense; epochs are counted through, the dense ones first."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed
        size = options.samples + VALIDATION
        bundle = load_data("fashion_mnist", samples=size, validation_fraction=VALIDATION / size, seed=seed)
        images = scaled(bundle.train, options.pixels)
        self.inputs, self.labels = (tensor.to(options.device) for tensor in images.tensors)
        self.logits = torch.zeros(len(self.inputs), 10, device=options.device)
        judged = {"validation": bundle.validation} | ({} if options.tune else {"test": bundle.test})
        smaller = {name: scaled(images, options.pixels) for name, images in judged.items()}
        self.judges = {name: make_loader(images, 500, shuffle=False, seed=0) for name, images in smaller.items()}
        self.extra = Cosine(options.lr, options.dense_epochs, options.dense_epochs + options.epochs)
        cut = self.extra.first + options.gate_epochs
        self.before, self.after = range(self.extra.first, cut), range(cut, self.extra.last)
        self.sparse: dict[str, nn.Module] = {}  # trained for sparsity, which the targets share
        self.example = self.inputs[:1]
        self.dense = self._trained_dense()
        self.macs = count_macs(self.dense, self.example)
        self.dense_scores = self.scores(self.dense)
        with torch.no_grad():  # images are not augmented: what the teacher says of them is always the same
            self.logits = torch.cat([self.dense.eval()(part) for part in self.inputs.split(500)])
        self.dense.train()

    def _trained_dense(self) -> nn.Module:
        options = self.options
        trained = f"{options.samples}x{options.dense_epochs}-batch{options.batch_size}-seed{self.seed}"
        path = options.output.parent / f"trained-{options.network}-{options.pixels}px-{trained}.safetensors"
        if not path.exists():
            torch.manual_seed(self.seed)
            model = self.placed(NETWORKS[options.network](), torch.channels_last)
            schedule = Cosine(DENSE_RATE, 0, options.dense_epochs)
            self.fit(model, schedule, range(options.dense_epochs), distill=False)
            save_pruned(path, model)
        return self.placed(load_pruned(path, NETWORKS[options.network]), torch.channels_last)

    def small_file(self, target: float) -> Path:
        """Return where the network is that ours has found."""
        options = self.options
        return Path(f"{options.output.with_suffix('')}-{options.network}-{target}-seed{self.seed}.safetensors")

    def placed(self, model: nn.Module, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
        """Return the model on the device, by default in the format that networks with odd widths need.

        Channels last is fast for the dense one; but with widths like 23 and 61, the backward of torch 2.13's
        convolutions on a CPU writes past its memory there.
        """
        return model.to(self.options.device, memory_format=memory_format)

    def batches(self, epoch: int) -> DataLoader[Any]:
        """Return an epoch's batches, which are the same for everyone: images, labels, the teacher's logits."""
        images = TensorDataset(self.inputs, self.labels, self.logits)
        return make_loader(images, self.options.batch_size, shuffle=True, seed=1000 * self.seed + epoch)

    def fit(
        self,
        model: nn.Module,
        schedule: Cosine,
        epochs: range,
        *,
        distill: bool = True,
        regularize: Callable[[Tensor], object] = lambda loss: None,
    ) -> None:
        """Train for some epochs of a schedule, with a new optimizer; `regularize` comes between backward and step."""
        share = self.options.distillation if distill else 0.0
        weights = [parameter for name, parameter in model.named_parameters() if GATES not in name]
        optimizer = torch.optim.SGD(weights, schedule.peak, momentum=0.9, weight_decay=5e-4)
        model.train()
        for epoch in epochs:
            batches = self.batches(epoch)
            for index, (inputs, labels, logits) in enumerate(batches):
                optimizer.param_groups[0]["lr"] = schedule.rate(epoch + index / len(batches))
                outputs = model(inputs)
                loss = nn.functional.cross_entropy(outputs, labels)
                if share:
                    loss = (1 - share) * loss + share * divergence(outputs, logits)
                optimizer.zero_grad()
                loss.backward()
                regularize(loss)
                optimizer.step()

    def finish(self, model: nn.Module, epochs: range) -> dict[str, Any]:
        """Measure right after the cut with batch norms recalibrated, train on in these epochs, and measure again."""
        model = self.placed(model)
        recalibrate(model, self.batches(self.extra.last))
        cut = {f"{name}_cut": score for name, score in self.scores(model).items()}
        self.fit(model, self.extra, epochs)
        return cut | self.measured(model)

    def measured(self, model: nn.Module) -> dict[str, Any]:
        """Return how good a small network is, and how small."""
        macs, parameters = count_macs(model, self.example) / self.macs, count_parameters(model)
        dense = {f"{name}_dense": score for name, score in self.dense_scores.items()}
        return {**self.scores(model), **dense, "macs": macs, "parameters": parameters}

    def scores(self, model: nn.Module) -> dict[str, float]:
        """Return the accuracy on validation images and, unless a strength is being chosen, on the test set."""
        return {name: evaluate(model, images) for name, images in self.judges.items()}


def divergence(outputs: Tensor, teacher: Tensor) -> Tensor:
    """Return T²·KL(teacher‖outputs) at the temperature T (Hinton et al. 2015)."""
    ours, theirs = ((logits / TEMPERATURE).log_softmax(1) for logits in (outputs, teacher))
    return TEMPERATURE**2 * nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def classifier(model: nn.Module) -> nn.Module:
    """Return the last linear layer, whose outputs stay."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def gumbel(task: Task, target: float, reg: float) -> dict[str, Any]:
    """Gates are learned with the weights, to the MAC budget; then the small network trains on."""
    model = copy.deepcopy(task.dense)
    arguments = {"target": "macs", "pruning_ratio": 1 - target, "ignored_layers": [classifier(model)]}
    steps = len(task.before) * len(task.batches(0))
    settings = {"pruning": task.options.pruning, "seed": task.seed}
    pruner = GumbelGroupPruner(model, task.example, **arguments, pruning=settings, total_steps=steps)
    task.fit(model, task.extra, task.before, regularize=lambda loss: pruner.regularize(model, loss))
    pruner.step()
    save_pruned(task.small_file(target), model)
    return {**task.finish(model, task.after), "pruning": task.options.pruning}


def from_scratch(task: Task, target: float, reg: float) -> dict[str, Any]:
    """Our small network (ours runs first) with new weights, trained for as many epochs in all, and distilled in all."""
    model = load_pruned(task.small_file(target), NETWORKS[task.options.network])
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            module.reset_parameters()
        if isinstance(module, (nn.Conv2d, nn.Linear)):  # as `build_model` draws them
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    model = task.placed(model)
    task.fit(model, Cosine(DENSE_RATE, 0, task.extra.last), range(task.extra.last))
    return task.measured(model)


class Peer(NamedTuple):
    """One of Torch-Pruning's pruners."""

    kind: type[Any]
    importance: Callable[[], Any]
    is_global: bool = True
    needs_gradients: bool = False

    @property
    def trains_sparse(self) -> bool:
        """Whether it has a regularization, which is to be trained with before the cut."""
        return self.kind is not tp.pruner.MagnitudePruner

    def build(self, task: Task, model: nn.Module, reg: float) -> Any:
        """Return the pruner of a network."""
        arguments = {"pruning_ratio": 1.0, "max_pruning_ratio": 0.9, "iterative_steps": CUTS}
        arguments |= {"global_pruning": self.is_global, "ignored_layers": [classifier(model)]}
        arguments |= {"reg": reg} if self.trains_sparse else {}
        return self.kind(model, task.example, self.importance(), **arguments)

    def run(self, task: Task, target: float, reg: float) -> dict[str, Any]:
        """Train for sparsity where the method does, cut to the MACs, train on."""
        epochs = range(task.extra.first, task.extra.last)
        model = copy.deepcopy(task.dense)
        if self.trains_sparse:
            model, epochs = self.sparse(task, reg), task.after
        if self.needs_gradients:
            _accumulate_gradients(model, task)
        self.cut(task, model, target, reg)
        return task.finish(model, epochs)

    def sparse(self, task: Task, reg: float) -> nn.Module:
        """Return a copy of the network trained for sparsity, which does not depend on the target."""
        key = f"{self.kind.__name__} {reg}"
        if key not in task.sparse:
            model = copy.deepcopy(task.dense)
            pruner = self.build(task, model, reg)
            task.fit(model, task.extra, task.before, regularize=lambda loss: pruner.regularize(model))
            task.sparse[key] = model
        return copy.deepcopy(task.sparse[key])

    def cut(self, task: Task, model: nn.Module, target: float, reg: float) -> None:
        """Prune in steps as small as can be, one layer after the other, until the MACs are reached."""
        pruner, counted = self.build(task, model, reg), macs_of_layers(model, task.example)
        layers = [
            (module, name) for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
        ]
        positions = [(module, counted.of(name) / module.weight.numel()) for module, name in layers]  # do not change
        for _ in range(CUTS):
            for group in pruner.step(interactive=True):
                group.prune()
                if sum(module.weight.numel() * times for module, times in positions) <= target * task.macs:
                    return
        raise SystemExit(f"{target:.0%} of the MACs are out of reach: no layer may lose more than nine tenths")


def _accumulate_gradients(model: nn.Module, task: Task) -> None:
    """Sum the gradients of the task's loss over a few batches, the batch norms as they are."""
    model.eval()
    for inputs, labels, _ in itertools.islice(task.batches(task.extra.first), TAYLOR_BATCHES):
        nn.functional.cross_entropy(model(inputs), labels).backward()
    model.train()


PEERS = {
    "magnitude, uniform": Peer(tp.pruner.MagnitudePruner, tp.importance.MagnitudeImportance, is_global=False),
    "magnitude, global": Peer(tp.pruner.MagnitudePruner, tp.importance.MagnitudeImportance),
    "Taylor, global": Peer(tp.pruner.MagnitudePruner, tp.importance.TaylorImportance, needs_gradients=True),
    "BN scale, sparse training": Peer(tp.pruner.BNScalePruner, tp.importance.BNScaleImportance),
    "GroupNorm, sparse training": Peer(tp.pruner.GroupNormPruner, tp.importance.MagnitudeImportance),
    "random, uniform": Peer(tp.pruner.MagnitudePruner, tp.importance.RandomImportance, is_global=False),
}
METHODS: dict[str, Callable[[Task, float, float], dict[str, Any]]] = {
    "GumbelGroupPruner": gumbel,
    **{name: peer.run for name, peer in PEERS.items()},
    "from scratch, our shape": from_scratch,
}
SPARSE = [name for name, peer in PEERS.items() if peer.trains_sparse]  # in the order of ``--reg``


def table(rows: Sequence[Mapping[str, Any]], judge: str) -> str:
    """Return the rows as a Markdown table: mean ± standard deviation over the seeds of the accuracy on some images."""
    lines = [
        f"| network | MACs asked | method | MACs | parameters | {judge}, right after the cut | of the dense "
        f"| {judge}, end | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for network in NETWORKS:
        of_network = [row for row in rows if row["network"] == network]
        dense = {row["seed"]: row[f"{judge}_dense"] for row in of_network}
        if dense:
            lines.append(f"| {network} | 1 | dense | 1 | - | - | - | {spread([*dense.values()])} | {len(dense)} |")
        for target in sorted({row["target"] for row in of_network}, reverse=True):
            for method in METHODS:
                own = [row for row in of_network if (row["target"], row["method"]) == (target, method)]
                for reg in sorted({row["reg"] for row in own}):
                    name = method + (f" {reg:g}" if method in SPARSE else "")
                    cells = _cells([row for row in own if row["reg"] == reg], judge)
                    lines.append(f"| {network} | {target} | {name} | {cells} |")
    return "\n".join(lines)


def _cells(rows: Sequence[Mapping[str, Any]], judge: str) -> str:
    macs, parameters = (statistics.mean(row[key] for row in rows) for key in ("macs", "parameters"))
    cut = [row[f"{judge}_cut"] for row in rows if f"{judge}_cut" in row]
    kept = f"{statistics.mean(cut) / statistics.mean(row[f'{judge}_dense'] for row in rows):.1%}" if cut else "-"
    return (
        f"{macs:.3f} | {parameters:.0f} | {spread(cut)} | {kept} | {spread([row[judge] for row in rows])} | {len(rows)}"
    )


def run_missing(options: argparse.Namespace, path: Path, settings: Mapping[str, Any]) -> None:
    """Run what the file does not have yet, and append it; processes with other seeds may write there too."""
    names = [name for name in options.methods if name in SPARSE or not options.tune]
    for seed in options.seeds:
        task: Task | None = None
        for method in names:
            own = options.tune or [options.reg[SPARSE.index(method)]] if method in SPARSE else [0.0]
            for reg, target in itertools.product(own, options.targets):
                cell = {"network": options.network, "seed": seed, "method": method, "reg": reg, "target": target}
                if any(cell.items() <= row.items() for row in read_rows(path)):
                    continue
                began = time.perf_counter()
                task = task or Task(options, seed)
                torch.manual_seed(seed)
                row = {**cell, **METHODS[method](task, target, reg), "settings": dict(settings)}
                add_row(path, row)
                print(f"{time.perf_counter() - began:.0f} s", row, flush=True)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), default="resnet20")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.4, 0.25], help="fractions of the MACs")
    parser.add_argument("--samples", type=int, default=20000, help=f"to train with; {VALIDATION} more to validate")
    parser.add_argument("--pixels", type=int, default=28, help="a side; images are averaged down")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--dense-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=6, help="extra ones, for every method")
    parser.add_argument("--gate-epochs", type=int, default=3, help="of them, before the cut of who learns what to cut")
    parser.add_argument("--lr", type=float, default=0.02, help="at the beginning of the extra epochs")
    parser.add_argument("--no-distillation", dest="distillation", action="store_const", const=0.0, default=TAUGHT)
    gates = {"gate_optimizer": {"name": "adam", "lr": 0.05}}
    parser.add_argument("--pruning", type=json.loads, default=gates, help="our section 'pruning', as JSON")
    parser.add_argument(
        "--reg", type=float, nargs=2, default=[1e-4, 1e-4], help=f"strength of {' and of '.join(SPARSE)}"
    )
    parser.add_argument("--tune", type=float, nargs="+", help="try these strengths, on validation images only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("docs/data/trained.json"))
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not 0 < options.gate_epochs < options.epochs:
        parser.error("--gate-epochs must be at least 1, and less than --epochs")
    return options


def main() -> None:
    """Run what is missing and print the table."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.deterministic = True
    path = options.output.with_stem(f"{options.output.stem}_tune") if options.tune else options.output
    if not options.report:
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = ("samples", "pixels", "batch_size", "dense_epochs", "epochs", "gate_epochs", "lr", "distillation")
        settings = {key: getattr(options, key) for key in keys}
        others = [row for row in read_rows(path) if row["network"] == options.network and row["settings"] != settings]
        if others:
            raise SystemExit(f"{path} has rows with {others[0]['settings']}, not {settings}; choose another --output")
        run_missing(options, path, settings)
    print(table(read_rows(path), "validation" if options.tune else "test"))


if __name__ == "__main__":
    main()
