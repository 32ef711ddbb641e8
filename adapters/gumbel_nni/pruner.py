"""Learnt masks as an NNI pruner."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from nni.compression.base.apply_method import pruning_apply_methods
from nni.compression.base.compressor import Pruner
from nni.compression.base.config import trans_legacy_config_list
from nni.compression.base.setting import PruningSetting
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.base.wrapper import ModuleWrapper, create_module_wrapper
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from gumbel_plugin.config import ConfigLike, PruningConfig
from gumbel_plugin.errors import ConfigError, LifecycleError, TargetError, nearest
from gumbel_plugin.learning.plan import needs_groups
from gumbel_plugin.learning.session import MaskingSession, Masks, remove_gates
from gumbel_plugin.learning.sites import WeightSite
from gumbel_plugin.masks.base import Phase
from gumbel_plugin.shrinking.shrink import Backend, shrink
from gumbel_torch_pruning.groups import find_groups

_logger = logging.getLogger(__name__)

APPLY_METHOD = "gumbel_mul"
_SITE = "gumbel_site"


def gumbel_mul(target: Tensor, target_space: PruningTargetSpace) -> Tensor:
    """NNI apply method: the weight as its site gates it now, times the mask that NNI knows of."""
    site: WeightSite = getattr(target_space._wrapper, _SITE)
    mask: Tensor = target_space.mask
    return site.apply(target) * mask


pruning_apply_methods[APPLY_METHOD] = gumbel_mul
# Heads of an attention layer are selected by the layer's name; NNI itself has nothing to mask there but its projection.
PruningSetting.register("MultiheadAttention", {})
PruningSetting.register("NonDynamicallyQuantizableLinear", PruningSetting.registry["Linear"])


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
    ) -> None:
        """Wrap the model's layers; nothing is trained yet.

        Args:
            model: The plain model.
            config_list: An NNI config list, a YAML file's path, a dict or a `PruningConfig`.
            evaluator: An NNI evaluator that trains; without one the config's ``data`` and ``training`` do.
            existed_wrappers: Wrappers to inherit; `from_compressor` passes them.
            example_inputs: What to trace the model with, where whole channels are to go.

        Raises:
            ConfigError: If the configuration breaks a rule, or channels are to go and there is nothing to trace with.
            TargetError: If an entry matches no layer, or nothing can be gated.
            GraphError: If the model's forward fails on the example inputs.
        """
        if any(isinstance(module, ModuleWrapper) for module in model.modules()):
            raise LifecycleError("the model is wrapped by a compressor already; call its unwrap_model() first")
        if isinstance(config_list, list):
            config_list = trans_legacy_config_list(config_list)
        self.config = PruningConfig.load(config_list)
        self._example_inputs = _example_inputs(self.config, evaluator, example_inputs)
        pruning = self.config.pruning
        groups = find_groups(model, self._example_inputs) if needs_groups(pruning) else []
        self.session = MaskingSession(model, pruning, groups, self.config.seed)
        self._planned_steps: int | None = None
        self._own_wrappers: set[str] = set()
        super().__init__(model, [rule.as_nni() for rule in pruning.config_list], evaluator, existed_wrappers)
        for site in self.session.plan.sites.values():
            self._wrap_site(site)

    def _wrap_site(self, site: WeightSite) -> None:
        """Let the site act inside NNI's wrapper, with a wrapper of our own where NNI was not asked for one."""
        wrapper = self._module_wrappers.get(site.name)
        if wrapper is None or "weight" not in wrapper.pruning_target_spaces:
            if wrapper is not None:
                wrapper.unwrap()
            weight_only = {"target_names": ["weight"]}
            wrapper, _ = create_module_wrapper(
                self.bound_model, site.module, site.name, "pruning", weight_only, wrapper
            )
            self._module_wrappers[site.name] = wrapper
            self._own_wrappers.add(site.name)
            wrapper.wrap()
        wrapper.pruning_target_spaces["weight"].apply_method = APPLY_METHOD
        # Set past nn.Module's bookkeeping: the site is not a submodule, its masks are registered at the model's root.
        object.__setattr__(wrapper, _SITE, site)
        site.owner = wrapper

    # Training -----------------------------------------------------------------------------------------------------

    def compress(self, max_steps: int | None = None, max_epochs: int | None = None) -> tuple[nn.Module, Masks]:
        """Train with learnt masks and decide them.

        Args:
            max_steps: Optimiser steps to train for.
            max_epochs: Or epochs; with neither, the configuration's ``training.max_epochs``.

        Returns:
            The model, still wrapped and now masked, and the masks in NNI's format.

        Raises:
            ConfigError: If there is nothing to train with.
            LifecycleError: If the masks were decided before.
            NonFiniteLossError: If the loss becomes NaN or infinite.
        """
        if self.session.phase is Phase.FIXED:
            raise LifecycleError("the masks were decided already; a new GumbelPruner learns new ones")
        if max_steps is None and max_epochs is None:
            max_epochs = self.config.training.max_epochs
        self._planned_steps = max_steps
        if self.evaluator is not None:
            super().compress(max_steps, max_epochs)
        elif self.config.data is not None:
            self._compress_from_config(max_steps, max_epochs)
        else:
            raise ConfigError(
                "masks are learnt, so something must train: pass evaluator= (an NNI evaluator), or a configuration "
                "with a data section"
            )
        return self.bound_model, self.get_masks()

    def _compress_from_config(self, max_steps: int | None, max_epochs: int | None) -> None:
        from gumbel_plugin.runs.train import fit, loaders

        training = self.config.training
        if max_epochs is not None:
            training = training.model_copy(update={"max_epochs": max_epochs})
        train, validation, _ = loaders(self.config)
        fit(self.bound_model, self.session, training, train, validation, max_steps=max_steps, hooks=False)
        self._take_over_masks()

    def _single_compress(self, max_steps: int | None, max_epochs: int | None) -> None:
        self._fusion_compress(max_steps, max_epochs)

    def _fuse_preprocess(self, evaluator: Evaluator) -> None:
        session = self.session
        session.start(self._planned_steps, hooks=False)
        optimizers = session.optimizers()

        def step_gates() -> None:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        evaluator.patch_loss(lambda loss, batch: session.guard(loss) + session.loss())
        evaluator.patch_optimizer_step(before_step_tasks=[step_gates], after_step_tasks=[session.step])

    def _fuse_postprocess(self, evaluator: Evaluator) -> None:
        self._take_over_masks()

    def _take_over_masks(self) -> None:
        """Decide the masks, write them into the weights, and show them to NNI."""
        self._show(self.session.extract())

    def _show(self, masks: Masks) -> None:
        for name, targets in masks.items():
            for target, mask in targets.items():
                space = self._target_spaces.get(name, {}).get(target)
                if space is not None and isinstance(space.target, Tensor):
                    space.mask = mask

    # NNI's verbs --------------------------------------------------------------------------------------------------

    def get_masks(self) -> Masks:
        """Return the masks of the layers that the configuration names: ``{module: {target: 0/1 tensor}}``."""
        known: Mapping[str, Mapping[str, Tensor]] = super().get_masks()
        return {name: dict(targets) for name, targets in known.items() if name not in self._own_wrappers}

    def update_masks(self, masks: Mapping[str, Mapping[str, Tensor | None]]) -> None:
        """Take over masks: from now on they are fixed, and what they close is zero in the weights.

        Args:
            masks: In the format of `get_masks`.

        Raises:
            TargetError: If a module or target is not masked by this pruner, or a mask has the wrong shape.
        """
        for name, targets in masks.items():
            spaces = self._module_wrappers[name].pruning_target_spaces if name in self._module_wrappers else None
            if spaces is None:
                raise TargetError(f"mask for module {name!r}, not wrapped here{nearest(name, self._module_wrappers)}")
            for target, mask in targets.items():
                if target not in spaces:
                    raise TargetError(f"mask for {name}.{target}, no pruning target{nearest(target, spaces)}")
                shape = spaces[target].shape
                if mask is not None and shape is not None and list(mask.shape) != list(shape):
                    raise TargetError(f"{name}.{target}: mask {tuple(mask.shape)}, tensor {tuple(shape)}")
        given = {name: {key: m for key, m in t.items() if m is not None} for name, t in masks.items()}
        super().update_masks(given)
        self.session.fix_masks(given)
        if self.session.phase is Phase.FIXED:
            self._show(self.session.extract())

    def unwrap_model(self) -> None:
        """Give the plain model back, its closed weights at zero if the masks were decided."""
        if self.session.phase is Phase.FIXED:
            with torch.no_grad():
                for site in self.session.plan.sites.values():
                    site.fold()
        super().unwrap_model()
        self.session.detach()

    def speedup(self, example_inputs: Any = None, backend: Backend = "torch_pruning") -> nn.Module:
        """Return a new dense model without the closed channels, equal to the masked one; this model is left alone.

        Args:
            example_inputs: What to trace with and to verify on; by default what the pruner was built with.
            backend: ``"torch_pruning"`` or ``"nni"``; both give the same network.

        Raises:
            LifecycleError: If the masks were not decided yet.
            EquivalenceError: If the small model's outputs differ from the masked model's.
        """
        if self.session.phase is not Phase.FIXED:
            raise LifecycleError("there are no masks yet: call compress() or update_masks() first")
        inputs = self._example_inputs if example_inputs is None else example_inputs
        if inputs is None:
            raise ConfigError("speedup needs example_inputs: a tensor, a tuple of them, or a dict")
        return shrink(unwrapped_copy(self.bound_model), self.get_masks(), inputs, backend)


