"""Attention at work: where a softmax is computed, and what each head of what was attended depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Softmaxes(TorchFunctionMode):
    """Tells of every softmax, with the number of heads that it seems to have."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("softmax", "scaled_dot_product_attention"):
            first = args[0] if args else next(iter((kwargs or {}).values()))
            self._tell(first.shape[-3] if first.dim() > 3 else 0)  # 0: unknown
        return func(*args, **(kwargs or {}))


class PlainAttention(TorchFunctionMode):
    """Computes attention with another function in the softmax's place, which hides no dependency.

    A softmax does not change when its inputs all rise alike, as they do with a bias of keys: no gradient would tell
    that heads depend on it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return _attend(*args, **kwargs)
        if name == "softmax":
            return _weights(args[0] if args else next(iter(kwargs.values())))
        return func(*args, **kwargs)


def _weights(scores: Tensor) -> Tensor:
    return scores.double().sigmoid() / max(scores.shape[-1], 1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], dim=-3) for each in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask
    weights = _weights(scores)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        weights = weights * attn_mask
    return (weights.tril() if is_causal else weights) @ value


def dependencies(
    read: Tensor, dim: int, heads: int, tensors: Mapping[str | int, Tensor]
) -> dict[str | int, list[Tensor]]:
    """Return which entries of tensors, along each of their dimensions, each head's columns depend on."""
    size = read.shape[dim] // heads
    noise = torch.rand(read.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(read) + 0.5
    used: dict[str | int, list[Tensor]] = {
        key: [torch.zeros(heads, length, dtype=torch.bool) for length in tensor.shape]
        for key, tensor in tensors.items()
    }
    for head in range(heads):
        weights = torch.zeros_like(read)
        weights.narrow(dim, head * size, size).copy_(noise.narrow(dim, head * size, size))
        gradients = torch.autograd.grad(read, list(tensors.values()), weights, retain_graph=True, allow_unused=True)
        for key, gradient in zip(tensors, gradients, strict=True):
            if gradient is not None:
                touched = (gradient != 0).cpu()  # NaN too
                for d in range(gradient.dim()):
                    used[key][d][head] = touched.movedim(d, 0).reshape(len(touched.movedim(d, 0)), -1).any(1)
    return used
