"""A step of a pruner that is compared: what the masked model computes, the small one must."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch

from gumbel_plugin import GumbelGroupPruner, verify_equivalence
from gumbel_plugin.layers.weights import plain_copy


def exact_step(pruner: GumbelGroupPruner, inputs: Any) -> None:
    """Make a step with random gates, and compare the masked model with the small one, in both precisions."""
    generator = torch.Generator().manual_seed(0)
    for parameter in pruner.gate_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    groups = iter(pruner.step(interactive=True) or ())
    first = next(groups)
    masked = copy.deepcopy(pruner.model)
    for group in itertools.chain([first], groups):
        group.prune()
    verify_equivalence(masked, plain_copy(pruner.model), inputs).raise_for_failure()
