"""What a kind of attention layer has to know: which heads it has, and how some of them leave."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from gumbel_plugin.graph.channel_groups import ChannelGroup


class AttentionKind(ABC):
    """How one kind of attention layer stores its heads.

    Attributes:
        hidden: Whether nobody looks into a layer of this kind while a dependency graph is traced.
    """

    hidden = True

    @abstractmethod
    def matches(self, layer: nn.Module) -> bool:
        """Whether a module is an attention layer of this kind."""

    @abstractmethod
    def describe(self, name: str, model: nn.Module) -> ChannelGroup | None:
        """Return the heads of a layer as a group; None if nothing can be said about it."""

    @abstractmethod
    def remove(self, name: str, model: nn.Module, units: Tensor) -> None:
        """Remove heads of a layer, in place in the model.

        Args:
            name: The layer's name.
            model: The model.
            units: Numbers of the group's units, int64.
        """
