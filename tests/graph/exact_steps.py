"""A step of a pruner that is compared: what the masked model computes, the small one must."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from gumbel_plugin import GumbelGroupPruner, verify_equivalence
from gumbel_plugin.layers.weights import plain_copy


def set_gates(pruner: GumbelGroupPruner, seed: int) -> None:
    """Give the gates random latents."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in pruner.gate_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def exact_step(pruner: GumbelGroupPruner, inputs: Any, seed: int = 0) -> None:
    """Make a step with random gates, and compare the masked model with the small one, in both precisions."""
    set_gates(pruner, seed)
    groups = iter(pruner.step(interactive=True) or ())
    first = next(groups)
    masked = plain_copy(pruner.model)
    for group in itertools.chain([first], groups):
        group.prune()
    verify_equivalence(masked, plain_copy(pruner.model), inputs).raise_for_failure()
