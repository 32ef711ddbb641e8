"""The base of every mask method: one set of gates, and what a method must say about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal

import torch
from torch import Tensor, distributed, nn
from typing_extensions import Self, override

from gumbel_plugin.config_values import Section
from gumbel_plugin.errors import ConfigError, TargetError
from gumbel_plugin.masks.functional import at_least_float32, uniform_noise
from gumbel_plugin.sparsity.types import Granularity

WeightMode = Literal["frozen", "trained"]
"""Whether the weights stay at their initial values (subnetwork extraction) or are trained with the gates."""


class Phase(Enum):
    """What the gates do at present: not yet used, being learned, or decided."""

    OPEN = "open"
    LEARNING = "learning"
    FIXED = "fixed"


_PHASES = (Phase.OPEN, Phase.LEARNING, Phase.FIXED)


@dataclass
class NoiseSource:
    """Random numbers that depend on the seed, the number of the training forward and the mask, and on nothing else.

    Every rank of a distributed run draws the same sample, a resumed run goes on with the same numbers, and a layer that
    is evaluated twice in one forward (shared, or recomputed by activation checkpointing) sees the same sample.

    Attributes:
        seed: The run's seed.
        forward: How many training forwards were started.
        per_rank: Whether each rank of a distributed run draws samples of its own in training forwards (what is drawn
            before the first one, such as initial scores, stays the same).
    """

    seed: int = 0
    forward: int = 0
    per_rank: bool = False

    def uniform_like(self, logit: Tensor, stream: int, draw: int = 0, bits: Literal[16, 32] = 16) -> Tensor:
        """Draw uniform numbers in (0, 1) for one mask in this forward, of the shape, dtype and device of its logits.

        Args:
            logit: What the numbers are shaped like.
            stream: The mask's number.
            draw: The number of the draw, for masks that need several in one forward.
            bits: Random bits per number (see `uniform_noise`).
        """
        return uniform_noise(
            logit.shape,
            seed=self.seed,
            counter=self.forward + (self._rank() << 48),
            stream=stream + (draw << 32),
            device=logit.device,
            dtype=logit.dtype,
            bits=bits,
        )

    def _rank(self) -> int:
        if not (self.per_rank and self.forward and distributed.is_available() and distributed.is_initialized()):
            return 0
        return distributed.get_rank()


Usage = Callable[[Sequence[Tensor]], Tensor]
"""Returns the fraction of a budget's dense cost that stays under gates, one tensor (soft or hard) for each mask."""


class MaskOptions(Section):
    """Base of the options of a method: unknown keys are errors."""

    @property
    def gates_blocks(self) -> bool:
        """Whether a rule names whole residual blocks, each with one gate, instead of layers."""
        return False

    def for_weights(self, weights: WeightMode) -> Self:
        """Return the options with defaults filled in that depend on whether the weights are trained too."""
        return self


class LogitOptions(MaskOptions):
    """Options of the methods that learn one latent logit a gate.

    Attributes:
        initial_logit: Where the logit of every gate starts; P(keep) = sigmoid(logit). None: 0 for frozen weights, as
            published, 3 for trained ones (the network starts almost whole).
    """

    initial_logit: float | None = None

    @override
    def for_weights(self, weights: WeightMode) -> Self:
        if self.initial_logit is not None:
            return self
        return self.model_copy(update={"initial_logit": 0.0 if weights == "frozen" else 3.0})


