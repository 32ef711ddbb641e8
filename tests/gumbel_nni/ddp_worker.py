"""One process of the distributed tests: trains with gates in DDP, on data of its own, and saves what came out.

python ddp_worker.py RANK WORLD FOLDER
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gumbel_plugin  # noqa: F401  (makes torchvision importable)
from gumbel_plugin import GumbelGroupPruner, GumbelPruner, MaskingSession
from gumbel_plugin.config import PruningConfig
from gumbel_torch_pruning import find_groups

import nni  # isort: skip
from nni.compression import TorchEvaluator  # isort: skip

STEPS = 8


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def make_config(**more: Any) -> PruningConfig:
    rules = [{"op_names": ["0", "2"], "sparse_ratio": 0.5}]
    phases = {"dense": 0.25, "fixed": 0.25}
    return PruningConfig.load({"pruning": {"config_list": rules, "rescale": "learned", "phases": phases, **more}})


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    inputs = torch.randn(8, 6, generator=generator)
    return inputs, inputs[:, :3].argmax(1)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def train_by_hand(rank: int, **more: Any) -> dict[str, Any]:
    """A loop of one's own around a `MaskingSession`: start it, then wrap the model."""
    model = make_model()
    session = MaskingSession(model, make_config(**more).pruning, find_groups(model, torch.randn(2, 6)))
    session.start(STEPS)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizers = [torch.optim.Adam([p for n, p in model.named_parameters() if "gumbel" not in n], lr=1e-2)]
    optimizers += session.optimizers()
    samples = []
    for step in range(STEPS):
        inputs, targets = batch(rank, step)
        loss = nn.functional.cross_entropy(wrapped(inputs), targets) + session.loss()
        samples.append(session.plan.masks["0"].gates().detach().clone())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        session.step()
    learned = {"logit": torch.cat([p.detach() for p in session.gate_parameters()])}
    learned["scales"] = torch.stack([p.detach() for p in session.scale_parameters()])
    masks = session.extract()
    session.detach()
    return {"masks": masks, "weights": tensors_of(model), "learned": learned, "samples": torch.stack(samples)}


def train_with_nni(rank: int) -> dict[str, Any]:
    """A `GumbelPruner` whose training function wraps the model."""
    model = make_model()

    def train(model: nn.Module, optimizer: Any, step: Any, lr: Any, steps: int, epochs: Any) -> None:
        wrapped = DistributedDataParallel(model.train(), find_unused_parameters=True)
        for number in range(steps):
            optimizer.zero_grad()
            step(batch(rank, number), wrapped).backward()
            optimizer.step()

    evaluator = TorchEvaluator(
        train,
        nni.trace(torch.optim.Adam)(model.parameters(), lr=1e-2),
        lambda batch, model: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        dummy_input=torch.randn(2, 6),
    )
    pruner = GumbelPruner(model, make_config(), evaluator)
    _, masks = pruner.compress(max_steps=STEPS)
    learned = {"logit": torch.cat([p.detach() for p in pruner.session.gate_parameters()])}
    pruner.unwrap_model()
    return {"masks": masks, "weights": tensors_of(model), "learned": learned}


def train_with_torch_pruning(rank: int) -> dict[str, Any]:
    """A `GumbelGroupPruner`, and the model wrapped once it has its gates."""
    model = make_model()
    inputs = batch(0, 0)[0]
    pruner = GumbelGroupPruner(model, inputs, pruning_ratio=0.5, ignored_layers=[model[4]], total_steps=STEPS)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        inputs, targets = batch(rank, step)
        loss = nn.functional.cross_entropy(wrapped(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        pruner.regularize(wrapped, loss)
        optimizer.step()
    learned = {"logit": torch.cat([p.detach() for p in pruner.gate_parameters()])}
    pruner.step()
    return {"masks": pruner.masks(), "weights": tensors_of(model), "learned": learned}


def main(rank: int, world: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    results = {
        "same": train_by_hand(rank),
        "own": train_by_hand(rank, per_rank_samples=True),
        "prior": train_by_hand(rank, gates={"prior": "taylor", "warmup": 2}),
        "nni": train_with_nni(rank),
        "groups": train_with_torch_pruning(rank),
    }
    torch.save(results, folder / f"rank{rank}.pth")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
