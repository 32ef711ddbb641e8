"""How long a training will be, which NNI does not let its compressors know."""

from __future__ import annotations

import logging
import sys
from typing import Any

from nni.compression.base.compressor import Compressor
from nni.compression.utils import Evaluator
from nni.compression.utils.evaluator import LightningEvaluator, TransformersEvaluator

from gumbel_nni.compat.patching import replaces

_logger = logging.getLogger(__name__)
_NOT_YET = sys.maxsize
_PLANNED = "_planned_length"


def planned_length(evaluator: Any) -> tuple[int | None, int | None]:
    """Return the steps and the epochs of the training that an evaluator is about to do; either may be None."""
    steps, epochs = getattr(evaluator, _PLANNED, (None, None))
    return steps, epochs


@replaces(Compressor, "_fusion_compress")
def length_of_a_fused_training(original: Any, self: Any, max_steps: int | None, max_epochs: int | None) -> None:
    """Let every compressor of a fusion know how long the training will be.

    Cause (a gap, whatever the versions): ``compress(max_steps, max_epochs)`` passes it to the evaluator only, and that
    after all compressors were prepared. Remedy: the evaluator has it before (see `planned_length`).
    """
    if self.evaluator is not None:
        setattr(self.evaluator, _PLANNED, (max_steps, max_epochs))
    original(self, max_steps, max_epochs)


class PlannedSteps:
    """How many optimizer steps an evaluator's next training has.

    Steps are known beforehand. Epochs are turned into steps by the trainers of Lightning and Transformers, once they
    run; a training function of a `TorchEvaluator` does not let anyone know.

    Attributes:
        planned: The number of steps; a very large number if it will be known later, None if it will not.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        steps, epochs = planned_length(evaluator)
        later = isinstance(evaluator, LightningEvaluator | TransformersEvaluator)
        self.planned: int | None = steps if steps is not None or not later else _NOT_YET
        if self.planned is None and epochs is not None:
            _logger.warning(
                "max_epochs = %d leaves open how many steps that is: masks are learned from the first step on, at "
                "their final sparsity; pass max_steps to have phases and a ramp",
                epochs,
            )

    def known(self, total: int | None) -> int | None:
        """Return the number of steps, asking the trainer (which runs by now) if it was not known before.

        Args:
            total: What was known so far.
        """
        if total != _NOT_YET:
            return total
        if isinstance(self._evaluator, LightningEvaluator):
            steps = self._evaluator.model.trainer.estimated_stepping_batches
        else:
            steps = self._evaluator.trainer.state.max_steps
        return int(steps) if 0 < steps < _NOT_YET else None