class LearnedMask(nn.Module):
    """A set of gates that are learned together: the units of one tensor, or of one channel group.

    A method overrides `sample`, `scores` and `probability`, and where it has something to schedule or to penalize
    `advance` and `penalty`. Methods whose masks are functions of the weights read the tensor that is passed in, and say
    so by `reads_weight`. What else a method is like it says by the other class attributes.

    Attributes:
        manages_own_sparsity: Whether the method has a way of its own to its `sparse_ratio`, which it then needs: no budget
            loss drives its gates.
        shares_budget: Whether several masks can be ranked together under one ratio.
        reads_weight: Whether the gates are functions of the weight that they multiply.
        needs_trained_weights: Whether nothing worth learning is left if the weights are frozen.
        per_sample: Whether each sample has gates of its own until they are decided. These multiply activations, not
            weights, see `gumbel_plugin.training.sample_gates`.
        counts_macs: Whether a unit costs its multiply-accumulates, where they are known, and not its weights.
        published_optimizer: The settings of the gates' optimizer that the method was published with; None leaves them
            to the configuration.
        shape: The gates' shape.
        granularity: How the gates spread over the weight; None for channel groups, whose gates are per channel.
        phase: Whether the gates are open, learned or fixed.
        polled: Whether each sample is asked for its own gates outside of training (if it has any).
        hard: The decided gates, bool, used when the phase is `FIXED`.
        sparsity: The fraction of these gates that their budget will close; set by the budget, and kept up to date.
    """

    Options: ClassVar[type[MaskOptions]] = MaskOptions
    manages_own_sparsity: ClassVar[bool] = False
    shares_budget: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = False
    needs_trained_weights: ClassVar[bool] = False
    per_sample: ClassVar[bool] = False
    counts_macs: ClassVar[bool] = False
    published_optimizer: ClassVar[Mapping[str, str | float] | None] = None
    hard: Tensor
    stage: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        options: MaskOptions,
        noise: NoiseSource,
        stream: int,
        granularity: Granularity | None = None,
    ) -> None:
        super().__init__()
        if granularity is None and self.reads_weight:
            raise ConfigError(
                "granularity 'out_channel' (NNI's 'default') removes channels across layers, but the gates of a "
                f"{type(self).__name__} are functions of one layer's weight; use 'element', or as far as the method "
                "has them 'kernel', or [1, -1, -1, -1] for the filters of each layer alone"
            )
        self.shape = tuple(shape)
        self.options = options
        self.noise = noise
        self.stream = stream
        self.granularity = granularity
        self.evaluated_per_sample = False
        self.sparsity: float | None = None
        self.register_buffer("hard", torch.ones(self.shape, dtype=torch.bool))
        self.register_buffer("stage", torch.zeros((), dtype=torch.uint8))
        self._read_stage: tuple[int, int, Phase] | None = None
        self._drawn: tuple[int, Tensor] | None = None

    # What a method says -------------------------------------------------------------------------------------------

    def sample(self, weight: Tensor | None) -> Tensor:
        """Return the training gates, of `shape` (or finer, of the weight's own), differentiable."""
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

    def budget_loss(
        self, masks: Sequence[LearnedMask], weights: Sequence[Tensor | None], ratio: float, usage: Usage
    ) -> Tensor | None:
        """Return a self-steering method's own loss over all masks that share one budget; asked of the first of them.

        Args:
            masks: The masks.
            weights: The weights that they read.
            ratio: The fraction to remove.
            usage: What gates of these masks leave of the cost.
        """
        return None

    def gates_of_samples(self, features: Callable[[], Tensor], layer: nn.Module) -> Tensor:
        """Return the gates of the samples that are in the network now, (samples, units), if `per_sample`.

        They are computed once in a forward, by whoever asks first, and shared by all that ask later.

        Args:
            features: Computes what the unit reads, averaged over positions, (samples, features).
            layer: Who asks.
        """
        raise NotImplementedError

    def share(self, first: LearnedMask) -> None:
        """Take over what all masks of one network have in common from the first of them."""

    @property
    def fan_factor(self) -> float:
        """What a layer's fan is multiplied by when its weights are drawn."""
        return 1.0

    def last_votes(self) -> tuple[Tensor, Tensor] | None:
        """Return the hard gates and their σ of the samples that came last, (samples, units), if they were asked."""
        return None

    def set_consensus(self, votes: Tensor, confidence: Tensor) -> None:
        """Take over what the samples of some data vote for on average.

        Args:
            votes: Each gate's mean over the samples, (units,).
            confidence: The mean of its σ, (units,).
        """
        raise NotImplementedError

    def read(self, features: int) -> None:
        """Say how many features `gates_of_samples` will be given; without it, one for every gate."""
        raise NotImplementedError

    @property
    def follows_samples(self) -> bool:
        """Whether each sample's own gates act now."""
        return self.per_sample and (self.evaluated_per_sample or (self.training and self.phase is Phase.LEARNING))

    @property
    def phase(self) -> Phase:
        """What the gates do at present.

        It lives in a buffer, so that state dicts and moving averages of a model carry it. The buffer is read only when
        it may have changed: on a GPU every look is a wait.
        """
        now = id(self.stage), self.stage._version
        if self._read_stage is None or self._read_stage[:2] != now:
            self._read_stage = (*now, _PHASES[int(self.stage)])
        return self._read_stage[2]

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self.stage.fill_(_PHASES.index(phase))

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
        if self.granularity is None or gates.shape == weight.shape:
            return gates
        return self.granularity.spread(gates, weight.shape)

    def fix(self, hard: Tensor, weight: Tensor | None = None) -> None:
        """Decide the gates: from now on they are what is given.

        Args:
            hard: The gates, 0 or 1.
            weight: The weight parameter, for methods whose gates did more to it than open and close; changed in place.
        """
        self.hard.copy_(hard.reshape(self.shape).to(self.hard.device) != 0)
        self.phase = Phase.FIXED
        self.forget_sample()

    def forget_sample(self) -> None:
        """Drop the sample of the last forward, and the graph that hangs on it."""
        self._drawn = None

    def _read(self, weight: Tensor | None) -> Tensor:
        """Return the weight that the gates are functions of, in float32 or float64."""
        if weight is None:
            raise TargetError(f"the gates of a {type(self).__name__} are functions of a weight; none was given")
        return at_least_float32(weight)

    def _mean(self, values: Tensor) -> Tensor:
        """Return the mean over each unit of values of the weight's shape."""
        if self.granularity is None:
            return values
        return self.granularity.reduce(values) / self.granularity.unit_size(values.shape)

    def __getstate__(self) -> dict[str, object]:
        # A sample is a non-leaf tensor, which torch refuses to copy; it belongs to one forward of one model anyway.
        return {**self.__dict__, "_drawn": None, "_read_stage": None}
