"""Channel groups: channels of several layers that leave a network together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ChannelSlice:
    """The channels of one module that belong to a group.

    Attributes:
        module: The module's name.
        positions: Channel numbers in the module, shape (k,), int64.
        units: The group's unit that each of them belongs to, shape (k,), int64.
    """

    module: str
    positions: Tensor
    units: Tensor


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that leave a network together, because the graph ties them.

    Attributes:
        name: The module whose output channels define the group; "conv[8:16]" if other groups have the rest of them.
        size: How many units the group has; a unit is one channel, or several that must go together.
        producers: Modules that compute the channels (convolutions, linear layers, normalizations), by output channel.
        consumers: Layers that read them, by input channel. Gates act here: see design of exactness in docs.
        safety: ``exact`` if closing a unit at the consumers equals removing it, ``inexact`` if something between
            computes statistics over the channels, ``unsupported`` if the group cannot be cut (for instance because it
            reaches the network's output).
        reason: Why the group is not exact, empty if it is.
        unlisted_weights: Weights of one unit that no producer has, as in an attention layer's packed projections.
    """

    name: str
    size: int
    producers: tuple[ChannelSlice, ...]
    consumers: tuple[ChannelSlice, ...]
    safety: Literal["exact", "inexact", "unsupported"] = "exact"
    reason: str = ""
    unlisted_weights: int = 0

    @property
    def root(self) -> str:
        """The module whose output channels define the group: its name, or that of which it is a part ("conv[8:16]")."""
        known = {part.module for part in (*self.producers, *self.consumers)}
        return self.name if self.name in known else self.name.partition("[")[0]
