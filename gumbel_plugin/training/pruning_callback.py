"""What the callbacks of all trainers share, from the network to the small one; each adds its trainer's events."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from gumbel_plugin.config import ConfigLike
from gumbel_plugin.errors import ConfigError, LifecycleError
from gumbel_plugin.layers.example_inputs import checked_inputs, inputs_following
from gumbel_plugin.shrinking.shrink import shrink
from gumbel_plugin.storage.mask_format import Masks
from gumbel_plugin.training.distillation import DistillationLike
from gumbel_plugin.training.loop import MaskingLoop
from gumbel_plugin.training.session import MaskingSession


class PruningCallback:
    """A callback that learns masks while somebody else's trainer trains.

    Attributes:
        masks: NNI's masks format, once the training is over.
    """

    def __init__(self, config: ConfigLike, example_inputs: Any = None, distillation: DistillationLike = None) -> None:
        super().__init__()
        self._distillation = distillation
        self._config = config
        self._example_inputs = example_inputs
        self._loop: MaskingLoop | None = None
        self._network: nn.Module | None = None
        self.masks: Masks | None = None

    def shrink(self, example_inputs: Any = None) -> nn.Module:
        """Return a new dense network without the closed channels and heads, verified equal to the trained one.

        Args:
            example_inputs: What to trace with; by default what the callback was built with.

        Raises:
            LifecycleError: If nothing was trained yet.
            ConfigError: If there are no example inputs.
            EquivalenceError: If the small network's outputs differ.
        """
        if self.masks is None or self._network is None:
            raise LifecycleError("there are no masks yet: fit a Trainer with this callback first")
        inputs = self._example_inputs if example_inputs is None else example_inputs
        if inputs is None:
            raise ConfigError("shrink needs example_inputs: a tensor, a tuple of them, or a dict")
        return shrink(self._network.cpu(), self.masks, self._fitting(inputs))

    @property
    def settled(self) -> bool:
        """Whether the masks are fixed, or as sparse as they will be: only then a state could be the result.

        A metric that chooses a checkpoint is best given as its worst value until then.
        """
        return self.masks is not None or (self._loop is not None and self._loop.settled())

    def _begin(self, network: nn.Module, total_steps: int | None) -> MaskingLoop:
        """Attach the gates; the network's state dict is that of the plain masked one from here on."""
        if self._loop is not None:
            raise LifecycleError("this callback has trained once; a new one learns new masks")
        self._network = network
        inputs = None if self._example_inputs is None else self._fitting(checked_inputs(self._example_inputs))
        session = MaskingSession(network, self._config, example_inputs=inputs, distillation=self._distillation)
        loop = MaskingLoop(session)
        loop.start(total_steps)
        loop.keep_checkpoints_plain()
        self._loop = loop
        return loop

    def _fitting(self, example_inputs: Any) -> Any:
        """Give inputs that fitted a float32 network the device and the dtype that the trainer gave the network."""
        assert self._network is not None
        return inputs_following(self._network, example_inputs, torch.float32)

    def _warn_if_dense(self, steps: int, kept: str, instead: str) -> None:
        """Warn of a best checkpoint that was chosen before the masks were decided.

        Args:
            steps: After how many steps it was written.
            kept: What kept which checkpoint.
            instead: How to do without it.
        """
        if not self._running.settled(steps):
            warnings.warn(
                f"{kept}, written after step {steps}, when the masks were not decided yet: that network is denser than "
                f"was learned. {instead}, with phases.fixed to train it with its final masks; or choose later: give "
                f"the metric as its worst value until {type(self).__name__}.settled",
                stacklevel=3,
            )

    def _leave(self) -> None:
        """Take gates and hooks off a network whose masks were not decided."""
        if self._attached:
            self._running.detach()
            self._loop = None

    @property
    def _attached(self) -> bool:
        return self._loop is not None and self.masks is None

    @property
    def _running(self) -> MaskingLoop:
        if self._loop is None:
            raise LifecycleError("the training has not begun: pass this callback to the Trainer that fits")
        return self._loop
