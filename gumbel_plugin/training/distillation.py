"""Distillation: the network learns from a teacher, by default the dense one that it was, beside its task."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gumbel_plugin.config import ConfigLike, DistillationConfig, PruningConfig, PruningSection
from gumbel_plugin.config_errors import explain
from gumbel_plugin.config_values import plain
from gumbel_plugin.errors import ConfigError, LifecycleError, TargetError, shown
from gumbel_plugin.layers.weights import Attached
from gumbel_plugin.training.distances import (
    DISTANCES,
    Distance,
    OwnLoss,
    WholeLoss,
    alike,
    change_gradient,
    relative_error,
)
from gumbel_plugin.training.state_check import require_keys
from gumbel_plugin.training.teacher import (
    Held,
    Outputs,
    compared,
    copy_weights,
    matching,
    on_kept_channels,
    read_teacher,
)

DistillationLike: TypeAlias = "Distillation | DistillationConfig | Mapping[str, Any] | nn.Module | None"
"""What every way to train takes as ``distillation``: settings (in a dict ``teacher`` may be a module), or a teacher."""


class Distillation(Attached):
    """Lets a network learn from a teacher in every backward of its training.

    Sessions, loops, pruners, callbacks and runs own one where their configuration has a ``distillation`` section, or
    they get one; it is theirs as long as they train. Whoever goes on training the small network by himself attaches it
    there::

        small = callback.shrink()
        distillation = Distillation(dense, {"logits": 0.7, "hidden": 0.1, "layers": ["layer4"]})
        distillation.attach(small)
        for x, y in loader:
            loss = distillation.loss(criterion(small(x), y))
            ...                                       # backward and step, as ever
        distillation.detach()

    In every training forward of the student the teacher sees the same inputs, in eval mode and without gradients. The
    gradient of the distillation enters the backward at the compared tensors, where the gradient of the task that comes
    through the outputs is multiplied by 1 - α. So no trainer has to know of it, and each gets the same gradients:

        ∂/∂outputs [(1 - α)·task + α·d(outputs)] and ∂/∂h β·mean‖h_S - h_T‖² / mean‖h_T‖².

    What the task's loss is multiplied with between forward and backward (a gradient scaler, accumulated steps) the
    gradient of the distillation must be too. That happens where the loss goes through `loss` (sessions and loops do so
    in ``guard``), where the model itself returns its loss, and by `loss_share` where neither is so.

    It costs one copy of the network (or the teacher's own memory), one forward without gradients a step, and as much
    memory as the gradients of the compared tensors.

    Attributes:
        settings: How much is learned, and how outputs are compared.
        loss_share: What the trainer multiplies the task's loss with, 1/n where the gradients of n batches are summed.
    """

    def __init__(
        self,
        teacher: nn.Module | str | Path | None = None,
        settings: DistillationConfig | Mapping[str, Any] | None = None,
    ) -> None:
        """Note what to do; the teacher is not called yet.

        Args:
            teacher: A module, which is set to eval mode and moved to the student's device; or what
                ``settings.teacher`` says: ``"dense"``, or the path of a file of weights.
            settings: A `DistillationConfig`, or a dict of its keys.

        Raises:
            ConfigError: If a key is unknown or breaks a rule.
        """
        if isinstance(settings, Mapping) and isinstance(settings.get("teacher"), nn.Module):
            teacher = settings["teacher"] if teacher is None else teacher
            settings = {key: value for key, value in settings.items() if key != "teacher"}
        self.settings = _checked(settings)
        self.loss_share = 1.0
        self._source = self.settings.teacher if teacher is None or isinstance(teacher, nn.Module) else str(teacher)
        self._teacher = Held(None)
        self._own = self._begun = False
        self._handles: list[RemovableHandle] = []
        self._names: list[str] = []
        self._layers = Outputs()  # of the forward that is under way
        self._forwards = 0
        self._value: Tensor | None = None  # of the forwards since the last `loss`
        self._scale: Tensor | None = None  # what the last backward multiplied a loss with that went through `loss`
        if isinstance(teacher, nn.Module):
            self.teach(teacher)

    # The teacher --------------------------------------------------------------------------------------------------

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher; None where it is to be the dense network, which is not known yet."""
        return self._teacher.module

    @property
    def learns_from_dense(self) -> bool:
        """Whether the teacher is the dense network that the student was."""
        return self.settings.active and self._source == "dense" and (self._own or self.teacher is None)

    def teach(self, teacher: nn.Module) -> None:
        """Take another module for the teacher."""
        self._teacher, self._own, self._begun = Held(teacher), False, True

    def replace_dense(self, dense: nn.Module) -> None:
        """Let a copy of a dense network that was trained be the teacher, where that is ``dense``."""
        if self.learns_from_dense:
            self.teach(copy.deepcopy(dense))

    def prepare(self, model: nn.Module) -> None:
        """Build the teacher from the dense network where it is that, or where a file has its weights; match the layers.

        Args:
            model: The plain network, before it has gates.

        Raises:
            ConfigError: If the teacher is the model itself.
            DataError: If the teacher's file is missing, damaged or of another network.
            TargetError: If ``layers`` names what the network or the teacher does not have.
        """
        if not self.settings.active:
            return
        if self.teacher is model:
            raise ConfigError("distillation: the teacher is the model itself; pass copy.deepcopy(model), or 'dense'")
        if self.teacher is None:
            dense = self._source == "dense"
            self._teacher = Held(read_teacher(model, None if dense else self._source))
            self._own, self._begun = True, not dense
        self._teacher.module.eval()  # type: ignore[union-attr]
        self._match(model)

    def take(self, model: nn.Module, *, final: bool) -> None:
        """Let the dense teacher have the weights that the network has now, unless it has begun to teach.

        Args:
            model: The network; gates and wrappers on it do not count.
            final: Whether the teacher begins with these; else it is silent until it gets others.
        """
        if self.teacher is not None and not self._begun:
            copy_weights(model, self.teacher)
            self._begun = final

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of a dense teacher that has begun: no checkpoint of the network has them. Else nothing."""
        teaches = self.learns_from_dense and self._begun
        return {"teacher": self.teacher.state_dict()} if teaches and self.teacher else {}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state with the weights of another network.

        Raises:
            TargetError: If it is one.
        """
        if self.teacher is None or not self._own or "teacher" not in state:
            return
        own = self.teacher.state_dict()
        for name, tensor in require_keys(state["teacher"], list(own), "the teacher's weights").items():
            if name not in own or not isinstance(tensor, Tensor) or tensor.shape != own[name].shape:
                raise TargetError(f"the teacher's weights: {shown(name)} does not fit; are they of another network?")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, which may stand among other things.

        Raises:
            TargetError: If the weights are not those of this teacher; nothing was taken over.
        """
        self.check_state(state)
        if self.teacher is not None and self._own and "teacher" in state:
            self.teacher.load_state_dict(state["teacher"])
            self._begun = True

    # The student --------------------------------------------------------------------------------------------------

    def attach(self, student: nn.Module) -> None:
        """Teach a network from its next training forward on, until `detach`; it is one network at a time.

        Args:
            student: The network; `pickle` and state dicts of it lack the teacher.

        Raises:
            LifecycleError: If the teacher would be a dense network that nobody knows.
            ConfigError: If the student is the teacher.
            TargetError: If ``layers`` names what the student or the teacher does not have.
        """
        self.detach()
        if not self.settings.active:
            return
        if self.teacher is None:
            raise LifecycleError("there is no teacher: pass the dense network, Distillation(dense, settings)")
        self.prepare(student)
        self._forwards, self._value = 0, None
        self._handles = [
            student.register_forward_pre_hook(self._before_forward),
            student.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def detach(self) -> None:
        """Stop teaching, if a network is attached."""
        self._layers.clear()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def loss(self, task: Tensor) -> Tensor:
        """Return the whole loss, (1 - α)·task + α·d + β·Σ, to be differentiated in the task's place.

        Its gradients are those that enter anyway; it is the number to look at and to log, and by it the distillation
        knows what the loss is multiplied with before the backward.

        Args:
            task: The task's loss, from outputs of the training forwards since the last call.

        Raises:
            LifecycleError: If no forward of the student was seen.
        """
        if not self._begun or not self._handles:
            return task
        if not self._forwards:
            raise LifecycleError(
                "distillation: no training forward of the network was seen: call the network itself, in train mode (a "
                "Lightning module that keeps its network in an attribute: GumbelPruning(attribute=...))"
            )
        value, self._value = self._value, None
        if value is None:
            return task
        whole: Tensor = WholeLoss.apply(  # type: ignore[no-untyped-call]
            task, value, 1 - self.settings.logits, self._note_scale
        )
        return whole

    def _match(self, student: nn.Module) -> None:
        assert self.teacher is not None
        ours, theirs = (dict(each.named_modules(remove_duplicate=False)) for each in (student, self.teacher))
        self._names = matching(self.settings.layers, [name for name in ours if name in theirs])

    # A forward ----------------------------------------------------------------------------------------------------

    def _before_forward(self, student: nn.Module, args: Any) -> None:
        self._layers.clear()
        if self._begun and self.teacher and student.training and torch.is_grad_enabled():
            self._scale = None
            self._layers.watch(student, self._names)

    def _after_forward(self, student: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self._layers.watching:
            return
        hidden = self._layers.take()
        outputs = compared(output)
        own_loss = OwnLoss(output, self.loss_share if "num_items_in_batch" in kwargs else 1.0)
        teacher_outputs, teacher_hidden = self._ask(student, args, kwargs)
        settings, parts = self.settings, []
        if settings.logits:
            pair = alike(outputs, teacher_outputs, settings.loss)
            parts.append(self._enter(*pair, DISTANCES[settings.loss], settings.logits, own_loss, is_output=True))
        for name in self._names if settings.hidden else ():
            calls = len(hidden[name]), len(teacher_hidden[name])
            if calls[0] != calls[1] or not all(calls):
                raise TargetError(
                    f"distillation.layers: {name!r} was called {calls[0]} times in a forward of the network and "
                    f"{calls[1]} times in the teacher's; name layers that every forward calls equally often"
                )
            for ours, theirs in zip(hidden[name], teacher_hidden[name], strict=True):
                kept = on_kept_channels(student, name, ours, theirs)
                parts.append(self._enter(ours, kept, relative_error, settings.hidden, own_loss))
        self._forwards += 1
        for part in parts:
            self._value = part if self._value is None else self._value + part.to(self._value)

    def _ask(self, student: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        """Return the teacher's outputs and those of its layers on the same inputs; no random number is used up."""
        teacher = self.teacher
        assert teacher is not None
        ours, theirs = (next((p for p in m.parameters() if p.is_floating_point()), None) for m in (student, teacher))
        if ours is not None and theirs is not None:  # the trainer may have moved or converted the student meanwhile
            dtype = ours.dtype if self._own else theirs.dtype
            if (ours.device, dtype) != (theirs.device, theirs.dtype):
                teacher.to(ours.device, dtype if self._own else None)
        devices = [ours.device] if ours is not None and ours.is_cuda else []
        layers = Outputs()
        with torch.no_grad(), torch.random.fork_rng(devices):
            layers.watch(teacher, self._names)
            try:
                output = teacher(*args, **kwargs)
            finally:
                hidden = layers.take()
        return compared(output), hidden

    def _enter(
        self,
        ours: Tensor,
        theirs: Tensor,
        distance: Distance,
        weight: float,
        own_loss: OwnLoss,
        *,
        is_output: bool = False,
    ) -> Tensor:
        """Let the gradient of a distance enter the backward at a tensor of the student's; return its part of a loss."""
        wide = torch.promote_types(ours.dtype, torch.float32)
        leaf = ours.detach().to(wide).requires_grad_()
        with torch.enable_grad():
            part = weight * distance(leaf, theirs.detach().to(leaf), self.settings.temperature)
        if not ours.requires_grad:
            return part.detach()
        (entering,) = torch.autograd.grad(part, leaf)
        left = [entering]  # enters once, should one forward have several backwards
        task_weight = 1 - weight if is_output else 1.0

        def enter(gradient: Tensor) -> Tensor:
            total = gradient.to(wide) * task_weight
            while left:
                total = total + left.pop() * self._scale_now(own_loss)
            return total.to(gradient.dtype)

        change_gradient(ours, enter)
        return part.detach()

    def _scale_now(self, own_loss: OwnLoss) -> Tensor | float:
        if own_loss.scale is not None:
            return own_loss.scale
        return self.loss_share if self._scale is None else self._scale

    def _note_scale(self, scale: Tensor) -> None:
        self._scale = scale


def distillation_of(given: DistillationLike, config: PruningSection | ConfigLike) -> Distillation:
    """Return what an argument or else a configuration asks for; without either, one that does nothing.

    Raises:
        ConfigError: If it breaks a rule.
    """
    if isinstance(given, Distillation):
        return given
    section = None if isinstance(config, PruningSection) else PruningConfig.load(config).distillation
    if isinstance(given, nn.Module):
        return Distillation(given, section)
    asked = section if given is None else given
    return Distillation(None, DistillationConfig(logits=0) if asked is None else asked)


def _checked(settings: DistillationConfig | Mapping[str, Any] | None) -> DistillationConfig:
    if isinstance(settings, DistillationConfig):
        return settings
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(
            f"distillation = {shown(settings)}: it must be a mapping of settings, or a teacher (a module)"
        )
    try:
        return DistillationConfig.model_validate(plain(settings or {}))
    except ValidationError as error:
        raise ConfigError(explain(error, DistillationConfig, prefix="distillation.")) from error
