"""Convolutions and linear layers whose forward is not torch's own."""

from __future__ import annotations

from torch import nn

from gumbel_plugin.layers.geometry import is_matrix

_PLAIN = ("torch.nn.", "transformers.pytorch_utils")
"""Where convolutions and linear layers are defined that compute nothing else."""


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a convolution or linear layer computes its output with code that is none of torch's layers'.

    It may pad or cast (timm's ``Conv2dSame`` and ``Linear``), compute another weight, or anything else.
    """
    forwards = [type(layer).forward, layer.__dict__.get("forward"), getattr(type(layer), "_conv_forward", None)]
    owners = [getattr(each, "__module__", "") for each in forwards if each is not None]
    return is_matrix(layer) and not all(owner.startswith(_PLAIN) for owner in owners)
