"""Learned gates as an importance for Torch-Pruning's own pruners."""

from __future__ import annotations

from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor

from gumbel_plugin.training.session import MaskingSession


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
        """Return one score per channel of the group's root, or None (leave it alone) if its channels are not gated.

        Channels that have no gate, among others that do, get 1.
        """
        graph, dep = group._DG, group[0].dep
        layer = graph._module2name.get(dep.target.module)  # by name: the pruner may have a copy of the session's model
        reads = not graph.is_out_channel_pruning_fn(dep.handler)
        scores: Tensor | None = None
        for name, gated in self.session.plan.groups.items():
            for part in gated.consumers if reads else gated.producers:
                if part.module == layer:
                    if scores is None:
                        count = graph.get_in_channels if reads else graph.get_out_channels
                        scores = torch.ones(count(dep.target.module))
                    probability = self.session.plan.masks[name].probability(None)
                    scores[part.positions] = probability[part.units.to(probability.device)].to(scores)
        return None if scores is None else scores[torch.as_tensor(group[0].idxs)]
