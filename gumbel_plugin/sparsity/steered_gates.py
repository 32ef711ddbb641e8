"""The gates that budgets steer: which of them a threshold leaves open, and what each is worth at its price."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gumbel_plugin.sparsity.budget import Budget, BudgetTerm
from gumbel_plugin.sparsity.cost_budget import CostBudget

_BISECTIONS = 24
"""Halvings of the range of the latents: what is left of it is 1e-7 of what it was."""
_TRIED = 31
"""Thresholds of channels that are tried at once: three rounds find one among 32,000."""
_CHEAPEST = 1e-3
"""No unit counts as cheaper than this fraction of the mean one: what costs nothing has no price."""
_APART = 1e-2
_CLEAR = 3.0  # σ(3) is 0.95
_EDGE = 1e-5  # far enough from 0 for a sigmoid in float32
_TINY = torch.finfo(torch.float32).tiny


class SteeredGates:
    """The latents of budgets that are steered, in one vector.

    A gate is open where its latent is at least its budget's threshold; then the limits and multiples of its term hold:
    the highest of a term stay, the lowest go. All of it is tensor arithmetic without a look at a value, so that a GPU
    does not wait.

    Attributes:
        budgets: The budgets.
        terms: Their masks, in the order of the vector.
        sizes: How many gates each of them has.
    """

    def __init__(self, budgets: Sequence[Budget]) -> None:
        """Note what the gates cost and what limits them; their latents are read anew in every step.

        Args:
            budgets: Budgets with a ratio, all of whose masks have latents.
        """
        self.budgets = list(budgets)
        self.terms = [term for budget in budgets for term in budget.terms]
        self.sizes = [term.units for term in self.terms]
        owners = [number for number, budget in enumerate(budgets) for _ in budget.terms]
        self._budget_of = torch.tensor(owners)
        ranges = [term.prunable_range() for term in self.terms]
        self._most = torch.tensor([size - least for size, (least, _) in zip(self.sizes, ranges, strict=True)])
        self._fewest = torch.tensor([size - most for size, (_, most) in zip(self.sizes, ranges, strict=True)])
        shares = [term.cost / budget.total for budget in budgets for term in budget.terms]
        self._shares = torch.tensor(shares, dtype=torch.float32)
        constants = [budget.constant / budget.total for budget in budgets]
        self._constants = torch.tensor(constants, dtype=torch.float32)

    # The masks' tensors -------------------------------------------------------------------------------------------

    def parameters(self) -> list[Any]:
        """Return the parameters that hold the latents, each once."""
        return list({id(own): own for term in self.terms for own in [_parameter(term)]}.values())

    def latents(self) -> Tensor:
        """Return all latents, shape (gates,): a gate is open by itself from 0 on."""
        return torch.cat([_scores(term) for term in self.terms])

    def without_ties(self) -> Tensor:
        """Return the latents, equal ones moved apart by next to nothing: no threshold parts them. The order stays."""
        latents = self.latents()
        mask: Any = self.terms[0].mask
        random = torch.rand(latents.shape, generator=torch.Generator().manual_seed(mask.noise.seed))
        values, places, counts = torch.unique(latents, return_inverse=True, return_counts=True)
        gaps = torch.diff(values, append=values.new_full((1,), float("inf"))).clamp_max(_APART)
        moved: Tensor = latents + (gaps * (counts > 1))[places] * random.to(latents.device)
        return moved

    @torch.no_grad()
    def write(self, latents: Tensor) -> None:
        """Put latents, as `latents` returns them, into their parameters."""
        for term, values in zip(self.terms, torch.split(latents, self.sizes), strict=True):
            own = _slice(term, _parameter(term))
            constant = own - term.mask.scores(term.weight)  # exactly 0 where the scores are the latents themselves
            own.copy_(values.view_as(own) + constant)

    def gradients(self) -> Tensor | None:
        """Return the gradients of all latents, shape (gates,), 0 where a layer has none; None if no layer has any."""
        gradients = [(term, _parameter(term).grad, term.units) for term in self.terms]
        if all(gradient is None for _, gradient, _ in gradients):
            return None
        device = self.parameters()[0].device
        parts = [
            torch.zeros(units, device=device) if gradient is None else _slice(term, gradient).float().flatten()
            for term, gradient, units in gradients
        ]
        return torch.cat(parts)

    def write_gradients(self, gradients: Tensor) -> None:
        """Put gradients, as `gradients` returns them, in the place of those of the latents; who has none gets none."""
        for term, values in zip(self.terms, torch.split(gradients, self.sizes), strict=True):
            gradient = _parameter(term).grad
            if gradient is not None:
                own = _slice(term, gradient)
                own.copy_(values.view_as(own))

    # Steering -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_budget(self, latents: Tensor, targets: Tensor, noise: float = 0.0) -> Tensor:
        """Return the latents, shifted by one number a budget, so that what is open costs what it may.

        Among the thresholds whose open gates cost at most the target, each budget gets the lowest one. Gates that a
        limit keeps open, or closed, end up at their side of 0, well clear of the noise.

        Args:
            latents: Shape (gates,).
            targets: The fraction of the dense cost that may stay, shape (budgets,).
            noise: The scale of the noise that the gates are sampled with.
        """
        self._to(latents.device)
        threshold, kept = self._threshold(latents, targets * (1 + 1e-6))
        threshold = torch.where(targets >= 1, latents.min() - _CLEAR, threshold)  # nothing has to go yet
        clear = max(_EDGE, _CLEAR * noise)
        shifted = latents - self._spread(threshold[self._budget_of])
        forced = kept & (shifted < -_EDGE) | ~kept & (shifted > _EDGE)
        apart = torch.where(forced, clear, _EDGE)  # rounding must not carry what stays across 0
        return torch.where(kept, shifted.maximum(apart), shifted.minimum(-apart))

    @torch.no_grad()
    def priced(self, gradients: Tensor, latents: Tensor) -> Tensor:
        """Return gradients of the latents in benefit per cost, less each budget's price, on one common scale.

        The gradient of the task's loss is projected onto the latents' surface of equal cost: with g the gradient, c
        what a unit costs as the network is now and s = σ'(latent), a gate moves along g/c − λ·s, λ = Σ s·g / Σ s²·c.
        What a budget keeps is decided by benefit per cost, whatever the units are. The root mean square of the result
        is 1: the size of the task's loss cancels out.

        Args:
            gradients: Of the task's loss, shape (gates,).
            latents: Shape (gates,).
        """
        self._to(latents.device)
        costs = self._unit_costs(latents)
        slopes = torch.sigmoid(latents) * torch.sigmoid(-latents)
        benefits, prices = self._sums(slopes * gradients), self._sums(slopes * slopes * costs)
        price = (benefits / prices.clamp_min(_TINY))[self._budget_of]
        priced = gradients / costs - slopes * self._spread(price)
        return priced / root_mean_square(priced)

    def _unit_costs(self, latents: Tensor) -> Tensor:
        """Return what one more unit costs as the network is now, in means of all units."""
        costs = self._spread(self._shares)
        return (costs / costs.mean()).clamp_min(_CHEAPEST)

    # Elements: terms are few and long, each by itself -------------------------------------------------------------

    def _threshold(self, latents: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return each budget's lowest threshold whose open gates cost at most its target, and what it keeps open."""
        bounds = self._bounds(latents)
        low, high = latents.min().expand(len(targets)) - 1, latents.max().expand(len(targets)) + 1
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            counts = torch.stack([part.sum() for part in self._kept(latents, bounds, middle)])
            fits = self._usage(counts) <= targets
            low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
        return high, torch.cat(self._kept(latents, bounds, high))

    def _bounds(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return the thresholds between which each term is within its limits, two of shape (terms,)."""
        low, high = [], []
        parts = torch.split(latents, self.sizes)
        for values, size, fewest, most in zip(
            parts, self.sizes, self._fewest.tolist(), self._most.tolist(), strict=True
        ):
            low.append(values.min() - 1 if most == size else values.kthvalue(size - most + 1).values)
            highest = values.max() if fewest <= 1 else values.kthvalue(size - fewest + 1).values
            high.append(highest if fewest else highest + 1)
        return torch.stack(low), torch.stack(high)

    def _kept(self, latents: Tensor, bounds: tuple[Tensor, Tensor], thresholds: Tensor) -> list[Tensor]:
        """Return which gates of each term are open, bool, within its limits."""
        own = thresholds[self._budget_of].maximum(bounds[0]).minimum(bounds[1])
        return [part >= edge for part, edge in zip(torch.split(latents, self.sizes), own, strict=True)]

    def _usage(self, counts: Tensor) -> Tensor:
        """Return the fraction of each budget's dense cost that is open, shape (budgets,), from open gates by term."""
        return self._constants.index_add(0, self._budget_of, counts * self._shares)

    def _spread(self, values: Tensor) -> Tensor:
        """Return one value a gate from one a term."""
        return torch.cat([value.expand(size) for value, size in zip(values, self.sizes, strict=True)])

    def _sums(self, values: Tensor) -> Tensor:
        """Return the sum over each budget's gates, shape (budgets,)."""
        parts = torch.stack([part.sum() for part in torch.split(values, self.sizes)])
        return torch.zeros_like(self._constants).index_add(0, self._budget_of, parts)

    def _to(self, device: torch.device) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.device != device:
                setattr(self, name, value.to(device))


class SteeredChannels(SteeredGates):
    """The same for gates of channel groups, which are many and short, and lie in one bank: a few operations for all."""

    def __init__(self, budgets: Sequence[Budget]) -> None:
        """Note the groups' gates too (see `SteeredGates`)."""
        super().__init__(budgets)
        self._costs = None
        if isinstance(budgets[0], CostBudget):  # it is over the whole network, and there is no other beside it
            self._costs = budgets[0].model.of_counts([term.name for term in self.terms])
        sizes = torch.tensor(self.sizes)
        self._starts = torch.arange(len(sizes)) * (
            int(sizes.sum()) + 1
        )  # parts the ranks of terms in one sorted vector
        self._term_of = torch.arange(len(sizes)).repeat_interleave(sizes)
        self._owner = self._budget_of[self._term_of]
        self._last = sizes.cumsum(0)
        self._multiple = torch.tensor([term.multiple for term in self.terms])
        self._total = budgets[0].total
        spans: list[Any] = [term.mask for term in self.terms]
        self._places = torch.cat([torch.arange(span.start, span.stop) for span in spans])

    @property
    def _bank(self) -> Any:
        mask: Any = self.terms[0].mask
        return mask.bank

    def latents(self) -> Tensor:
        """Return all latents (see `SteeredGates`)."""
        scores: Tensor = self._bank.scores(None).detach().float()
        self._to(scores.device)
        return scores[self._places]

    @torch.no_grad()
    def write(self, latents: Tensor) -> None:
        """Put latents into the bank."""
        own = self._bank.latents
        constant = (own - self._bank.scores(None))[self._places]
        own[self._places] = (latents + constant).to(own.dtype)

    def gradients(self) -> Tensor | None:
        """Return the gradients of all latents, or None."""
        gradient = self._bank.latents.grad
        return None if gradient is None else gradient.float()[self._places]

    def write_gradients(self, gradients: Tensor) -> None:
        """Put gradients in the place of those of the latents."""
        own = self._bank.latents.grad
        own[self._places] = gradients.to(own.dtype)

    def _unit_costs(self, latents: Tensor) -> Tensor:
        if self._costs is None:
            return super()._unit_costs(latents)
        counts = torch.zeros(len(self.terms), device=latents.device).index_add(0, self._term_of, (latents >= 0).float())
        with torch.enable_grad():
            (costs,) = torch.autograd.grad(self._costs(counts.requires_grad_()), counts)
        relative: Tensor = self._spread(costs)
        return (relative / relative.mean()).clamp_min(_CHEAPEST)

    def _threshold(self, latents: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Find the threshold as a rank among all gates: how many of a term are above it is one search a term."""
        order = torch.argsort(latents, stable=True)
        own = self._spread(self._starts)
        own[order] += torch.arange(len(order), device=order.device)
        keys = torch.sort(own).values  # ascending ranks, term by term
        rank = self._lowest_rank(keys, targets)
        above = self._spread(self._last) - torch.searchsorted(keys, own)
        kept = above <= self._spread(self._counts(keys, rank))
        ends = torch.cat([latents[order[:1]] - 2, latents[order], latents[order[-1:]] + 2])
        return (ends[rank] + ends[rank + 1]) / 2, kept

    def _lowest_rank(self, keys: Tensor, targets: Tensor) -> Tensor:
        """Return each budget's lowest rank from which on its gates cost at most the target; many are tried at once."""
        count = len(keys)
        parts = torch.arange(1, _TRIED + 1, device=keys.device)[:, None]
        low, high = torch.zeros_like(targets, dtype=torch.int64), torch.full_like(targets, count, dtype=torch.int64)
        for _ in range(math.ceil(math.log(count + 1, _TRIED + 1))):
            tried = low + (high - low) * parts // (_TRIED + 1)
            too_dear = (self._usage(self._counts(keys, tried)) > targets).sum(0, keepdim=True)
            ends = torch.cat([low[None] - 1, tried, high[None]])
            low, high = (ends.gather(0, too_dear) + 1)[0], ends.gather(0, too_dear + 1)[0]
        return high

    def _counts(self, keys: Tensor, ranks: Tensor) -> Tensor:
        """Return how many gates of each term stay, within its limits, if those from a budget's rank on do.

        Args:
            keys: The ranks of all gates, each raised by its term's start, in ascending order.
            ranks: Shape (..., budgets).

        Returns:
            Shape (..., terms).
        """
        counts = self._last - torch.searchsorted(keys, self._starts + ranks[..., self._budget_of])
        return (counts - counts % self._multiple).clamp(self._fewest, self._most)

    def _usage(self, counts: Tensor) -> Tensor:
        if self._costs is not None:
            return (self._costs(counts.float()) / self._total)[..., None]
        shares = counts * self._shares
        return self._constants + shares.new_zeros(*counts.shape[:-1], len(self.budgets)).index_add(
            -1, self._budget_of, shares
        )

    def _spread(self, values: Tensor) -> Tensor:
        return values[self._term_of]

    def _sums(self, values: Tensor) -> Tensor:
        return torch.zeros_like(self._constants).index_add(0, self._owner, values)


def steered_gates(budgets: Sequence[Budget]) -> list[SteeredGates]:
    """Return the gates of budgets: those of channels at once, and those of single weights and blocks at once."""
    channels = [b for b in budgets if all(hasattr(term.mask, "bank") for term in b.terms)]
    others = [budget for budget in budgets if budget not in channels]
    kinds = ((SteeredChannels, channels), (SteeredGates, others))
    return [kind(own) for kind, own in kinds if own]


def root_mean_square(values: Tensor) -> Tensor:
    """Return √(mean of squares), at least the smallest number that one can divide by."""
    return values.square().mean().sqrt().clamp_min(_TINY)


def _scores(term: BudgetTerm) -> Tensor:
    return term.mask.scores(term.weight).detach().float().flatten()


def _parameter(term: BudgetTerm) -> Any:
    mask: Any = term.mask
    return getattr(mask, "bank", mask).latents


def _slice(term: BudgetTerm, values: Tensor) -> Tensor:
    mask: Any = term.mask
    part: Tensor = values[mask.start : mask.stop] if hasattr(mask, "bank") else values
    return part
