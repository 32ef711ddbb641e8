"""NNI's masks format, ``{module: {target: 0/1 tensor}}``: what is checked wherever masks come in from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gumbel_plugin.errors import TargetError, shown

Masks = dict[str, dict[str, Tensor]]
"""NNI's masks format: {module name: {tensor name: 0/1 tensor}}."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = frozenset((torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *_FLOATS))


def check_format(masks: Any) -> None:
    """Refuse what are no masks in NNI's format, ``{module: {target: tensor or None}}``, of values 0 and 1.

    Raises:
        TargetError: With the module and the target, and the value that is neither 0 nor 1.
    """
    if not isinstance(masks, Mapping):
        raise TargetError(f"masks are a {type(masks).__name__}; they must be {{module: {{target: 0/1 tensor}}}}")
    for name, targets in masks.items():
        fits = isinstance(name, str) and isinstance(targets, Mapping)
        if not fits or not all(isinstance(mask, Tensor | None) for mask in targets.values()):
            raise TargetError(
                f"masks of module {shown(name)} are {type(targets).__name__}; they must be {{target: 0/1 tensor}}"
            )
        for target, mask in targets.items():
            if not isinstance(target, str):
                raise TargetError(f"masks of module {shown(name)}: target {shown(target)} is no name of a tensor")
            if mask is not None:
                _check_mask(f"{name}.{target}", mask)


def _check_mask(name: str, mask: Tensor) -> None:
    if mask.dtype not in _DTYPES or mask.layout is not torch.strided or mask.is_meta:
        kind = "meta" if mask.is_meta else f"{mask.dtype}, {mask.layout}"
        raise TargetError(f"mask for {name} is a tensor of another kind ({kind}): it must be dense, bool or numbers")
    odd = mask.detach()[(mask != 0) & (mask != 1)]  # NaN is neither
    if odd.numel():
        raise TargetError(
            f"mask for {name} holds {odd.flatten()[0].item():g}: masks hold 0 (closed) and 1 (open) only; "
            "decide what is open first, for instance (mask > 0.5).float()"
        )
