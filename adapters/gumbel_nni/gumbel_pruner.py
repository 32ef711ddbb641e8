"""Learned masks as an NNI pruner."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nni.compression.base.apply_method import pruning_apply_methods
from nni.compression.base.compressor import Compressor, Pruner
from nni.compression.base.setting import PruningSetting
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from gumbel_nni.any_masks import Backend, speedup
from gumbel_nni.compat.aligning import align_masks, check_followers, followers_in, split_aligned
from gumbel_nni.compat.messages import check_compressor, check_evaluator, check_masks
from gumbel_nni.compat.stacking import masks_of, weight_space
from gumbel_nni.compat.training_length import PlannedSteps
from gumbel_nni.compat.unwrapping import GATED_LAYER, unwrapped_copy, wrappers_of
from gumbel_nni.config_evaluator import epochs_of, train_from_config
from gumbel_nni.pruner_arguments import inputs_to_trace, load_config, nni_entries
from gumbel_nni.sparsity_targets import SparsityTargets
from gumbel_plugin.config import ConfigLike
from gumbel_plugin.errors import ConfigError, LifecycleError
from gumbel_plugin.layers.model_check import WRAPPER, refuse_wrapped
from gumbel_plugin.layers.weights import register_weight_holder
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.shrinking.mask_file import load_masks
from gumbel_plugin.storage.mask_format import Masks
from gumbel_plugin.training.distillation import DistillationLike, distillation_of
from gumbel_plugin.training.gated_layer import GatedLayer
from gumbel_plugin.training.loop import MaskingLoop, refuse_scaled_gradients
from gumbel_plugin.training.session import MaskingSession
from gumbel_plugin.training.training_check import checked_length

APPLY_METHOD = "gumbel_mul"


def gumbel_mul(target: Tensor, target_space: PruningTargetSpace) -> Tensor:
    """NNI apply method: the weight as its gated layer gates it now, times the mask that NNI knows of."""
    gated: GatedLayer = getattr(target_space, GATED_LAYER)
    mask: Tensor = target_space.mask
    return gated.apply(target) * mask


pruning_apply_methods[APPLY_METHOD] = gumbel_mul
register_weight_holder(lambda layer: layer._modules.get(WRAPPER))
# Heads of an attention layer are selected by the layer's name; NNI itself has nothing to mask there but its projection.
PruningSetting.register("MultiheadAttention", {})
PruningSetting.register("NonDynamicallyQuantizableLinear", PruningSetting.registry["Linear"])
PruningSetting.register("Conv1D", PruningSetting.registry["Linear"])  # transformers'


# NNI's schedulers know five pruners by name, and warn of others; this one is tested.
logging.getLogger("nni.compression.pruning.scheduled_pruner").addFilter(
    lambda record: "pruner type GumbelPruner" not in record.getMessage()
)


class GumbelPruner(Pruner):  # type: ignore[misc]
    """Learns which weights or channels to keep while the network trains, as any NNI pruner would be used.

    Example::

        pruner = GumbelPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], evaluator, example_inputs=x)
        model, masks = pruner.compress(max_steps=1000)
        small = pruner.speedup(x)

    Channel gates act at the inputs of the layers that read the channels, which is what makes their removal exact; the
    masks that `get_masks` reports are on the layers that compute the channels, as NNI's are.

    Attributes:
        config: The resolved configuration.
        session: The masking session that learns the masks.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigLike,
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        example_inputs: Any = None,
        distillation: DistillationLike = None,
    ) -> None:
        """Wrap the model's layers; nothing is trained yet.

        Args:
            model: The plain model.
            config_list: An NNI config list, a YAML file's path, a dict or a `PruningConfig`.
            evaluator: An NNI evaluator that trains; without one the config's ``data`` and ``training`` do.
            existed_wrappers: Wrappers to inherit; `from_compressor` passes them.
            example_inputs: What to trace the model with, where whole channels are to go.
            distillation: What is learned from a teacher: settings, a teacher, or a `Distillation`; by default what the
                configuration says.

        Raises:
            ConfigError: If the configuration breaks a rule, the evaluator is none of NNI's, or channels are to go and
                there is nothing to trace with.
            TargetError: If an entry matches no layer, or nothing can be gated.
            GraphError: If the model's forward fails on the example inputs.
        """
        refuse_wrapped(model, "GumbelPruner")
        check_evaluator(evaluator)
        learned, aligned = split_aligned(config_list) if isinstance(config_list, list) else (config_list, [])
        check_followers(model, aligned)
        self.config = load_config(learned)
        self._example_inputs = inputs_to_trace(self.config, evaluator, example_inputs)
        pruning, inputs = self.config.pruning, self._example_inputs
        self.session = MaskingSession(
            model,
            pruning,
            seed=self.config.seed,
            example_inputs=inputs,
            distillation=distillation_of(distillation, self.config),
        )
        # What a scheduler of NNI's sets: every so many steps, and how often, it changes the sparse ratios.
        self.interval_steps = -1
        self.total_times = 1
        super().__init__(model, nni_entries(pruning, self.session.plan) + aligned, evaluator, existed_wrappers)
        try:
            self._followers = followers_in(self._target_spaces)
            for gated in self.session.plan.gated_layers.values():
                self._place(gated)
            self._targets = SparsityTargets(self.session.plan, self._target_spaces)
        except Exception:
            self.unwrap_model()  # nobody else could
            raise

    @classmethod
    def from_compressor(
        cls, compressor: Compressor, new_config_list: ConfigLike, *args: Any, **kwargs: Any
    ) -> GumbelPruner:
        """Wrap a model that another compressor holds, to be trained together; the arguments are NNI's.

        Args:
            compressor: Any compressor of NNI's; its model, wrappers and evaluator are inherited.
            new_config_list: See `GumbelPruner`.
            *args: Go to `GumbelPruner`.
            **kwargs: Go to `GumbelPruner`.

        Raises:
            ConfigError: If there is no compressor to inherit from.
            LifecycleError: If a `GumbelPruner` that it was fused with has not decided its masks.
        """
        check_compressor(compressor)
        fused = [each for each in compressor.fused_compressors if isinstance(each, GumbelPruner)]
        if any(each.session.phase is not Phase.FIXED for each in fused):
            raise LifecycleError(
                "a GumbelPruner before this one has not decided its masks, and two cannot learn at once: name all "
                "layers in one config list, or call the first one's compress() before"
            )
        pruner: GumbelPruner = super().from_compressor(compressor, new_config_list, *args, **kwargs)
        return pruner

    def _place(self, gated: GatedLayer) -> None:
        """Let a gated layer act in a target space of NNI's."""
        space = weight_space(self, gated.name, gated.module)
        space.apply_method = APPLY_METHOD
        setattr(space, GATED_LAYER, gated)
        space.before_unwrap = partial(self._let_go, gated)

    # Training -----------------------------------------------------------------------------------------------------

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Masks]:
        """Train with learned masks and decide them.

        Args:
            max_steps: Optimizer steps to train for.
            max_epochs: Or epochs; with neither, the configuration's ``training.max_epochs``.

        Returns:
            The model, still wrapped and now masked, and the masks in NNI's format.

        Raises:
            ConfigError: If there is nothing to train with, or a length is no positive integer.
            LifecycleError: If the masks were decided before.
            NonFiniteLossError: If the loss becomes NaN or infinite.
        """
        if self.session.phase is Phase.FIXED:
            raise LifecycleError("the masks were decided already; a new GumbelPruner learns new ones")
        max_steps, max_epochs = checked_length("max_steps", max_steps), checked_length("max_epochs", max_epochs)
        if max_steps is None and max_epochs is None:
            max_epochs = epochs_of(self.config)
        if self.evaluator is not None:
            super().compress(max_steps, max_epochs)
        elif self.config.data is not None:
            train_from_config(self.bound_model, self.session, self.config, max_steps, max_epochs)
            self._take_over_masks()
        else:
            raise ConfigError(
                "masks are learned, so something must train: pass evaluator= (an NNI evaluator), or a configuration "
                "with a data section"
            )
        return self.bound_model, self.get_masks()

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        self._fusion_compress(max_steps, max_epochs)

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        session = self.session
        if session.phase is Phase.FIXED:  # decided in an earlier training; unwrapping has detached it
            session.attach(hooks=False)
            return
        length = PlannedSteps(evaluator)
        if self.interval_steps > 0:
            self._follow_schedule(length)
        trainer = getattr(evaluator, "trainer", None)  # of Transformers, or of Lightning
        fp16 = getattr(getattr(trainer, "args", None), "fp16", False)
        refuse_scaled_gradients("fp16" if fp16 else str(getattr(trainer, "precision", "")), "the evaluator's trainer")
        loop = MaskingLoop(session)
        loop.start(length.planned, hooks=False)

        def guard(loss: Tensor, batch: Any) -> Tensor:
            self._check_train_mode()
            self._targets.read()
            session.total_steps = length.known(session.total_steps)
            return loop.guard(loss)

        def after_step() -> None:
            loop.after_step()
            if session.steps == session.total_steps and session.phase is not Phase.FIXED:
                self._targets.read()  # decided before what calibrates itself at the end, such as a PTQ quantizer
                session.decide()

        evaluator.patch_loss(guard)
        evaluator.patch_optimizer_step(before_step_tasks=[loop.before_step], after_step_tasks=[after_step])

    def _check_train_mode(self) -> None:
        if not any(mask.training for mask in self.session.plan.masks.values()):
            raise LifecycleError(
                "the model is trained in eval mode, in which gates are decided and learn nothing from the data: call "
                "its train() first (Lightning 2.2 and later leaves the mode as it is)"
            )

    def _follow_schedule(self, length: PlannedSteps) -> None:
        """Leave the way to the target to NNI's scheduler, which bound this pruner."""
        controller = self.session.controller
        controller.config = controller.config.model_copy(update={"ramp": 0.0})
        reached = self.interval_steps * self.total_times
        fixed = self.session.config.phases.fixed
        if length.planned is not None and fixed and reached > length.planned * (1 - fixed):
            raise ConfigError(
                f"phases.fixed = {fixed}: the masks would be decided before the schedule reaches its goal at step "
                f"{reached} of {length.planned}; lower it, or total_times * interval_steps"
            )

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        self._targets.read()
        self._take_over_masks()

    def _take_over_masks(self) -> None:
        """Decide the masks, write them into the weights, and show them to NNI."""
        masks = self.session.extract()
        learned = {name: targets for name, targets in masks.items() if name not in self._followers}
        for name, targets in learned.items():
            for target, mask in targets.items():
                space = self._target_spaces.get(name, {}).get(target)
                if space is not None and isinstance(space.target, Tensor):
                    space.mask = mask
        align_masks(learned, {name: self._target_spaces[name] for name in self._followers})

    # NNI's verbs --------------------------------------------------------------------------------------------------

    def get_masks(self) -> Masks:
        """Return the masks of all layers that a configuration names: ``{module: {target: 0/1 tensor}}``."""
        masks: Masks = super().get_masks()
        return {name: masks[name] for name, _ in self.bound_model.named_modules() if name in masks}  # in its order

    def update_masks(self, masks: Mapping[str, Mapping[str, Tensor | None]] | str | Path) -> None:
        """Take over masks: from now on they are fixed, and what they close is zero in the weights.

        Args:
            masks: In the format of `get_masks`, or the path of a file of them (`gumbel_plugin.shrinking.mask_file`).

        Raises:
            TargetError: If a module or target is not masked by this pruner, or a mask has the wrong shape.
            DataError: If the file cannot be read.
        """
        if isinstance(masks, str | Path):
            masks = load_masks(masks)
        check_masks(masks, self._module_wrappers)
        given = {name: {key: m for key, m in t.items() if m is not None} for name, t in masks.items()}
        super().update_masks(given)
        self.session.fix_masks(given)
        if self.session.phase is Phase.FIXED:
            self._take_over_masks()

    def _let_go(self, gated: GatedLayer) -> None:
        """Leave a layer that is about to be unwrapped, closed weights at zero if the masks were decided."""
        if self.session.phase is Phase.FIXED:
            gated.fold()
        self.session.detach()

    def speedup(self, example_inputs: Any = None, backend: Backend = "torch_pruning") -> nn.Module:
        """Return a new dense model without the closed channels, equal to the masked one; this model is left alone.

        Args:
            example_inputs: What to trace with and to verify on; by default what the pruner was built with.
            backend: ``"torch_pruning"`` or ``"nni"``; both give the same network.

        Returns:
            The small model; where nothing can leave it is as large as this one, and a warning names the reasons.

        Raises:
            LifecycleError: If the masks were not decided yet.
            ConfigError: If there are no example inputs, or the backend is unknown.
            EquivalenceError: If the small model's outputs differ from the masked model's.
        """
        if self.session.phase is not Phase.FIXED:
            raise LifecycleError("there are no masks yet: call compress() or update_masks() first")
        inputs = self._example_inputs if example_inputs is None else example_inputs
        if inputs is None:
            raise ConfigError("speedup needs example_inputs: a tensor, a tuple of them, or a dict")
        wrappers = wrappers_of(self.bound_model)  # also those of what was fused with this pruner
        masks = masks_of(wrappers) if wrappers else self.get_masks()
        return speedup(unwrapped_copy(self.bound_model), masks, inputs, backend=backend)
