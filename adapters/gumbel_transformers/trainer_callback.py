"""Learned masks as a callback of the Hugging Face Trainer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from gumbel_plugin.config import ConfigLike
from gumbel_plugin.errors import ConfigError, LifecycleError, MissingExtraError
from gumbel_plugin.storage.files import write_bytes
from gumbel_plugin.storage.tensor_file import torch_content
from gumbel_plugin.training.distillation import DistillationLike
from gumbel_plugin.training.loop import refuse_scaled_gradients
from gumbel_plugin.training.pruning_callback import PruningCallback

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError("transformers", "transformers") from error

STATE_FILE = "gumbel_pruning.pt"
"""What the callback adds to each of the Trainer's checkpoints: what a training needs to go on."""


class GumbelPruningCallback(PruningCallback, TrainerCallback):
    """Learns masks while a Trainer trains.

    Example::

        pruning = GumbelPruningCallback([{"op_names": ["bert.encoder.layer.0.attention.self"], "sparse_ratio": 0.5}])
        Trainer(model, arguments, train_dataset=data, callbacks=[pruning]).train()
        small = pruning.shrink()

    The Trainer's checkpoints hold the plain masked model, which `from_pretrained` loads without this callback.

    Attributes:
        masks: NNI's masks format, once the training is over.
    """

    def __init__(
        self,
        config: ConfigLike,
        example_inputs: Any = None,
        resume_from: str | Path | None = None,
        distillation: DistillationLike = None,
    ) -> None:
        """Note what to do.

        Args:
            config: What is pruned: a YAML path, a dict, an NNI config list or a `PruningConfig`; of its sections
                ``pruning``, ``distillation`` and the seed are used.
            example_inputs: What to trace the model with, where channels or heads are to go, and to count
                multiply-accumulates with; by default the model's ``dummy_inputs``.
            resume_from: The checkpoint that ``train(resume_from_checkpoint=...)`` gets; by default the one in the
                Trainer's output folder with the step that the Trainer goes on from.
            distillation: What is learned from a teacher: settings, a teacher, or a `Distillation`; by default what the
                configuration says.
        """
        super().__init__(config, example_inputs, distillation)
        self._resume_from = resume_from

    def detach(self) -> None:
        """Leave the plain model, its weights as they are, after a training that failed; then train again.

        Raises:
            LifecycleError: If no training has begun, or it ended well.
        """
        if self.masks is not None:
            raise LifecycleError("the training ended well: the model is a plain one already")
        self._running.detach()
        self._loop = None

    # The Trainer's events -----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Attach the gates; go on from a checkpoint if the Trainer does."""
        refuse_scaled_gradients("fp16" if args.fp16 else "", "TrainingArguments(fp16=True)")
        if self._example_inputs is None:
            self._example_inputs = getattr(model, "dummy_inputs", None)
        restored = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        own = None
        if state.global_step > 0:
            given = args.resume_from_checkpoint
            own = _read(self._resume_from or (given if isinstance(given, str) else _folder(args, state)))
        loop = self._begin(model, state.max_steps)
        loop.session.distillation.loss_share = 1 / args.gradient_accumulation_steps
        if own is not None:
            model.load_state_dict(restored)  # the checkpoint's; `start` may have drawn new ones
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
        if logs is not None and self._attached:
            numbers = self._running.session.status().numbers()
            for place in (logs, *state.log_history[-1:]):  # the Trainer has copied what it prints into its history
                place.update(numbers)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add what the training needs to go on to the Trainer's checkpoint."""
        folder = _folder(args, state)
        if state.is_world_process_zero and folder.is_dir() and self.masks is None:
            buffer = io.BytesIO()
            torch.save(self._running.state_dict(), buffer)
            write_bytes(folder / STATE_FILE, buffer.getvalue())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide the masks and leave the plain model, its closed weights at zero."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None:
            self._warn_if_dense(
                int(Path(best).name.rpartition("-")[2]),  # the Trainer names folders after the step
                f"TrainingArguments(load_best_model_at_end=True) has loaded {best}",
                "Pass load_best_model_at_end=False",
            )
            self._running.load_state_dict(_read(best))  # the gates that go with these weights
        self.masks = self._running.finish()


def _read(folder: str | Path) -> dict[str, Any]:
    """Read what `GumbelPruningCallback.on_save` wrote, without running code in it."""
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise ConfigError(
            f"the Trainer goes on from a checkpoint, but {path} is missing: pass the checkpoint's folder as "
            "resume_from="
        )
    found: dict[str, Any] = torch_content(path.read_bytes(), path, "the state of the pruning")
    return found


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
