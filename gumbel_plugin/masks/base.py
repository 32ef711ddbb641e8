"""The base of every mask method: one set of gates, and what a method must say about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, distributed, nn
from typing_extensions import Self, override

from gumbel_plugin.config_values import Section
from gumbel_plugin.errors import ConfigError, nearest, shown
from gumbel_plugin.masks.functional import at_least_float32, straight_through, uniform_noise
from gumbel_plugin.sparsity.types import CHANNEL, SparsityType

WeightMode = Literal["frozen", "trained"]
"""Whether the weights stay at their initial values (subnetwork extraction) or are trained with the gates."""

OptimizerSettings: TypeAlias = Mapping[str, str | float] | None


class Phase(Enum):
    """What the gates do at present: not yet used, being learned, or decided."""

    OPEN = "open"
    LEARNING = "learning"
    FIXED = "fixed"


_PHASES = tuple(Phase)
_LEAST_NOISE = 1e-2
"""Where there is less noise than this, probabilities are as steep as with this much."""


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
        counter, stream = self.forward + (self._rank() << 48), stream + (draw << 32)
        shape, device, dtype = logit.shape, logit.device, logit.dtype
        return uniform_noise(
            shape, seed=self.seed, counter=counter, stream=stream, device=device, dtype=dtype, bits=bits
        )

    def _rank(self) -> int:
        if not (self.per_rank and self.forward and distributed.is_available() and distributed.is_initialized()):
            return 0
        return distributed.get_rank()


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
    """A set of gates that are learned together: the units of one tensor, or of channel groups.

    A method is a subclass with the name that configurations have for it, ``class CoinMask(LearnedMask, name="coin")``,
    which overrides `sample`, and `scores` and `probability` where they are not the logit and its sigmoid. It finds its
    latents as `self.logit`, one a gate, unless it overrides `create_latents`; where it has something to schedule or to
    penalize, it overrides `advance` and `penalty`.
    Gates that are functions of the weights derive from `WeightDependent`, those of samples from `PerSample`. A method
    that drives its gates to the budget by a loss of its own has a `budget_loss` (see `HasBudgetLoss`).

    Attributes:
        method_name: What configurations call the method.
        Options: What its options are.
        manages_own_sparsity: Whether the method has a way of its own to its `sparse_ratio`, which it then needs: no
            budget loss drives its gates.
        shares_budget: Whether several masks can be ranked together under one ratio.
        needs_trained_weights: Whether nothing worth learning is left if the weights are frozen.
        published_optimizer: The settings of the gates' optimizer that the method was published with; None leaves them
            to the configuration.
        shape: The gates' shape.
        options: Its options.
        noise: Where its random numbers come from.
        stream: The mask's number, by which its random numbers differ from those of the others.
        sparsity_type: How the gates spread over the weight; by default each is a channel's.
        phase: Whether the gates are open, learned or fixed.
        hard: The decided gates, bool, used when the phase is `FIXED`.
        sparsity: The fraction of these gates that their budget will close; set by the budget, and kept up to date.
        noise_scale: What the noise of the samples is multiplied by; a budget lets it fall to 0 while the gates learn.
        is_probed: Whether open gates have gradients in training: those of the latents are ∂L/∂gate then.
    """

    method_name: ClassVar[str]
    Options: ClassVar[type[MaskOptions]] = LogitOptions
    manages_own_sparsity: ClassVar[bool] = False
    shares_budget: ClassVar[bool] = True
    needs_trained_weights: ClassVar[bool] = False
    published_optimizer: ClassVar[OptimizerSettings] = None
    hard: Tensor
    stage: Tensor

    def __init_subclass__(cls, name: str | None = None) -> None:
        super().__init_subclass__()
        cls.method_name = name or cls.__name__
        if name is None:
            return
        if METHODS.get(name, cls).__qualname__ != cls.__qualname__:  # a notebook's cell may be run twice
            raise ConfigError(f"the mask method {name!r} exists already: {METHODS[name].__qualname__}")
        METHODS[name] = cls

    def __init__(
        self,
        shape: Sequence[int],
        options: MaskOptions,
        noise: NoiseSource,
        stream: int,
        sparsity_type: SparsityType | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.options: Any = options  # of the method's own type
        self.noise = noise
        self.stream = stream
        self.sparsity_type = sparsity_type or CHANNEL
        self.sparsity: float | None = None
        self.noise_scale = 1.0
        self.is_probed = False
        self.register_buffer("hard", torch.ones(self.shape, dtype=torch.bool))
        self.register_buffer("stage", torch.zeros((), dtype=torch.uint8))
        self._read_stage: tuple[int, int, Phase] | None = None
        self._drawn: tuple[int, Tensor] | None = None
        self.check_units()
        self.create_latents()
        self.advance(0.0)

    # What a method says -------------------------------------------------------------------------------------------

    def sample(self, weight: Tensor | None) -> Tensor:
        """Return the training gates, of `shape` (or finer, of the weight's own), differentiable."""
        raise NotImplementedError

    def scores(self, weight: Tensor | None) -> Tensor:
        """Return the gates' importance, of `shape`: the highest are kept. A gate is open by itself if it is >= 0."""
        return self.logit

    def probability(self, weight: Tensor | None) -> Tensor:
        """Return the differentiable expectation of each gate, of `shape`, in [0, 1]."""
        return torch.sigmoid(at_least_float32(self.scores(weight)) / max(self.noise_scale, _LEAST_NOISE))

    # What it may say too ------------------------------------------------------------------------------------------

    def check_units(self) -> None:
        """Refuse gates of a shape or sparsity type that the method does not have."""

    def create_latents(self) -> None:
        """Register the parameters and buffers of the method: here one latent logit a gate, `logit`."""
        self.logit = nn.Parameter(torch.full(self.shape, self.options.initial_logit or 0.0))

    def advance(self, progress: float) -> None:
        """Move the method's own schedules to a progress in [0, 1] of the mask learning."""

    def penalty(self, weight: Tensor | None) -> Tensor | None:
        """Return the method's own extra loss, if it has one."""
        return None

    def share(self, first: LearnedMask) -> None:
        """Take over what all masks of one network have in common from the first of them."""

    @property
    def latents(self) -> Tensor | None:
        """The parameter that `scores` are, up to a constant; a budget shifts it. None where the scores are others."""
        latents: Tensor | None = getattr(self, "logit", None)
        return latents

    @property
    def fan_factor(self) -> float:
        """What a layer's fan is multiplied by when its weights are drawn."""
        return 1.0

    # What the session uses ----------------------------------------------------------------------------------------

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

    def decide(self, weight: Tensor | None) -> Tensor:
        """Return the gates that are open without any budget, bool, of `shape`."""
        return self.scores(weight).detach() >= 0

    def gates(self, weight: Tensor | None = None) -> Tensor:
        """Return the gates as they act now: ones, a sample (the same throughout one forward), or the hard gates."""
        if self.phase is Phase.OPEN:
            ones = torch.ones(self.shape, device=self.hard.device)
            latents = self.latents if self.is_probed and self.training else None
            return ones if latents is None else straight_through(ones, at_least_float32(latents))
        if self.phase is Phase.FIXED:
            return self.hard.float()
        if not self.training:
            return self.decide(weight).float()
        if self.sparsity_type != CHANNEL:
            return self.sample(weight)  # one layer uses it once in a forward; drawn again, it is the same
        if self._drawn is None or self._drawn[0] != self.noise.forward:
            self._drawn = (self.noise.forward, self.sample(weight))
        return self._drawn[1]

    def mask_weight(self, weight: Tensor) -> Tensor:
        """Return the weight times its gates; not for channels', which have no weight of their own."""
        if self.phase is Phase.OPEN:
            return weight
        return weight * self.spread(self.gates(weight), weight).to(weight.dtype)

    def spread(self, gates: Tensor, weight: Tensor) -> Tensor:
        """Spread gates of this mask so that they multiply the weight."""
        return gates if gates.shape == weight.shape else self.sparsity_type.expand(gates, weight.shape)

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

    # What methods use ---------------------------------------------------------------------------------------------

    def uniform_like(self, tensor: Tensor) -> Tensor:
        """Draw this forward's uniform numbers in (0, 1), of a tensor's shape, dtype and device."""
        return self.noise.uniform_like(tensor, self.stream)

    def initial_uniform(self, *shape: int) -> Tensor:
        """Draw uniform numbers in (0, 1) to start from, fine enough that few are equal in a large layer."""
        return self.noise.uniform_like(torch.empty(shape), self.stream, bits=32)

    def __getstate__(self) -> dict[str, object]:
        # A sample is a non-leaf tensor, which torch refuses to copy; it belongs to one forward of one model anyway.
        return {**self.__dict__, "_drawn": None, "_read_stage": None}


METHODS: dict[str, type[LearnedMask]] = {}
"""Every mask method by its name."""


def method_named(name: str) -> type[LearnedMask]:
    """Return the mask class of a method.

    Raises:
        ConfigError: If there is no method of that name.
    """
    if name not in METHODS:
        raise ConfigError(f"pruning.method {shown(name)} is unknown{nearest(name, METHODS)}")
    return METHODS[name]
