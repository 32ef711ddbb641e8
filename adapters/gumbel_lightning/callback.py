"""Learnt masks as a Lightning callback."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.config import ConfigLike
from gumbel_plugin.errors import ConfigError, LifecycleError, MissingExtraError
from gumbel_plugin.learning.guest import GuestSession, refuse_scaled_gradients
from gumbel_plugin.learning.nni_masks import Masks
from gumbel_plugin.shrinking.shrink import Backend, shrink


def _callback_classes() -> tuple[type, ...]:
    """Return the base class of callbacks in every Lightning that is installed; they are different classes."""
    found = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(importlib.import_module(package).Callback)
        except ImportError:
            continue
    if not found:
        raise MissingExtraError("lightning", "lightning")
    return tuple(found)


class GumbelPruning(*_callback_classes()):  # type: ignore[misc]
    """Learns masks while any Trainer trains any module; the module itself does not change.

    Example::

        pruning = GumbelPruning([{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], example_inputs=x)
        Trainer(max_epochs=10, callbacks=[pruning]).fit(module, loader)
        small = pruning.shrink()

    Gates and their optimizers live in the callback, and in the Trainer's checkpoints. Gates are taken out of the
    module's own optimizers, should it have put all its parameters there.

    Attributes:
        masks: NNI's masks format, once the training is over.
    """

    def __init__(self, config: ConfigLike, example_inputs: Any = None, attribute: str | None = None) -> None:
        """Note what to do.

        Args:
            config: What is pruned: a YAML path, a dict, an NNI config list or a `PruningConfig`; of its sections
                ``pruning`` and the seed are used.
            example_inputs: What to trace the network with, where whole channels are to go; by default the module's
                ``example_input_array``.
            attribute: The attribute of the module that holds the network; by default the module is the network.
        """
        super().__init__()
        self._config = config
        self._example_inputs = example_inputs
        self._attribute = attribute
        self._guest: GuestSession | None = None
        self._network: nn.Module | None = None
        self._stepping = False
        self.masks: Masks | None = None

    def shrink(self, example_inputs: Any = None, backend: Backend = "torch_pruning") -> nn.Module:
        """Return a new dense network without the closed channels, verified equal to the trained one.

        Args:
            example_inputs: What to trace with; by default what the callback was built with.
            backend: See `gumbel_plugin.shrink`.

        Raises:
            LifecycleError: If nothing was trained yet.
            EquivalenceError: If the small network's outputs differ.
        """
        if self.masks is None or self._network is None:
            raise LifecycleError("there are no masks yet: fit a Trainer with this callback first")
        inputs = self._example_inputs if example_inputs is None else example_inputs
        if inputs is None:
            raise ConfigError("shrink needs example_inputs: a tensor, a tuple of them, or a dict")
        return shrink(self._network.cpu(), self.masks, inputs, backend)

    # Lightning's hooks --------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach the gates, before Lightning wraps the module or restores a checkpoint into it."""
        if stage != "fit":
            return
        if self._guest is not None:
            raise LifecycleError("this callback has trained once; a new one learns new masks")
        refuse_scaled_gradients(str(trainer.precision), f"Trainer(precision={trainer.precision!r})")
        network = pl_module if self._attribute is None else getattr(pl_module, self._attribute, None)
        if not isinstance(network, nn.Module):
            raise ConfigError(f"attribute {self._attribute!r}: the module has no network of that name")
        if self._example_inputs is None:
            self._example_inputs = pl_module.example_input_array
        self._network = network
        guest = GuestSession(network, self._config, self._example_inputs)
        steps = trainer.estimated_stepping_batches
        guest.start(int(steps) if math.isfinite(steps) and steps > 0 else None)
        self._guest = guest

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the gates out of the module's optimizers."""
        for optimizer in trainer.optimizers:
            self._running.disown(optimizer)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Stop at a loss that is no number."""
        self._running.session.guard(loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Step the gates, once a batch."""
        if not self._stepping:
            self._stepping = True
            self._running.before_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Advance the schedules, unless gradients were only accumulated."""
        if self._stepping:
            self._stepping = False
            self._running.after_step()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log where the masks stand."""
        status = self._running.session.status()
        pl_module.log_dict({"sparsity": status.sparsity, "soft_sparsity": status.soft_sparsity})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Decide the masks and leave the plain module, its closed weights at zero."""
        self.masks = self._running.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return gates, schedules and optimizers, for Lightning's checkpoints."""
        return {} if self._guest is None else self._guest.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if state_dict and self._guest is not None:
            self._guest.load_state_dict(state_dict)

    @property
    def _running(self) -> GuestSession:
        if self._guest is None:
            raise LifecycleError("the callback was not set up: pass it to the Trainer that fits")
        return self._guest
