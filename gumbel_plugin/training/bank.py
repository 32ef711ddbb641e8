"""The gate bank: all channel gates of a network in one mask, of which every group has a slice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.masks import LearnedMask
from gumbel_plugin.sparsity.types import CHANNEL

BANK = "/bank"
"""What the bank's mask is called among the masks that hang on layers; no module has such a name."""


class GateBank:
    """One mask with the gates of all channel groups: one parameter, one draw, one threshold in a forward.

    Attributes:
        mask: The mask; its shape is (units of all groups,).
        slices: The gates of every group, by its name.
    """

    def __init__(self, mask: LearnedMask, slices: Mapping[str, GateSlice]) -> None:
        """Fill the slices, which were made before anybody knew how many gates there would be.

        Args:
            mask: The mask of all gates.
            slices: The groups' gates, in their order.
        """
        self.mask = mask
        self.slices = dict(slices)
        self._split: tuple[Tensor, tuple[Tensor, ...]] | None = None
        start = 0
        for number, part in enumerate(self.slices.values()):
            part.fill(self, number, start)
            start = part.stop

    def parts(self) -> tuple[Tensor, ...]:
        """Return the gates as they act now, group by group; in one forward the same tensors."""
        gates = self.mask.gates()
        if self._split is None or self._split[0] is not gates:
            # One node of the autograd graph for all groups: a slice for each would have one vector of zeros for each.
            self._split = gates, torch.split(gates, [part.shape[0] for part in self.slices.values()])
        return self._split[1]

    def forget_sample(self) -> None:
        """Drop the gates of the last forward, and the graph that hangs on them."""
        self._split = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_split": None}  # torch copies no tensor that was computed


class GateSlice:
    """One channel group's gates within the bank: what a `LearnedMask` of its own would be.

    Parameters and buffers of the bank's mask that have one entry for every gate are sliced, everything else is shared:
    the phase, the schedules, the noise.
    """

    sparsity_type = CHANNEL

    def __init__(self, size: int) -> None:
        self.shape = (size,)
        self.sparsity: float | None = None

    def fill(self, bank: GateBank, number: int, start: int) -> None:
        """Take the place of one group in a bank."""
        self._owner, self._number = bank, number
        self.start, self.stop = start, start + self.shape[0]

    @property
    def bank(self) -> LearnedMask:
        """The mask of all groups' gates."""
        return self._owner.mask

    @property
    def phase(self) -> Any:
        """What the gates of all groups do at present."""
        return self.bank.phase

    @phase.setter
    def phase(self, phase: Any) -> None:
        self.bank.phase = phase

    def gates(self, weight: Tensor | None = None) -> Tensor:
        """Return the group's gates as they act now."""
        return self._owner.parts()[self._number]

    def scores(self, weight: Tensor | None) -> Tensor:
        """Return the gates' importance."""
        return self.bank.scores(weight)[self.start : self.stop]

    def probability(self, weight: Tensor | None) -> Tensor:
        """Return the differentiable expectation of each gate."""
        return self.bank.probability(weight)[self.start : self.stop]

    def decide(self, weight: Tensor | None) -> Tensor:
        """Return the gates that are open without any budget, bool."""
        return self.bank.decide(weight)[self.start : self.stop]

    def fix(self, hard: Tensor, weight: Tensor | None = None) -> None:
        """Decide the group's gates; those of the other groups are fixed as they are."""
        whole = self.bank.hard.clone()
        whole[self.start : self.stop] = hard.reshape(self.shape).to(whole.device) != 0
        self.bank.fix(whole)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the whole bank."""
        return self.bank.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that a mask of the group's own would have."""
        return {name: self._sliced(tensor) for name, tensor in self.bank.state_dict().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict`, or that of a mask of the group's own, returned."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def _sliced(self, value: Any) -> Any:
        whole = isinstance(value, Tensor) and tuple(value.shape) == self.bank.shape
        return value[self.start : self.stop] if whole else value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "_owner" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._sliced(getattr(self.bank, name))


def joined_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's saved state for the bank's one parameter, where one was saved for every group (0.1.0).

    Args:
        optimizer: The optimizer that the state is for.
        state: What `state_dict` returned; left alone, and returned as it is where it fits already.
    """
    joined: dict[str, Any] = {"state": {}, "param_groups": []}
    number = 0
    for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        numbers = saved["params"]
        if len(own["params"]) == 1 < len(numbers):
            parts = [state["state"][each] for each in numbers if each in state["state"]]
            moments = (
                {key: torch.cat([part[key] for part in parts]) for key in parts[0] if parts[0][key].dim()}
                if parts
                else {}
            )
            joined["state"][number] = {**parts[0], **moments} if parts else {}
            numbers = numbers[:1]
        else:
            known = {number + place: state["state"].get(each) for place, each in enumerate(numbers)}
            joined["state"].update({place: own_state for place, own_state in known.items() if own_state is not None})
        joined["param_groups"].append({**saved, "params": list(range(number, number + len(numbers)))})
        number += len(numbers)
    return joined
