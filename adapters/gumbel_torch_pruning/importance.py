"""Learnt gates as an importance for Torch-Pruning's own pruners."""

from __future__ import annotations

from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor

from gumbel_plugin.learning.session import MaskingSession


class GateImportance(tp.importance.Importance):  # type: ignore[misc]
    """The probability that a channel's gate is open, P(keep) = σ(m̂), as a Torch-Pruning importance.

    For users who stay with `tp.pruner.BasePruner` and its subclasses; `GumbelGroupPruner` needs no importance, meets
    its budget exactly and removes nothing that still matters.

    Example::

        session = MaskingSession(model, config, find_groups(model, example_inputs))
        ...                                       # train
        session.detach()
        pruner = tp.pruner.BasePruner(model, example_inputs, importance=GateImportance(session), pruning_ratio=0.5)
    """

    def __init__(self, session: MaskingSession) -> None:
        self.session = session

    @torch.no_grad()
    def __call__(self, group: Any, **_: Any) -> Tensor | None:
        """Return one score per channel of the group's root, or None (leave it alone) if its channels are not gated."""
        names = {module: name for name, module in self.session.model.named_modules()}
        own = {
            (part.module, kind): (name, part)
            for name, gated in self.session.plan.groups.items()
            for kind, parts in (("out", gated.producers), ("in", gated.consumers))
            for part in parts
        }
        root = group[0].dep
        kind = "out" if group._DG.is_out_channel_pruning_fn(root.handler) else "in"
        found = own.get((names.get(root.target.module, ""), kind))
        if found is None:
            return None
        name, part = found
        probability = self.session.plan.masks[name].probability(None)
        scores = torch.ones(int(part.positions.max()) + 1, device=probability.device)
        scores[part.positions] = probability[part.units].to(scores.dtype)
        return scores[torch.as_tensor(group[0].idxs)]
