"""Learned masks as a Lightning callback."""

from __future__ import annotations

import importlib
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.config import ConfigLike
from gumbel_plugin.errors import ConfigError, LifecycleError, MissingExtraError
from gumbel_plugin.layers.example_inputs import inputs_following
from gumbel_plugin.layers.weights import is_gate
from gumbel_plugin.shrinking.shrink import shrink
from gumbel_plugin.storage.mask_format import Masks
from gumbel_plugin.training.loop import MaskingLoop, refuse_scaled_gradients
from gumbel_plugin.training.settling import settled


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
        self._loop: MaskingLoop | None = None
        self._network: nn.Module | None = None
        self._hook: Any = None
        self._stepping = self._restored = False
        self._best_steps: dict[str, int] = {}  # by the path of a best checkpoint: how many steps it had seen
        self.masks: Masks | None = None

    def shrink(self, example_inputs: Any = None) -> nn.Module:
        """Return a new dense network without the closed channels, verified equal to the trained one.

        Args:
            example_inputs: What to trace with; by default what the callback was built with.

        Raises:
            LifecycleError: If nothing was trained yet.
            EquivalenceError: If the small network's outputs differ.
        """
        if self.masks is None or self._network is None:
            raise LifecycleError("there are no masks yet: fit a Trainer with this callback first")
        inputs = self._example_inputs if example_inputs is None else example_inputs
        if inputs is None:
            raise ConfigError("shrink needs example_inputs: a tensor, a tuple of them, or a dict")
        return shrink(self._network.cpu(), self.masks, _fitting(self._network, inputs))

    @property
    def settled(self) -> bool:
        """Whether the masks are fixed, or as sparse as they will be: only then a state could be the result.

        A metric that chooses a checkpoint is best logged as its worst value until then.
        """
        return self.masks is not None or (self._loop is not None and settled(self._loop.session))

    # Lightning's hooks --------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach the gates, before Lightning wraps the module or restores a checkpoint into it."""
        if stage != "fit":
            return
        if self.masks is not None:
            raise LifecycleError("this callback has trained once; a new one learns new masks")
        refuse_scaled_gradients(str(trainer.precision), f"Trainer(precision={trainer.precision!r})")
        self._refuse_averages(trainer)
        self._network = network = self._network_of(pl_module)
        if self._example_inputs is None:
            self._example_inputs = pl_module.example_input_array
        loop = MaskingLoop(network, self._config, _fitting(network, self._example_inputs))
        loop.start(None)
        self._loop, self._restored = loop, False
        self._hook = network.register_load_state_dict_pre_hook(_keep_gates)  # type: ignore[no-untyped-call]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the gates out of the module's optimizers; plan the phases, now that the module has its data."""
        for optimizer in trainer.optimizers:
            self._running.remove_from(optimizer)
        steps = trainer.estimated_stepping_batches
        if not self._restored and math.isfinite(steps) and steps > 0:
            self._running.session.expect(int(steps))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note best checkpoints that were written after the batch before; that callback comes after all others."""
        self._note_best(trainer)

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

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Decide the masks and leave the plain module, its closed weights at zero."""
        self._note_best(trainer)
        self.masks = self._running.finish()
        self._hook.remove()
        self._warn_of_dense_checkpoints(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the plain module as it is now; the callback may train again."""
        self._leave()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the plain module where a fit ends before its end, as that of a tuner does."""
        self._leave()

    # Checkpoints hold the plain network with its masks applied, for whoever loads them without this callback; what a
    # training needs to go on, the weights under the masks among it, is in the callback's state.

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint hold the plain network."""
        if self._attached:
            state, prefix = checkpoint["state_dict"], self._prefix
            for name in [name for name in state if is_gate(name)]:
                del state[name]
            state.update({prefix + name: tensor for name, tensor in self._running.plain_state().items()})

    def state_dict(self) -> dict[str, Any]:
        """Return gates, schedules, optimizers and masked weights, for Lightning's checkpoints."""
        if not self._attached:
            return {}
        assert self._network is not None
        plain, own = self._running.plain_state(), self._network.state_dict()
        under = {name: own[name] for name, tensor in plain.items() if not torch.equal(tensor, own[name])}
        return {**self._running.state_dict(), "weights": under, "best_steps": self._best_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        if state_dict and self._attached:
            assert self._network is not None
            self._network.load_state_dict({**self._network.state_dict(), **state_dict["weights"]})
            self._running.load_state_dict(state_dict)
            self._best_steps = dict(state_dict.get("best_steps", {}))
            self._restored = True

    # --------------------------------------------------------------------------------------------------------------

    def _network_of(self, pl_module: Any) -> nn.Module:
        if self._attribute is None:
            return pl_module  # type: ignore[no-any-return]
        if not isinstance(getattr(pl_module, self._attribute, None), nn.Module):
            pl_module.configure_model()  # Lightning calls it later, and demands that it may be called twice
        network = getattr(pl_module, self._attribute, None)
        if not isinstance(network, nn.Module):
            raise ConfigError(
                f"attribute {self._attribute!r}: the module has no network of that name; build it in __init__ or in "
                "configure_model"
            )
        return network

    def _refuse_averages(self, trainer: Any) -> None:
        """Refuse callbacks that average a copy of the network which lacks the gates, or the gates' decisions."""
        place = trainer.callbacks.index(self)
        for number, callback in enumerate(trainer.callbacks):
            name, kinds = type(callback).__name__, {kind.__name__ for kind in type(callback).__mro__}
            if not kinds & {"WeightAveraging", "StochasticWeightAveraging"}:
                continue
            if number < place:
                raise ConfigError(
                    f"callbacks: GumbelPruning goes before {name}, which copies the network with its gates"
                )
            if getattr(callback, "_use_buffers", False):
                raise ConfigError(f"{name}(use_buffers=True) averages the gates' decisions; pass use_buffers=False")

    def _note_best(self, trainer: Any) -> None:
        for saving in _monitoring(trainer):
            key = f"{saving.best_model_path} {saving.best_model_score}"  # a file of a fixed name is written again
            self._best_steps.setdefault(key, self._running.session.steps)

    def _warn_of_dense_checkpoints(self, trainer: Any) -> None:
        for saving in _monitoring(trainer):
            steps = self._best_steps[f"{saving.best_model_path} {saving.best_model_score}"]
            if not settled(self._running.session, steps):
                warnings.warn(
                    f"ModelCheckpoint(monitor={saving.monitor!r}) kept {saving.best_model_path}, written after step "
                    f"{steps}, when the masks were not decided yet: it holds a denser network than was learned. Take "
                    "the module as fit left it, with phases.fixed to train it with its final masks; or monitor later: "
                    "log the metric at its worst value until GumbelPruning.settled",
                    stacklevel=2,
                )

    def _leave(self) -> None:
        """Take gates and hooks off a network whose masks were not decided."""
        if self._attached:
            self._running.session.detach()
            self._hook.remove()
            self._loop, self._stepping, self._best_steps = None, False, {}

    @property
    def _prefix(self) -> str:
        return "" if self._attribute is None else f"{self._attribute}."

    @property
    def _attached(self) -> bool:
        return self._loop is not None and self.masks is None

    @property
    def _running(self) -> MaskingLoop:
        if self._loop is None:
            raise LifecycleError("the callback was not set up: pass it to the Trainer that fits")
        return self._loop


def _monitoring(trainer: Any) -> list[Any]:
    """Return the ModelCheckpoints that have kept a best checkpoint by a metric."""
    return [saving for saving in trainer.checkpoint_callbacks if saving.best_model_path and saving.monitor is not None]


def _fitting(network: nn.Module, example_inputs: Any) -> Any:
    """Give inputs that fitted a float32 network the dtype that the Trainer's precision gave the network."""
    return None if example_inputs is None else inputs_following(network, example_inputs, torch.float32)


def _keep_gates(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a plain state be loaded into a gated network: the gates stay as they are."""
    for name, tensor in module.state_dict().items():
        if is_gate(name):
            state_dict.setdefault(prefix + name, tensor)
