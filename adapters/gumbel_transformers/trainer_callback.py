"""Learned masks as a callback of the Hugging Face Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gumbel_plugin.config import ConfigLike
from gumbel_plugin.errors import ConfigError, DataError, LifecycleError, MissingExtraError
from gumbel_plugin.layers.weights import is_gate
from gumbel_plugin.shrinking.shrink import shrink
from gumbel_plugin.storage.mask_format import Masks
from gumbel_plugin.training.loop import MaskingLoop, refuse_scaled_gradients
from gumbel_plugin.training.settling import settled

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError("transformers", "transformers") from error

STATE_FILE = "gumbel_pruning.pt"
"""What the callback adds to each of the Trainer's checkpoints."""


class GumbelPruningCallback(TrainerCallback):
    """Learns masks while a Trainer trains.

    Example::

        pruning = GumbelPruningCallback([{"op_names": ["bert.encoder.layer.0.attention.self"], "sparse_ratio": 0.5}])
        Trainer(model, arguments, train_dataset=data, callbacks=[pruning]).train()
        small = pruning.shrink()

    Attributes:
        masks: NNI's masks format, once the training is over.
    """

    def __init__(self, config: ConfigLike, example_inputs: Any = None, resume_from: str | Path | None = None) -> None:
        """Note what to do.

        Args:
            config: What is pruned: a YAML path, a dict, an NNI config list or a `PruningConfig`; of its sections
                ``pruning`` and the seed are used.
            example_inputs: What to trace the model with, where channels or heads are to go; by default the model's
                ``dummy_inputs``.
            resume_from: The checkpoint that ``train(resume_from_checkpoint=...)`` gets; by default the one in the
                Trainer's output folder with the step that the Trainer goes on from.
        """
        self._config = config
        self._example_inputs = example_inputs
        self._resume_from = resume_from
        self._loop: MaskingLoop | None = None
        self._model: nn.Module | None = None
        self.masks: Masks | None = None

    def shrink(self, example_inputs: Any = None) -> nn.Module:
        """Return a new dense model without the closed channels and heads, verified equal to the trained one.

        Raises:
            LifecycleError: If nothing was trained yet.
            EquivalenceError: If the small model's outputs differ.
        """
        if self.masks is None or self._model is None:
            raise LifecycleError("there are no masks yet: train with this callback first")
        inputs = self._example_inputs if example_inputs is None else example_inputs
        return shrink(self._model.cpu(), self.masks, inputs)

    def detach(self) -> None:
        """Leave the plain model, its weights as they are, after a training that failed; then train again.

        Raises:
            LifecycleError: If no training has begun, or it ended well.
        """
        if self.masks is not None:
            raise LifecycleError("the training ended well: the model is a plain one already")
        self._running.session.detach()
        self._loop = None

    @property
    def settled(self) -> bool:
        """Whether the masks are fixed, or as sparse as they will be: only then a state could be the result.

        A metric that chooses the best checkpoint is best returned as its worst value until then.
        """
        return self.masks is not None or (self._loop is not None and settled(self._loop.session))

    # The Trainer's events -----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Attach the gates; go on from a checkpoint if the Trainer does."""
        if self._loop is not None:
            raise LifecycleError("this callback has trained once; a new one learns new masks")
        refuse_scaled_gradients("fp16" if args.fp16 else "", "TrainingArguments(fp16=True)")
        if self._example_inputs is None:
            self._example_inputs = getattr(model, "dummy_inputs", None)
        self._model = model
        loop = MaskingLoop(model, self._config, self._example_inputs)
        restored = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        own = self._read(args, state) if state.global_step > 0 else None
        loop.start(state.max_steps)
        self._loop = loop
        if own is not None:  # the weights are those of the checkpoint; `start` may have drawn new ones
            model.load_state_dict({name: t for name, t in restored.items() if not is_gate(name)}, strict=False)
            try:
                loop.load_state_dict(own)
            except Exception:
                self.detach()
                raise

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step the gates."""
        self._running.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the schedules."""
        self._running.after_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add where the masks stand to what is logged."""
        if logs is not None and self._loop is not None and self.masks is None:
            status = self._loop.session.status()
            for place in (logs, *state.log_history[-1:]):  # the Trainer has copied what it prints into its history
                place.update(sparsity=status.sparsity, soft_sparsity=status.soft_sparsity)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add gates, schedules and optimizers to the Trainer's checkpoint."""
        folder = self._folder(args, state)
        if state.is_world_process_zero and folder.is_dir() and self.masks is None:
            torch.save(self._running.state_dict(), folder / STATE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide the masks and leave the plain model, its closed weights at zero."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and not settled(self._running.session, _step_of(best)):
            warnings.warn(
                f"TrainingArguments(load_best_model_at_end=True) has loaded {best}, written when the masks were not "
                "decided yet: the model is denser than was learned. Pass load_best_model_at_end=False, with "
                "phases.fixed to train the model with its final masks; or choose later: let compute_metrics return "
                "the worst value until GumbelPruningCallback.settled",
                stacklevel=2,
            )
        self.masks = self._running.finish()

    def _read(self, args: Any, state: Any) -> dict[str, Any]:
        given = args.resume_from_checkpoint
        folder = Path(self._resume_from or (given if isinstance(given, str) else self._folder(args, state)))
        try:
            found: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise ConfigError(
                f"the Trainer goes on from step {state.global_step}, but {folder / STATE_FILE} is missing: pass the "
                "checkpoint's folder as resume_from="
            ) from error
        except Exception as error:
            raise DataError(f"{folder / STATE_FILE} cannot be read: {error}") from error
        return found

    @staticmethod
    def _folder(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"

    @property
    def _running(self) -> MaskingLoop:
        if self._loop is None:
            raise LifecycleError("the training has not begun")
        return self._loop


def _step_of(checkpoint: str) -> int:
    """Return the step of one of the Trainer's checkpoints, whose folders are named after it."""
    return int(Path(checkpoint).name.rpartition("-")[2])
