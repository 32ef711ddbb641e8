"""The prior: where the latents of gates start, by the ranking of its units that a trained network has already."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.config import GatesConfig
from gumbel_plugin.errors import ConfigError, TargetError, shown
from gumbel_plugin.graph.channel_groups import ChannelGroup, ChannelSlice
from gumbel_plugin.layers.geometry import column_sums, output_dimension
from gumbel_plugin.layers.weights import read_tensor
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.sparsity.budget import Budget, BudgetTerm
from gumbel_plugin.sparsity.controller import BudgetController
from gumbel_plugin.sparsity.steered_gates import root_mean_square
from gumbel_plugin.training.plan import Plan
from gumbel_plugin.training.state_check import check_tensors, require_keys

_logger = logging.getLogger(__name__)

_LEAST = 1e-4
"""Where logarithms are ranked, this part of the root mean square of all scores is as good as 0: a dead unit's log is
far from all others, and would leave them next to no spread."""
_EQUAL = 1e-5
"""A standard deviation of less than this part of the largest value is rounding: there is no ranking."""
_TINY = torch.finfo(torch.float32).tiny


class Prior:
    """Sets the latents of all gates, when the mask learning begins, to ``strength`` times a standardized score.

    Scores that are products (magnitudes, Taylor's) are ranked by their logarithm, which spreads evenly what spans
    decades. Then each budget's have mean 0 and standard deviation 1; norms of groups have them within each group.
    """

    def __init__(self, model: nn.Module, plan: Plan, settings: GatesConfig, controller: BudgetController) -> None:
        """Take note of what is ranked; nothing is changed.

        Args:
            model: The plain model.
            plan: Its gates.
            settings: Which prior, and how strong.
            controller: What shifts the latents.

        Raises:
            ConfigError: If these gates cannot start from that prior.
        """
        self._settings, self._plan = settings, plan
        self._modules = dict(model.named_modules())
        self._gates = [] if settings.prior == "none" else controller.gates
        self._squares = {term.name: torch.zeros(term.units) for gates in self._gates for term in gates.terms}
        self._batches = 0
        if settings.prior != "none":
            self._check(controller.budgets)

    def _check(self, steered: Sequence[Budget]) -> None:
        prior = f"pruning.gates.prior {self._settings.prior!r}"
        for budget in self._plan.budgets:
            if budget not in steered:
                why = (
                    f"{budget.name!r} has no sparse_ratio that steers its gates; give it one"
                    if budget.ratio is None
                    else f"method {budget.method.method_name!r} has no latents that a budget steers; use 'none'"
                )
                raise ConfigError(f"{prior}: {why}")
        if self._settings.prior == "bn_scale":
            without = [term.name for gates in self._gates for term in gates.terms if not self._batch_norms(term)]
            if without:
                raise ConfigError(
                    f"{prior}: no batch norm scales the channels of {shown(without[0])}; use 'group_norm', 'magnitude' "
                    "or 'taylor'"
                )

    # While the gates are open -------------------------------------------------------------------------------------

    def follow(self, steps_left: int) -> None:
        """Do what the prior needs at this moment: watch the open gates, or set their latents before they are learned.

        Args:
            steps_left: Until the mask learning begins.
        """
        self._watch(steps_left)
        if steps_left <= 0 and self._plan.learned()[0].phase is Phase.OPEN:
            self._apply()

    def _watch(self, steps_left: int) -> None:
        """Let the open gates have gradients in the last steps before the mask learning, where a prior needs them."""
        needed = self._settings.prior == "taylor" and 0 < steps_left <= self._settings.warmup
        for mask in self._plan.learned():
            mask.is_probed = needed

    @torch.no_grad()
    def before_step(self) -> None:
        """Add the squares of the gates' gradients to those of former steps, and drop the gradients: nothing moves."""
        first = self._plan.learned()[0]
        if not (first.is_probed and first.phase is Phase.OPEN):
            return
        found = [(gates, gates.gradients()) for gates in self._gates]
        for gates, gradients in found:
            if gradients is None:  # the forward had no part of them
                continue
            squares = gradients.nan_to_num(0.0, 0.0, 0.0).square()
            for term, own in zip(gates.terms, torch.split(squares, gates.sizes), strict=True):
                self._squares[term.name] = self._squares[term.name].to(own.device) + own
            for parameter in gates.parameters():
                parameter.grad = None
        self._batches += any(gradients is not None for _, gradients in found)

    def state_dict(self) -> dict[str, Any]:
        """Return what a warm-up has found so far; nothing where there was none."""
        if not self._batches:
            return {}
        squares = {name: own.clone() for name, own in self._squares.items()}
        return {"prior": {"squares": squares, "batches": self._batches}}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse what a warm-up of these gates did not return.

        Raises:
            TargetError: If the state is of other gates or damaged.
        """
        if not (self._gates and isinstance(state, Mapping) and "prior" in state):
            return  # of a session without one, or before its first step
        found = require_keys(state["prior"], ("squares", "batches"), "prior")
        check_tensors(self._squares, found["squares"], "prior['squares']")
        if type(found["batches"]) is not int or found["batches"] < 1:
            raise TargetError(f"prior['batches'] is {shown(found['batches'])}; it must be a whole number of at least 1")

    def load_state_dict(self, state: Mapping[str, Any], steps_left: int) -> None:
        """Take over what `state_dict` returned.

        Args:
            state: A session's state, after `check_state`.
            steps_left: Until the mask learning begins.
        """
        found = state.get("prior", {}) if self._gates else {}
        self._batches = found.get("batches", 0)
        for name, own in self._squares.items():
            self._squares[name] = found["squares"][name].clone() if found else torch.zeros_like(own)
        self._watch(steps_left)

    # When they begin to act ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _apply(self) -> None:
        """Set the latents."""
        if not self._gates:
            return
        kind = _KINDS[self._settings.prior]
        for gates in self._gates:
            device = gates.parameters()[0].device
            scores = [[kind.score(self, term).to(device) for term in budget.terms] for budget in gates.budgets]
            latents = self._settings.strength * torch.cat([kind.standardized(of_budget) for of_budget in scores])
            gates.write(latents)
        if self._settings.prior == "taylor" and not self._batches:
            _logger.warning("gates.prior 'taylor' got no gradients: no optimizer that holds the gates made a step")
        else:
            _logger.info("gates start from prior %r, strength %g", self._settings.prior, self._settings.strength)

    # Scores of a term's units -------------------------------------------------------------------------------------

    def taylor(self, term: BudgetTerm) -> Tensor:
        """Return √Σ(∂L/∂g)² over the batches (Molchanov et al. 2019: what closing a gate changes, to first order)."""
        return self._squares[term.name].sqrt()

    def magnitude(self, term: BudgetTerm) -> Tensor:
        """Return the root mean square of the weights that compute a unit, |w| of a single one."""
        group = self._plan.groups.get(term.name)
        squares, count = self._own(term) if group is None else self._rows(group, matrices_only=True)
        if group is not None and not count.any():  # a packed projection computes it, which belongs to no layer
            squares, count = self._columns(group)
        return (squares / count.clamp_min(1)).sqrt()

    def group_norm(self, term: BudgetTerm) -> Tensor:
        """Return the norm of all weights that leave with a unit: rows, norms' scales, columns (Fang et al. 2023)."""
        group = self._plan.groups.get(term.name)
        return (self._own(term)[0] if group is None else self._rows(group)[0] + self._columns(group)[0]).sqrt()

    def bn_scale(self, term: BudgetTerm) -> Tensor:
        """Return |γ| of the batch norms that scale a unit, their mean where there are several (Liu et al. 2017)."""
        total, count = _empty(term.units)
        for part in self._batch_norms(term):
            scale = self._weight(part.module)
            assert scale is not None
            _add(total, count, part, scale.abs(), 1)
        return total / count.clamp_min(1)

    def _own(self, term: BudgetTerm) -> tuple[Tensor, Tensor]:
        """Return the squares summed over the weights that each gate of single layers closes, and how many these are."""
        weights = [gated.weight.float() for gated in self._plan.gated_layers.values() if gated.mask is term.mask]
        kind = term.mask.sparsity_type
        count = torch.tensor(float(sum(kind.unit_size(weight.shape) for weight in weights)))
        return torch.stack([kind.reduce(weight.square()).flatten() for weight in weights]).sum(0), count

    def _rows(self, group: ChannelGroup, *, matrices_only: bool = False) -> tuple[Tensor, Tensor]:
        """Return each unit's squares summed over the weights that compute it, and how many these are."""
        total, count = _empty(group.size)
        for part in group.producers:
            weight, dimension = self._weight(part.module), output_dimension(self._modules[part.module])
            if weight is None or dimension is None or (matrices_only and weight.dim() < 2):
                continue
            rows = weight.square().movedim(dimension, 0).reshape(weight.shape[dimension], -1)
            _add(total, count, part, rows.sum(1), rows.shape[1])
        return total, count

    def _columns(self, group: ChannelGroup) -> tuple[Tensor, Tensor]:
        """Return each unit's squares summed over the weights that read it, and how many these are."""
        total, count = _empty(group.size)
        for part in group.consumers:
            weight = self._weight(part.module)
            if weight is not None:
                columns = column_sums(self._modules[part.module], weight.square())
                _add(total, count, part, columns, weight.numel() // len(columns))
        return total, count

    def _batch_norms(self, term: BudgetTerm) -> list[ChannelSlice]:
        group = self._plan.groups.get(term.name)
        norms: Any = nn.modules.batchnorm._BatchNorm
        parts = () if group is None else group.producers
        return [p for p in parts if isinstance(self._modules[p.module], norms) and self._weight(p.module) is not None]

    def _weight(self, name: str) -> Tensor | None:
        """Return a layer's own weight, on the CPU in float32; None if it has none."""
        layer = self._modules[name]
        own = read_tensor(layer, "weight")
        weight = getattr(layer, "weight", None) if own is None else own  # what a parametrization computes
        return weight.detach().float().cpu() if isinstance(weight, Tensor) else None


@dataclass(frozen=True)
class _Kind:
    """How units are scored, and how scores become comparable.

    Attributes:
        score: Returns a term's scores.
        logarithm: Whether logarithms are standardized.
        by_term: Whether each term is standardized by itself. Norms over all weights of a group grow with the widths
            around it: between groups they compare widths, not units (DepGraph divides by the group's mean).
    """

    score: Callable[[Prior, BudgetTerm], Tensor]
    logarithm: bool = False
    by_term: bool = False

    def standardized(self, scores: Sequence[Tensor]) -> Tensor:
        """Return the scores of a budget's terms with mean 0 and standard deviation 1, in one vector."""
        if self.by_term:
            return torch.cat([_standardized(each) for each in scores])
        values = torch.cat(list(scores))
        if self.logarithm:
            values = values.clamp_min(_LEAST * float(root_mean_square(values))).log()
        return _standardized(values)


_KINDS = {
    "magnitude": _Kind(Prior.magnitude, logarithm=True),
    "group_norm": _Kind(Prior.group_norm, by_term=True),
    "bn_scale": _Kind(Prior.bn_scale),
    "taylor": _Kind(Prior.taylor, logarithm=True),
}


def _standardized(values: Tensor) -> Tensor:
    spread = values.std(correction=0).maximum(_EQUAL * values.abs().max()).clamp_min(_TINY)
    return (values - values.mean()) / spread


def _empty(units: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(units), torch.zeros(units)


def _add(total: Tensor, count: Tensor, part: ChannelSlice, values: Tensor, weights: int) -> None:
    """Add a layer's values, one a channel, each of so many weights, to those of the units, in place."""
    positions, units = part.positions.cpu(), part.units.cpu()
    total.index_add_(0, units, values[positions])
    count.index_add_(0, units, torch.full((len(units),), float(weights)))
