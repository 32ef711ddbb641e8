"""What the layers that Torch-Pruning knows do to channels: compute new ones, read them, or treat each by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from gumbel_plugin.graph.exactness.channel_labels import Safety, core, varying
from gumbel_plugin.graph.exactness.own_products import OwnProducts
from gumbel_plugin.graph.exactness.propagation import Flow
from gumbel_plugin.layers.geometry import (
    channel_dimension,
    input_channels,
    is_depthwise,
    is_input_major,
    layer_channels,
)
from gumbel_plugin.layers.own_forward import has_own_forward

_CHANNELWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU)
_OVER_CHANNELS = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)

Side = tuple[str, bool]
"""A layer's or parameter's name, and whether the side is meant on which a layer reads channels and sums over them."""

Treatment = Literal["each", "opaque", "foreign"]
"""What is known of a layer that is none of torch's own: it treats every channel (dimension 1) by itself; its inside is
not to be looked at; or it is cut by a function of which nothing is known here."""

_Effect = Callable[[str, Any, Sequence[Tensor], Any], None]


class Layers:
    """Labels what the layers of a model compute, and notes what they read.

    Attributes:
        flow: Follows the labels between the layers.
        sides: The labels of the channels of every layer and parameter, on each side that a group may cut.
        weightless: The labels of the channels of layers that treat each by itself and have no weight.
        blocks: Into how many equal parts the channels of a side fall that must lose the same members.
    """

    def __init__(self, treatments: Mapping[nn.Module, Treatment]) -> None:
        """Start with nothing seen."""
        self.flow = Flow()
        self.sides: dict[Side, Tensor] = {}
        self.weightless: dict[Side, Tensor] = {}
        self.blocks: dict[Side, int] = {}
        self._treatments = treatments
        self._effects: tuple[tuple[tuple[type[nn.Module], ...], _Effect], ...] = (
            ((nn.Linear,), self._linear),
            ((nn.modules.conv._ConvNd,), self._convolution),
            (_CHANNELWISE, self._treat_each),
            (_OVER_CHANNELS, self._normalize_over),
            ((nn.Embedding,), self._embed),
            ((nn.MultiheadAttention, nn.RNNBase), self._refuse),
        )

    def label_parameter(self, parameter: nn.Parameter, name: str, dim: int) -> None:
        """Label a parameter that belongs to no layer along the dimension in which it can be cut."""
        self._label((name, False), parameter, dim)

    def note(self, tensors: Any, safety: Safety, reason: str) -> None:
        """Note why the channels that some tensors carry are not exact."""
        for leaf in tree_leaves(tensors):
            labels = self.flow.of(leaf) if isinstance(leaf, Tensor) else None
            if labels is not None:
                self.flow.labels.note(core(labels), safety, reason)

    def reject_external_uses(self, model: nn.Module) -> None:
        """Note which layers' parameters were used outside of the layers: to cut them would change that, too."""
        for name, module in model.named_modules():
            for parameter in module.parameters(recurse=False):
                for side in ((name, True), (name, False)):
                    if parameter in self.flow.met and side in self.sides:
                        reason = f"{self.flow.met[parameter]} uses a parameter of {name} outside of it"
                        self.flow.labels.note(self.sides[side], "unsupported", reason)

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Watch every known layer of a model at work."""
        handles = []
        for name, module in model.named_modules():
            effect = self._effect_of(module)
            if effect is not None and module not in self._treatments and _has_own_products(module):
                handles.append(module.register_forward_pre_hook(self._begin_own(name, effect), with_kwargs=True))
                handles.append(module.register_forward_hook(self._end_own(name, effect), with_kwargs=True))
            elif effect is not None:
                handles.append(module.register_forward_pre_hook(self._begin))
                handles.append(module.register_forward_hook(self._end(name, effect), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _effect_of(self, module: nn.Module) -> _Effect | None:
        own: dict[Treatment, _Effect] = {"each": self._treat_each, "opaque": self._refuse, "foreign": self._leave}
        if module in self._treatments:
            return own[self._treatments[module]]
        if is_input_major(module):
            return self._linear
        return next((effect for types, effect in self._effects if isinstance(module, types)), None)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.flow.muted += 1

    def _end(self, name: str, effect: _Effect) -> Callable[..., None]:
        def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.flow.muted -= 1
            if self.flow.muted:  # a part of another layer
                return
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            with _disable_current_modes():  # what is done to labels is not to be followed
                try:
                    effect(name, module, tensors, output)
                except Exception as error:
                    self._not_understood(name, module, (tensors, output), error)

        return end

    def _not_understood(self, name: str, module: nn.Module, tensors: Any, error: Exception) -> None:
        """Note that a layer is called in a way that is not known: it costs what it reads and computes, no more."""
        reason = f"how the {type(module).__name__} {name} is called is not understood ({type(error).__name__}: {error})"
        self.note(tensors, "unsupported", reason)
        for side in ((name, True), (name, False)):
            if side in self.sides:
                self.flow.labels.note(self.sides[side], "unsupported", reason)

    def _begin_own(self, name: str, effect: _Effect) -> Callable[..., None]:
        def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.flow.muted:
                self.flow.muted += 1
                return
            with _disable_current_modes():
                bias = getattr(module, "bias", None)  # it may be added by an operation of its own
                if isinstance(bias, Tensor) and bias.shape == (layer_channels(module)[1],):
                    self._label((name, False), bias, 0)
            read = args[:1] or tuple(kwargs.values())
            tensors = [leaf for leaf in tree_leaves(read) if isinstance(leaf, Tensor)]
            self.flow.own.append(OwnProducts(name, module, tensors, lambda x, y: effect(name, module, [x], y)))

        return begin

    def _end_own(self, name: str, effect: _Effect) -> Callable[..., None]:
        def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = self.flow.own[-1] if self.flow.own else None
            if call is None or call.layer is not module or self.flow.muted != bool(call.fault):
                self.flow.muted -= 1  # as a part of another layer
                return
            self.flow.own.pop()
            self.flow.muted = 0
            with _disable_current_modes():
                call.end()
                fault = call.fault or self._misread(name, module, args)
                if not call.acted and _fits(module, args, output):
                    effect(name, module, args[:1], output)
                if fault:
                    self.note((args, kwargs, output), "inexact", fault)

        return end

    def _misread(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> str:
        """Say why gates cannot act on what a layer reads; empty if they can."""
        labels = self.flow.of(args[0]) if args and isinstance(args[0], Tensor) else None
        if labels is None:
            return ""
        dim = channel_dimension(module) % labels.dim()
        usual = set(varying(labels)) <= {dim} and labels.shape[dim] == input_channels(module)
        return "" if usual else f"{name} reads channels along another dimension than torch's layers do"

    # What each kind of layer does -----------------------------------------------------------------------------------

    def _linear(self, name: str, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        self._read((name, True), inputs[0], -1)
        self._label((name, False), output, -1)
        self._check_weight(name, module, inputs[0], output)

    def _convolution(self, name: str, module: Any, inputs: Sequence[Tensor], output: Tensor) -> None:
        dim = channel_dimension(module)
        if is_depthwise(module):
            self._read((name, False), inputs[0], dim)
            self._pass_on(inputs[0], output)
        else:
            self._read((name, True), inputs[0], dim)
            self._label((name, False), output, dim)
            self.blocks[name, True] = self.blocks[name, False] = module.groups
        if module.groups > 1 and (module.transposed or module.groups == module.out_channels != module.in_channels):
            self.note((inputs, output), "unsupported", f"{name} has groups that Torch-Pruning cannot cut")
        self._check_weight(name, module, inputs[0], output)

    def _treat_each(self, name: str, module: Any, inputs: Sequence[Tensor], output: Tensor, dim: int = 1) -> None:
        weight, sizes = getattr(module, "weight", None), inputs[0].shape
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and f"{len(sizes) - 1}d" in type(module).__name__:
            dim = 0  # no batch dimension
        if isinstance(weight, Tensor) and dim < len(sizes) and weight.shape == (sizes[dim],):
            self._read((name, False), inputs[0], dim)
        elif not isinstance(module, nn.PReLU):  # one slope is of no channel
            self._read((name, False), inputs[0], dim, self.weightless)
        self._pass_on(inputs[0], output)

    def _normalize_over(self, name: str, module: Any, inputs: Sequence[Tensor], output: Tensor) -> None:
        self.note(inputs, "inexact", f"{type(module).__name__} {name} computes statistics over these channels")
        labels = self.flow.of(inputs[0])
        along = () if labels is None else varying(labels)
        usual = -1 if isinstance(module, nn.LayerNorm) else 1
        self._treat_each(name, module, inputs, output, along[0] if len(along) == 1 else usual)

    def _embed(self, name: str, module: nn.Embedding, inputs: Sequence[Tensor], output: Tensor) -> None:
        self._label((name, False), output, -1)

    def _refuse(self, name: str, module: nn.Module, inputs: Sequence[Tensor], output: Any) -> None:
        kind = "a recurrent layer" if isinstance(module, nn.RNNBase) else "an attention layer"
        self.note(inputs, "unsupported", f"{name} is {kind} over these channels")

    def _leave(self, name: str, module: nn.Module, inputs: Sequence[Tensor], output: Any) -> None:
        # Its user says how to cut it; whether it keeps channels apart is for the check to find out.
        self._treat_each(name, module, inputs, output)

    def _check_weight(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """A layer that computes its weight from other numbers may compute another one when some of them are gone."""
        if module._parameters.get("weight") is None:
            self.note((x, output), "unsupported", f"the weight of {name} is computed from other parameters")

    # Labels -----------------------------------------------------------------------------------------------------------

    def _label(self, side: Side, tensor: Tensor, dim: int) -> None:
        """Let a tensor carry this side's labels along a dimension: new ones when it is met for the first time."""
        if side not in self.sides:
            self.sides[side] = self.flow.labels.fresh(tensor.shape[dim])
        shape = [1] * tensor.dim()
        shape[dim] = -1
        self.flow.put(tensor, self.sides[side].reshape(shape).expand(tensor.shape))

    def _read(self, side: Side, tensor: Tensor, dim: int, sides: dict[Side, Tensor] | None = None) -> None:
        """Note a tensor's labels along a dimension; whatever else is read in the same place leaves with them."""
        sides = self.sides if sides is None else sides
        labels = self.flow.of(tensor)
        if labels is None:
            labels = torch.zeros((), dtype=torch.int64).expand(tensor.shape)
        rows = core(labels).movedim(dim, 0)
        rows = rows.reshape(len(rows), -1)
        first = rows.amax(1)
        if rows.shape[1] > 1:
            self.flow.labels.unite(first[:, None].expand_as(rows), rows)
        first = first.expand(tensor.shape[dim])
        if side in sides:
            known = sides[side]
            self.flow.labels.unite(known, first)
            first = torch.where(known > 0, known, first)
        sides[side] = first

    def _pass_on(self, x: Tensor, output: Any) -> None:
        """Let an output carry the input's labels, if it has the same channels."""
        labels = self.flow.of(x)
        if labels is None or not isinstance(output, Tensor) or output.dim() != x.dim():
            return
        if all(output.shape[dim] == x.shape[dim] for dim in varying(labels)):
            self.flow.put(output, core(labels).expand(output.shape))


def _fits(module: nn.Module, args: tuple[Any, ...], output: Any) -> bool:
    """Whether a layer reads and returns channels where torch's layers do."""
    dim, widths = channel_dimension(module), layer_channels(module)
    tensors = [each for each in (*args[:1], output) if isinstance(each, Tensor)]
    return len(tensors) == 2 and all(
        each.dim() >= -dim and each.shape[dim] == width for each, width in zip(tensors, widths, strict=True)
    )


def _has_own_products(module: nn.Module) -> bool:
    return has_own_forward(module) and module._parameters.get("weight") is not None