def unwrapped_copy(model: nn.Module) -> nn.Module:
    """Return a plain deep copy of a wrapped model: no wrappers, no gates; the model itself stays as it is."""
    for wrapper in _wrappers(model):
        for name, space in wrapper.pruning_target_spaces.items():
            # After a forward the layer holds the masked weight with its graph, which cannot be copied.
            if isinstance(space.target, Tensor) and name in wrapper.module._buffers:
                wrapper.module._buffers[name] = space.target.detach()
    duplicate = copy.deepcopy(model)
    for wrapper in _wrappers(duplicate):
        if hasattr(wrapper, _SITE) and getattr(wrapper, _SITE).phases == {Phase.FIXED}:
            getattr(wrapper, _SITE).fold()
        wrapper.unwrap()
    remove_gates(duplicate)
    return duplicate


def _wrappers(model: nn.Module) -> list[ModuleWrapper]:
    return [module for module in list(model.modules()) if isinstance(module, ModuleWrapper)]


def _example_inputs(config: PruningConfig, evaluator: Evaluator | None, given: Any) -> Any:
    """Return what to trace the model with, from the first of the four places that has it."""
    if given is not None:
        return given
    if config.example_shape is not None:
        return torch.randn(config.example_shape, generator=torch.Generator().manual_seed(config.seed))
    dummy = evaluator.get_dummy_input() if evaluator is not None else None
    if dummy is not None:
        return dummy
    if config.data is not None:
        from gumbel_plugin.runs.train import loaders

        batch = next(iter(loaders(config)[0]))
        return batch[0][:2]
    if needs_groups(config.pruning):
        raise ConfigError(
            "removing whole channels needs inputs to trace the model with: pass example_inputs=, or example_shape in "
            "the configuration, or dummy_input in the evaluator, or a data section in the configuration"
        )
    return None
