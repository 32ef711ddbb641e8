"""Gibbs pruning: masks sampled from a Gibbs distribution over the current weights, colder and colder."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from typing_extensions import Self, override

from gumbel_plugin.errors import ConfigError
from gumbel_plugin.masks.base import MaskOptions
from gumbel_plugin.masks.weight_dependent import WeightDependent
from gumbel_plugin.sparsity.ranking import cut_point, removed_count
from gumbel_plugin.sparsity.schedules import Schedule, as_schedule
from gumbel_plugin.sparsity.types import FULL, KERNEL, OUT_CHANNEL, Block, Unstructured

Hamiltonian = Literal["unstructured", "kernel", "filter"]

_COUPLING = {"unstructured": 0.0, "kernel": 0.01, "filter": 1.0}
_BETA = {
    "unstructured": Schedule(1.0, 1e4, "exponential"),
    "kernel": Schedule(1.0, 1e4, "exponential"),
    "filter": Schedule(10**-2.5, 1.0, "exponential"),
}


class GibbsOptions(MaskOptions):
    """Options of `GibbsMask`; what is None has the published value of the hamiltonian.

    Attributes:
        hamiltonian: ``unstructured``: weights are independent; ``kernel``: those of one kernel hold together;
            ``filter``: those of one filter do.
        beta: The inverse temperature, a number or a schedule over the annealing; it may not fall. None: from 1 to 1e4,
            for filters from 10^-2.5 to 1, exponentially.
        annealing: The part of the mask learning over which beta moves; then it is held (published: 128 of 200 epochs).
        coupling: How strongly the weights of a kernel or filter hold together. None: 0.01 and 1.
        sweeps: Sweeps of chromatic Gibbs sampling, for filters.
    """

    hamiltonian: Hamiltonian = "unstructured"
    beta: float | Schedule | None = None
    annealing: float = Field(default=0.64, gt=0, le=1)
    coupling: float | None = Field(default=None, ge=0)
    sweeps: int = Field(default=50, ge=1)

    @field_validator("beta")
    @classmethod
    def _grow_colder(cls, beta: float | Schedule | None) -> float | Schedule | None:
        schedule = as_schedule(1.0 if beta is None else beta)
        if schedule.start <= 0:
            raise ValueError(f"an inverse temperature is above 0, {schedule.start} is not")
        if schedule.end < schedule.start:
            raise ValueError(
                f"masks are annealed, so beta may not fall, as it does from {schedule.start} to {schedule.end}"
            )
        return beta

    @model_validator(mode="after")
    def _fit_the_hamiltonian(self) -> Self:
        default = type(self).model_fields["sweeps"].default
        given = "coupling" if self.coupling is not None else "sweeps" if self.sweeps != default else ""
        if self.hamiltonian == "unstructured" and given:
            raise ValueError(f"{given} is for hamiltonian 'kernel' or 'filter'; 'unstructured' couples nothing")
        return self


class GibbsMask(WeightDependent, name="gibbs"):
    """Gates x drawn from P(x) ∝ exp(−β·H(x, W)) at every forward; nothing but the weights is learned.

    Q is the quantile of a layer's W² below which the fraction sparse_ratio of it lies, found anew at every forward:

    * ``unstructured``: P(keep) = σ(β·(W² − Q)), independently. Granularity element.
    * ``kernel``: x ∈ {−1, 1} a weight, H = −c·Σ_{i≠j} x_i·x_j + Σ_i (Q − W_i²)·x_i in each kernel, Q the quantile of
      the kernels' mean W². Granularity kernel; of a linear layer every weight is a kernel.
    * ``filter``: coupled over whole filters, Q the quantile of the filters' mean W². Two colors, the halves of the
      input channels, are drawn in turn: P(x_i = 1) = σ(β·(c·Σ x − (Q − W_i²))), Σ over the other half of the filter.
      Granularity [1, -1, -1, -1], the filters of one layer alone; not for linear layers.

    Masks have an entry for every weight while they are learned; what is kept at the end is the part 1 − sparse_ratio
    of the units with the highest summed W². The gradient reaches W through W·mask only. A sample may exceed the budget:
    `probability`, and with it a session's ``soft_sparsity``, says what is really open.

    Source: Labach and Valaee, arXiv 2006.04981, and its code. As there, ``kernel`` has strict ±1 spins, whose odds go
    with 2β, and the other two have odds that go with β. Project choices: of the definitions of a quantile the one
    half-way between what goes and what stays; kernels of every size are sampled exactly, by the number of their open
    weights first, instead of by enumerating all masks.
    """

    Options: ClassVar[type[MaskOptions]] = GibbsOptions
    manages_own_sparsity: ClassVar[bool] = True
    shares_budget: ClassVar[bool] = False
    options: GibbsOptions

    @override
    def check_units(self) -> None:
        super().check_units()
        kind = self.options.hamiltonian
        if kind == "filter" and len(self.shape) < 3:
            raise ConfigError(
                f"options.hamiltonian 'filter' needs convolutions, got a layer with gates of shape {self.shape}; "
                "exclude linear layers, or use 'unstructured'"
            )
        one_filter = Block((1, *(FULL,) * (len(self.shape) - 1)))
        fits, word = {
            "unstructured": (isinstance(self.sparsity_type, Unstructured), "'element'"),
            "kernel": (self.sparsity_type == KERNEL, "'kernel'"),
            "filter": (self.sparsity_type in (OUT_CHANNEL, one_filter), str(list(one_filter.steps))),
        }[kind]
        if not fits:
            raise ConfigError(
                f"options.hamiltonian {kind!r} goes with granularity {word}; this one has gates of shape {self.shape}"
            )

    @property
    def coupling(self) -> float:
        """How strongly the weights of a unit hold together."""
        given = self.options.coupling
        return _COUPLING[self.options.hamiltonian] if given is None else given

    @override
    @torch.no_grad()
    def sample(self, weight: Tensor | None) -> Tensor:
        squares = self.read(weight).square()
        if removed_count(math.prod(self.shape), self.sparsity or 0.0) == 0:
            return torch.ones_like(squares)
        advantage = squares - self._cut_point(squares)  # W² − Q
        if self.options.hamiltonian == "kernel":
            return self._sample_kernels(advantage)
        if self.options.hamiltonian == "filter":
            return self._sample_filters(advantage)
        return (self.uniform_like(advantage) < torch.sigmoid(self.beta * advantage)).to(advantage.dtype)

    @override
    def scores(self, weight: Tensor | None) -> Tensor:
        return self.mean(self.read(weight).detach().square())

    @override
    def decide(self, weight: Tensor | None) -> Tensor:
        return self.sparsity_type.project(self.scores(weight), self.sparsity or 0.0)

    @override
    def probability(self, weight: Tensor | None) -> Tensor:
        """Return P(keep) of independent weights, else the fraction of each unit that this forward's sample opens."""
        if self.options.hamiltonian != "unstructured":
            return self.mean(self.sample(weight))
        squares = self.read(weight).square()
        return torch.sigmoid(self.beta * (squares - self._cut_point(squares)))

    @override
    def advance(self, progress: float) -> None:
        beta = _BETA[self.options.hamiltonian] if self.options.beta is None else self.options.beta
        self.beta = as_schedule(beta)(progress / self.options.annealing)

    def _cut_point(self, squares: Tensor) -> Tensor:
        return cut_point(self.mean(squares), self.sparsity or 0.0)

    def _sample_kernels(self, advantage: Tensor) -> Tensor:
        """Sample every kernel (the trailing dimensions) exactly.

        The coupling depends on how many weights are open, n of N, and on nothing else: it adds c·(2n − N)². With o_i =
        exp(2β·(W_i² − Q)), the odds of a weight alone, and e_n(o) the sum over all masks with n open weights of the
        product of their odds, P(n) ∝ exp(β·c·(2n − N)²)·e_n(o); then, from the last weight to the first, P(x_i = 1 | n)
        = o_i·e_{n−1}(o_1..o_{i−1}) / e_n(o_1..o_i). All come from e_n(..o_i) = e_n(..o_{i−1}) + o_i·e_{n−1}(..o_{i−1}).
        """
        log_odds = (2 * self.beta * advantage.double()).reshape(*self.shape[:2], -1)
        size = log_odds.shape[-1]
        of_none = log_odds.new_full((*self.shape[:2], size + 1), -math.inf)
        of_none[..., 0] = 0.0
        sums = [of_none]  # sums[i][..., n] = log e_n(o_1..o_i)
        for i in range(size):
            with_this = sums[i][..., :-1] + log_odds[..., i : i + 1]
            more = torch.logaddexp(sums[i][..., 1:], with_this)
            sums.append(torch.cat([sums[i][..., :1], more], -1))
        spins = 2 * torch.arange(size + 1, device=log_odds.device) - size
        cumulated = torch.softmax(sums[-1] + self.beta * self.coupling * spins.square(), -1).cumsum(-1)
        uniform = self.noise.uniform_like(cumulated[..., 0], self.stream, 1, bits=32)
        count = (uniform.unsqueeze(-1) > cumulated[..., :-1]).sum(-1, keepdim=True)
        gates = torch.empty_like(log_odds)
        noise = self.uniform_like(log_odds)
        for i in reversed(range(size)):
            open_before = sums[i].gather(-1, (count - 1).clamp_min(0))
            chance = (log_odds[..., i : i + 1] + open_before - sums[i + 1].gather(-1, count)).exp()
            is_open = (noise[..., i : i + 1] < chance) & (count > 0)
            gates[..., i : i + 1] = is_open
            count = count - is_open.long()
        return gates.view(advantage.shape).to(advantage.dtype)

    def _sample_filters(self, advantage: Tensor) -> Tensor:
        """Sample every filter (a slice of dimension 0) by sweeps over its two halves, the second half starting whole.

        A filter with a single input channel has an empty first half, and so no couplings.
        """
        middle = advantage.shape[1] // 2
        halves = slice(None, middle), slice(middle, None)
        rest = tuple(range(1, advantage.dim()))
        spins = torch.where(advantage.mean(rest, keepdim=True) > 0, 1.0, -1.0).to(advantage.dtype).expand_as(advantage)
        spins = spins.clone()
        field = spins[:, halves[1]].sum(rest, keepdim=True)
        for sweep in range(self.options.sweeps):
            noise = self.noise.uniform_like(advantage, self.stream, sweep)
            for half in halves:
                chance = torch.sigmoid(self.beta * (self.coupling * field + advantage[:, half]))
                spins[:, half] = 2.0 * (noise[:, half] < chance) - 1.0
                field = spins[:, half].sum(rest, keepdim=True)
        return (spins + 1) / 2
