"""From which step on a state of a training could be its result."""

from __future__ import annotations

from gumbel_plugin.masks.base import Phase
from gumbel_plugin.training.session import MaskingSession


def settled(session: MaskingSession, steps: int | None = None) -> bool:
    """Return whether a state of a training with gates could be its result.

    That is: the masks are fixed, or are to be learned to the end and have no budget that is still falling. Before, the
    network is denser than it will be, and scores better than it will.

    Args:
        session: The training's session.
        steps: After how many optimizer steps the state was taken; now by default.
    """
    if steps is None and session.phase is Phase.FIXED:
        return True
    at, phases = session.steps if steps is None else steps, session.config.phases
    begin, end = session.mask_learning_span()
    if phases.fixed > 0:
        return session.total_steps is not None and at >= end
    if session.total_steps is None:
        return True
    return at >= begin and (
        not session.controller.budgets or (at - begin) / max(1, end - begin) >= session.config.budget.ramp
    )
