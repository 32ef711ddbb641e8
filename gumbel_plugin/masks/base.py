"""The base of every mask method: one set of gates, and what a method must say about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from gumbel_plugin.masks.functional import uniform_noise
from gumbel_plugin.masks.targets import Granularity

WeightMode = Literal["frozen", "trained"]
"""Whether the weights stay at their initial values (subnetwork extraction) or are trained with the gates."""


class Phase(Enum):
    """What the gates do at present: not yet used, being learnt, or decided."""

    OPEN = "open"
    LEARNING = "learning"
    FIXED = "fixed"


@dataclass
class NoiseSource:
    """Random numbers that depend on the seed, the number of the training forward and the mask, and on nothing else.

    Every rank of a distributed run draws the same sample, a resumed run goes on with the same numbers, and a layer that
    is evaluated twice in one forward (shared, or recomputed by activation checkpointing) sees the same sample.

    Attributes:
        seed: The run's seed.
        forward: How many training forwards were started.
    """

    seed: int = 0
    forward: int = 0

    def uniform_like(self, logit: Tensor, stream: int) -> Tensor:
        """Draw uniform numbers in (0, 1) for one mask in this forward, of the shape, dtype and device of its logits."""
        return uniform_noise(
            logit.shape, seed=self.seed, counter=self.forward, stream=stream, device=logit.device, dtype=logit.dtype
        )


class MaskOptions(BaseModel):
    """Base of the options of a method: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def for_weights(self, weights: WeightMode) -> MaskOptions:
        """Return the options with defaults filled in that depend on whether the weights are trained too."""
        return self


class LearntMask(nn.Module):
    """A set of gates that are learnt together: the units of one tensor, or of one channel group.

    A method overrides `sample`, `scores` and `probability`, and where it has something to schedule or to penalise
    `advance` and `penalty`. Methods whose masks are functions of the weights read the tensor that is passed in.

    Attributes:
        shape: The gates' shape.
        granularity: How the gates spread over the weight; None for channel groups, whose gates are per channel.
        phase: Whether the gates are open, learnt or fixed.
        hard: The decided gates, bool, used when the phase is `FIXED`.
    """

    Options: ClassVar[type[MaskOptions]] = MaskOptions
    hard: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        options: MaskOptions,
        noise: NoiseSource,
        stream: int,
        granularity: Granularity | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.options = options
        self.noise = noise
        self.stream = stream
        self.granularity = granularity
        self.phase = Phase.OPEN
        self.register_buffer("hard", torch.ones(self.shape, dtype=torch.bool))
        self._drawn: tuple[int, Tensor] | None = None

    # What a method says -------------------------------------------------------------------------------------------

    def sample(self, weight: Tensor | None) -> Tensor:
        """Return the training gates, of `shape`, differentiable."""
        raise NotImplementedError

    def scores(self, weight: Tensor | None) -> Tensor:
        """Return the gates' importance, of `shape`: the highest are kept. A gate is open by itself if it is >= 0."""
        raise NotImplementedError

    def probability(self, weight: Tensor | None) -> Tensor:
        """Return the differentiable expectation of each gate, of `shape`, in [0, 1]."""
        raise NotImplementedError

    def advance(self, progress: float) -> None:
        """Move the method's own schedules to a progress in [0, 1] of the mask learning."""

    def penalty(self, weight: Tensor | None) -> Tensor | None:
        """Return the method's own extra loss, if it has one."""
        return None

    # What the session uses ----------------------------------------------------------------------------------------

    def decide(self, weight: Tensor | None) -> Tensor:
        """Return the gates that are open without any budget, bool, of `shape`."""
        return self.scores(weight).detach() >= 0

    def gates(self, weight: Tensor | None = None) -> Tensor:
        """Return the gates as they act now: ones, a sample (the same throughout one forward), or the hard gates."""
        if self.phase is Phase.OPEN:
            return torch.ones(self.shape, device=self.hard.device)
        if self.phase is Phase.FIXED:
            return self.hard.float()
        if not self.training:
            return self.decide(weight).float()
        if self.granularity is not None:
            return self.sample(weight)  # one layer uses it once in a forward; drawn again, it is the same
        if self._drawn is None or self._drawn[0] != self.noise.forward:
            self._drawn = (self.noise.forward, self.sample(weight))
        return self._drawn[1]

    def mask_weight(self, weight: Tensor) -> Tensor:
        """Return the weight times its gates; for masks over one tensor (`granularity` is set)."""
        if self.phase is Phase.OPEN:
            return weight
        return weight * self.spread(self.gates(weight), weight).to(weight.dtype)

    def spread(self, gates: Tensor, weight: Tensor) -> Tensor:
        """Spread gates of this mask so that they multiply the weight."""
        return gates if self.granularity is None else self.granularity.spread(gates, weight.shape)

    def fix(self, hard: Tensor) -> None:
        """Decide the gates: from now on they are what is given."""
        self.hard.copy_(hard.reshape(self.shape).to(self.hard.device) != 0)
        self.phase = Phase.FIXED
        self.forget_sample()

    def forget_sample(self) -> None:
        """Drop the sample of the last forward, and the graph that hangs on it."""
        self._drawn = None

    def __getstate__(self) -> dict[str, object]:
        # A sample is a non-leaf tensor, which torch refuses to copy; it belongs to one forward of one model anyway.
        return {**self.__dict__, "_drawn": None}
