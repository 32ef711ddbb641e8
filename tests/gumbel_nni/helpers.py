"""What several test modules of the adapter need: evaluators, random networks, masks by hand, repairs undone."""

from __future__ import annotations

import copy
from typing import Any

import nni
import pytest
import torch
from nni.compression import TorchEvaluator
from torch import Tensor, nn

from gumbel_nni.compat.patching import innermost

Masks = dict[str, dict[str, Tensor]]


def without(undo: pytest.MonkeyPatch, owner: Any, *names: str) -> None:
    """Give NNI its own functions back for the rest of a context."""
    for name in names:
        undo.setattr(owner, name, innermost(getattr(owner, name)))


def evaluator_of(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor | None = None,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
    lr: float = 1e-2,
    **more: Any,
) -> TorchEvaluator:
    """Return an evaluator that trains on one batch; without labels, it makes the outputs small."""

    def train(model: nn.Module, optimizer: Any, step: Any, lr: Any, steps: int, epochs: int | None) -> None:
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            step((inputs, labels), model).backward()
            optimizer.step()

    def loss(batch: tuple[Tensor, Tensor | None], model: nn.Module) -> Tensor:
        outputs, targets = model(batch[0]), batch[1]
        return outputs.square().mean() if targets is None else nn.functional.cross_entropy(outputs, targets)

    return TorchEvaluator(train, nni.trace(optimizer)(model.parameters(), lr=lr), loss, **more)


@torch.no_grad()
def randomized(model: nn.Module) -> nn.Module:
    """Fill a model with random weights, biases and statistics of a working scale."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name == "running_var" or (tensor.dim() == 1 and name == "weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                fan_in = tensor[0].numel() if tensor.dim() > 1 else 25
                tensor.normal_(0.0, fan_in**-0.5, generator=generator)
    return model


@torch.no_grad()
def masked_copy(model: nn.Module, masks: Masks) -> nn.Module:
    masked = copy.deepcopy(model)
    for name, targets in masks.items():
        for target, mask in targets.items():
            masked.get_parameter(f"{name}.{target}").mul_(mask)
    return masked


@torch.no_grad()
def relative_error(reference: nn.Module, candidate: nn.Module, *inputs: Tensor) -> float:
    expected, actual = reference(*inputs), candidate(*inputs)
    return float((expected - actual).abs().max() / expected.abs().max())


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
