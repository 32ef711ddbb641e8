"""Where the gates stand after each epoch: a histogram of P(keep) for every mask, and the MACs that they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gumbel_plugin.errors import MissingExtraError
from gumbel_plugin.storage.files import append_text
from gumbel_plugin.training.session import MaskingSession
from gumbel_plugin.training.status import hard_gates, keep_probability

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise MissingExtraError("lightning", "lightning") from error

BINS = 20


class GateLog(pl.Callback):  # type: ignore[misc]
    """Writes a line of JSON an epoch, and logs the metric ``macs``.

    Args:
        session: Whose gates.
        path: The file, which is appended to; None writes none.
        macs: Returns the MACs that hard gates leave, by mask name; None logs none.
    """

    def __init__(
        self,
        session: MaskingSession,
        path: Path | None = None,
        macs: Callable[[dict[str, Tensor]], Tensor] | None = None,
    ) -> None:
        self._session = session
        self._path = path
        self._macs = macs

    def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
        """Write the histograms of this epoch."""
        places = {name: place for place, (name, _) in enumerate(self._session.model.named_modules())}
        terms = [term for budget in self._session.plan.budgets for term in budget.terms]
        terms.sort(key=lambda term: places.get(term.name, len(places)))
        if self._macs is not None:
            task.log("macs", float(self._macs({term.name: hard_gates(term) for term in terms})))
        if self._path is not None and trainer.is_global_zero:
            entry = {
                "epoch": trainer.current_epoch + 1,
                "phase": self._session.phase.value,
                "masks": {term.name: _histogram(keep_probability(term)) for term in terms},
            }
            append_text(self._path, json.dumps(entry, separators=(",", ":")) + "\n")


def _histogram(values: Tensor) -> list[int]:
    return [int(count) for count in torch.histc(values.detach().float().cpu(), BINS, 0.0, 1.0)]
