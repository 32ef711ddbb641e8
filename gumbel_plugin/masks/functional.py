"""The arithmetic of a sampled mask: the noise, and the product of a weight with a straight-through Gumbel-Softmax gate.

A Gumbel-Softmax over the two classes keep/drop with log-probabilities ``[m, 0]`` needs no pair of Gumbel variables:
their difference is one logistic variable, so that with a single uniform ``u`` per gate

    y = sigmoid((m + logit(u)) / temperature)        the soft gate
    keep  <=>  y > 1/2                               the hard gate; P(keep) = sigmoid(m) at every temperature

and the straight-through gradient of the hard gate with respect to ``m`` is ``y (1 - y) / temperature``.
Sources: Jang et al., arXiv 1611.01144, and Maddison et al., arXiv 1611.00712 (Gumbel-Softmax, binary case);
Dupont et al., arXiv 2202.12986 (the single latent ``m`` per weight).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gumbel_plugin.errors import ConfigError

_MASK64 = 2**64 - 1
_WORTH_THREADS = 2**15
"""From how many elements on torch's threads are worth their waking."""
_aten = torch.ops.aten


def uniform_noise(
    shape: Sequence[int],
    *,
    seed: int,
    counter: int,
    stream: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    bits: Literal[16, 32] = 16,
) -> Tensor:
    """Draw uniform noise in the open interval (0, 1) that depends on the arguments alone.

    The global random state is neither read nor changed, and the number of threads does not matter. On the CPU every
    draw of 64 bits serves ``64 // bits`` gates, several times faster than torch's `uniform_`: the values are the
    midpoints of ``2**bits`` equal cells, so P(keep) is exact to within ``2**-(bits + 1)``. (With 32 bits, float32 has
    room for ``2**23`` cells only.) On other devices ``bits`` is ignored and the device's `uniform_` is used.

    Args:
        shape: Shape of the result.
        seed: The seed of the run.
        counter: The number of the training forward.
        stream: The number of the mask, so that masks of one shape differ.
        device: Where the noise is drawn; devices differ in their generators, hence in the values.
        dtype: `torch.float32` or `torch.float64`; the dtype of the logits it will meet.
        bits: Random bits per value on the CPU, 16 or 32.

    Returns:
        A fresh contiguous tensor of this shape, every element strictly between 0 and 1.

    Raises:
        ConfigError: If the dtype or the number of bits is not one of those above.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"dtype={dtype}: noise needs torch.float32 or torch.float64; coarser ones round it to 0 or 1")
    if bits not in (16, 32):
        raise ConfigError(f"bits={bits}: must be 16 or 32")
    device = torch.device(device)
    key = _mix(seed, counter, stream)
    if device.type == "cpu":
        return _packed_uniform(shape, key, dtype, bits)
    generator = torch.Generator(device).manual_seed(key)
    edge = torch.finfo(dtype).eps / 2  # the largest distance to 1 that is still representable
    return torch.empty(shape, dtype=dtype, device=device).uniform_(generator=generator).clamp_(edge, 1 - edge)


def straight_through_gumbel(
    weight: Tensor, logit: Tensor, uniform: Tensor, temperature: float = 1.0, noise_scale: float = 1.0
) -> Tensor:
    """Multiply a weight by hard gates sampled from its logits; the gradient goes straight through to the logits.

    Between forward and backward at most two tensors of the weight's size are alive beside the inputs: the result and
    ``uniform``, **whose memory is taken over and overwritten**: do not use it afterwards. Gradients that nobody needs
    are not computed (a frozen weight also makes the backward a single product). Differentiable once.

    Args:
        weight: Any shape and floating dtype.
        logit: The latent ``m``, same shape; P(keep) = sigmoid(m).
        uniform: Noise from `uniform_noise`, same shape and dtype as ``logit``; consumed.
        temperature: Positive; a lower one makes the gradient steeper near the threshold.
        noise_scale: What logit(u) is multiplied by: P(keep) = sigmoid(m / noise_scale); with 0, every sample is m > 0.

    Returns:
        ``weight * hard`` in the weight's dtype. With an incoming gradient ``g``, ``weight`` receives ``g * hard`` and
        ``logit`` receives ``g * weight * y * (1 - y) / temperature``.

    Raises:
        ConfigError: If shapes or dtypes do not agree, or the temperature is not positive.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature={temperature}: must be positive and finite")
    if not weight.shape == logit.shape == uniform.shape:
        shapes = f"{tuple(weight.shape)}, {tuple(logit.shape)}, {tuple(uniform.shape)}"
        raise ConfigError(f"weight, logit and uniform have shapes {shapes}: they must be equal")
    if uniform.dtype != logit.dtype or uniform.requires_grad:
        wrong = f"dtype {uniform.dtype}, requires_grad={uniform.requires_grad}"
        raise ConfigError(f"uniform has {wrong}: it must have the logit's dtype, {logit.dtype}, and need no gradient")
    masked: Tensor = _MaskedWeight.apply(weight, logit, uniform, temperature, noise_scale)  # type: ignore[no-untyped-call]
    return masked


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the hard gates, bit for bit, with the gradient of the soft ones."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in a dtype in which noise and thresholds are fine enough: its own, or float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _MaskedWeight(torch.autograd.Function):
    """``weight * (y > 1/2)``, with ``y`` computed in the memory of the noise.

    `threshold_backward(a, y, 1/2)` is ``a`` where ``y > 1/2`` and 0 elsewhere, in one vectorised pass; a comparison
    and a product take two and a temporary, and `torch.where` takes four times as long on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, logit: Tensor, uniform: Tensor, temperature: float, noise_scale: float
    ) -> Tensor:
        soft = _logit_(uniform)
        if noise_scale != 1.0:
            soft.mul_(noise_scale)
        soft.add_(logit)
        if temperature != 1.0:
            soft.div_(temperature)
        soft.sigmoid_()
        masked: Tensor = _aten.threshold_backward(weight, soft, 0.5).to(weight.dtype)
        ctx.temperature = temperature
        needs_weight, needs_logit = ctx.needs_input_grad[:2]
        if needs_weight:
            ctx.save_for_backward(soft, weight if needs_logit else None)
        elif needs_logit:  # the whole derivative is known already, and fits where the soft gates were
            ctx.save_for_backward(_slope_(soft, weight, soft, temperature))
        return masked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        needs_weight, needs_logit = ctx.needs_input_grad[:2]
        if not needs_weight:
            (slope,) = ctx.saved_tensors
            return None, grad * slope, None, None, None
        soft, weight = ctx.saved_tensors
        grad_weight: Tensor = _aten.threshold_backward(grad, soft, 0.5)
        if not needs_logit:
            return grad_weight, None, None, None, None
        product = grad.to(soft.dtype) * weight
        return grad_weight, _slope_(product, product, soft, ctx.temperature), None, None, None


def _logit_(uniform: Tensor) -> Tensor:
    """Turn u into log(u / (1 - u)), in place."""
    if uniform.numel() < _WORTH_THREADS:
        # torch's own wakes all threads for the shortest vector: 57 microseconds, where these three take 6.
        return uniform.div_(1 - uniform).log_()
    return uniform.logit_()


def _slope_(out: Tensor, factor: Tensor, soft: Tensor, temperature: float) -> Tensor:
    """Write ``factor * y * (1 - y) / temperature`` into ``out``, which may be one of the other two."""
    _aten.sigmoid_backward(factor, soft, grad_input=out)
    return out if temperature == 1.0 else out.div_(temperature)


def _packed_uniform(shape: Sequence[int], key: int, dtype: torch.dtype, bits: int) -> Tensor:
    """Cut random 64-bit integers into signed ones of ``bits`` bits, and map those into (0, 1).

    NumPy's SFC64 takes half the time of torch's generator, whose CPU version also reads 32 bits of its seed only.
    """
    size = math.prod(shape)
    words = np.random.SFC64(key).random_raw(-(-size * bits // 64))
    cells = torch.from_numpy(words.view(np.int16 if bits == 16 else np.int32)[:size])
    return _midpoints(cells, dtype).view(torch.Size(shape))


def _midpoints(cells: Tensor, dtype: torch.dtype) -> Tensor:
    """Map signed integers to the midpoints of ``2**bits`` equal cells of (0, 1), without rounding."""
    bits = torch.iinfo(cells.dtype).bits
    if bits == 32 and dtype == torch.float32:
        # A midpoint of 2**23 cells takes 24 bits, float32's whole significand; one more and the last would round to 1.
        bits, cells = 23, cells >> 9
    return cells.to(dtype).add_(2 ** (bits - 1) + 0.5).mul_(2.0**-bits)


def _mix(*numbers: int) -> int:
    """Hash integers, order included, into one of 64 bits: a chain of splitmix64 steps (Steele et al., OOPSLA 2014)."""
    state = 0
    for number in numbers:
        state = ((state ^ (number & _MASK64)) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state
