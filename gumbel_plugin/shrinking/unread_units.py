"""Which units no longer matter: nothing that reads them has a weight left for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gumbel_plugin.graph.channel_groups import ChannelGroup, ChannelSlice
from gumbel_plugin.graph.removal import removable_units
from gumbel_plugin.layers.geometry import output_dimension, read_channels
from gumbel_plugin.layers.weights import read_weight


def unread_units(modules: Mapping[str, nn.Module], group: ChannelGroup) -> Tensor:
    """Return the units of a group that no consumer reads, int64, ascending."""
    needed = torch.zeros(group.size, dtype=torch.bool)
    for part in group.consumers:
        read = read_channels(modules[part.module]).cpu()[part.positions]
        needed[part.units[read]] = True  # one of a unit's channels is enough, if it has several
    return torch.nonzero(~needed).flatten()


@torch.no_grad()
def find_dead_units(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """Find every unit that can go without changing the output, to the end of the chain.

    What a dead unit computes does not matter, so its producers' rows are set to zero; that may leave units before it
    unread, and so on until nothing changes. A group, and every layer of it, always keeps one unit.

    Args:
        model: The masked model; rows of dead units are zeroed in place, which does not change its output.
        groups: Its channel groups; only exact ones are considered.

    Returns:
        Unit numbers by group name, for the groups that lose any.
    """
    modules = dict(model.named_modules())
    exact = [group for group in groups if group.safety == "exact"]
    dead: dict[str, Tensor] = {}
    changed = True
    while changed:
        changed = False
        for group in exact:
            unread = unread_units(modules, group)
            units = removable_units(modules, group, unread)
            if len(units) > len(dead.get(group.name, ())):
                dead[group.name] = units
                changed = True
                for part in group.producers:  # of the one that stays too, if nobody reads it
                    _zero_rows(modules[part.module], part, unread)
    return dead


def _zero_rows(module: nn.Module, part: ChannelSlice, units: Tensor) -> None:
    weight, dimension = read_weight(module), output_dimension(module)
    if weight.dim() > 1 and dimension is not None:  # nothing before a normalization depends on its own parameters
        rows = part.positions[torch.isin(part.units, units)]
        weight.index_fill_(dimension, rows.to(weight.device), 0.0)
