"""What a student is compared with its teacher by, and how the loss that comes of it reaches the backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from gumbel_plugin.errors import ConfigError, TargetError

Distance: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]
"""Of the student's tensor from the teacher's, at a temperature."""


def _kl(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """Return T²·KL(p_T‖p_S), summed over the classes and averaged over all else (Hinton et al. 2015)."""
    classes = 1 if ours.dim() > 3 else -1  # of pictures the second dimension, of vectors and sequences the last
    log_ours, log_theirs = (F.log_softmax(each / temperature, classes) for each in (ours, theirs))
    return temperature**2 * (log_theirs.exp() * (log_theirs - log_ours)).sum(classes).mean()


def _mse(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    return (ours - theirs).square().mean()


def _cosine(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    return (1 - F.cosine_similarity(ours, theirs, dim=-1)).mean()


def relative_error(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """Return the mean square of the difference, relative to the teacher's."""
    smallest = torch.finfo(theirs.dtype).tiny
    return (ours - theirs).square().mean() / theirs.square().mean().clamp_min(smallest)


DISTANCES: Mapping[str, Distance] = {"kl": _kl, "mse": _mse, "cosine": _cosine}


def alike(ours: Tensor | None, theirs: Tensor | None, loss: str) -> tuple[Tensor, Tensor]:
    """Return outputs that can be compared.

    Raises:
        TargetError: If there are none, or their shapes differ.
        ConfigError: If ``kl`` is to compare a single number.
    """
    if ours is None or theirs is None:
        whose = "network" if ours is None else "teacher"
        raise TargetError(
            f"distillation: the output of the {whose} holds no floating point tensor to compare (no tensor, no "
            ".logits, no container of tensors); set logits: 0"
        )
    if ours.shape != theirs.shape:
        raise TargetError(
            f"distillation: the network's output is {tuple(ours.shape)}, the teacher's {tuple(theirs.shape)}; set "
            "logits: 0, or take a teacher with the same outputs"
        )
    if loss == "kl" and ours.dim() and ours.shape[1 if ours.dim() > 3 else -1] == 1:
        raise ConfigError(
            "distillation.loss = 'kl': the network has one output, over which there is no softmax; use 'mse'"
        )
    return ours, theirs


def change_gradient(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Let a function change the gradient that arrives at a tensor in a backward.

    Where the tensor is a cast of another one it is changed there: mixed precision gives a model's outputs in float32,
    but the loss that the model computes itself comes from what they were before.
    """
    node = tensor.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        tensor.register_hook(change)  # type: ignore[no-untyped-call]
        return
    source, place = node.next_functions[0]

    def at_source(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(change(each) if number == place else each for number, each in enumerate(gradients))

    source.register_prehook(at_source)  # type: ignore[union-attr]


class OwnLoss:
    """The loss that a model returns among its outputs, if it does: what that is multiplied with before the backward."""

    def __init__(self, output: Any, share: float) -> None:
        self.scale: Tensor | None = None
        self._share = share  # of a loss that the model has divided by the samples of all accumulated batches
        first = output[0] if isinstance(output, tuple) and output else None
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", first)
        if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad:
            loss.register_hook(self._note)  # type: ignore[no-untyped-call]

    def _note(self, gradient: Tensor) -> None:
        self.scale = gradient.detach() * self._share


class WholeLoss(torch.autograd.Function):
    """The value of the whole loss, and the gradient of the task's: the rest of it enters at the outputs."""

    @staticmethod
    def forward(ctx: Any, task: Tensor, value: Tensor, weight: float, note: Callable[[Tensor], None]) -> Tensor:
        """Return the whole loss."""
        ctx.note = note
        return weight * task + value.to(task)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Note what the loss was multiplied with."""
        ctx.note(gradient.detach())
        return gradient, None, None, None
