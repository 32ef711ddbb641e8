"""Where channels go: labels are followed through one forward, operation by operation.

An operation lets labels through only if it is known here what it does to channels. Whatever else touches a labeled
channel makes it unsupported, so that a group which is called exact is one whose every use was understood.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from gumbel_plugin.graph.exactness.broadcasting import Broadcast, Operand, autograd_numbers, spread_operands
from gumbel_plugin.graph.exactness.channel_labels import ChannelLabels, Safety, core, tight, varying
from gumbel_plugin.graph.exactness.own_products import OwnProducts


class Flow(TorchDispatchMode):
    """Follows labels through tensor operations.

    Attributes:
        labels: The labels, and what was noted of them.
        muted: While it is positive nothing is followed: a layer is at work whose effect is known as a whole.
        met: Parameters that operations outside of such layers used.
        own: Layers at work that have a forward of their own, the innermost last; their operations are followed.
        broadcasts: Where channels were broadcast over others, by the number of the operation's autograd node.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels = ChannelLabels()
        self.muted = 0
        self.met: dict[nn.Parameter, str] = {}
        self.own: list[OwnProducts] = []
        self.broadcasts: dict[int, Broadcast] = {}
        self._carried = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return the root labels that a tensor carries, of its shape and tight, on the CPU; None if it carries none."""
        carried: tuple[Tensor, int] | None = self._carried.get(tensor)  # type: ignore[no-untyped-call]
        if carried is None:
            return None
        if carried[1] != self.labels.changes:  # some of them have met others since
            self.put(tensor, carried[0])
            return self.of(tensor)
        return carried[0]

    def put(self, tensor: Tensor, labels: Tensor) -> None:
        """Let a tensor carry labels of its shape."""
        if tensor.numel():
            roots = self.labels.roots(core(labels)).expand(labels.shape)
            self._carried[tensor] = tight(roots), self.labels.changes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [] if self.muted else [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        layer = self.own[-1] if self.own and not self.muted else None
        used = [tensor for tensor in inputs if isinstance(tensor, nn.Parameter)]
        self.met.update((each, func._schema.name) for each in used if layer is None or not layer.owns(each))
        labeled = {id(tensor): labels for tensor in inputs if (labels := self.of(tensor)) is not None}
        result = func(*args, **kwargs)
        if layer is not None and layer.follow(func, args, kwargs, result):
            self.muted += bool(layer.fault)  # its effect is known as a whole, and its inside does not matter
            return result
        if labeled:
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            _apply(_Step(self, func, args, kwargs, inputs, labeled, outputs))
        return result


@dataclass(eq=False)
class _Step:
    """One operation of which an input is labeled."""

    flow: Flow
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: Sequence[Tensor]
    labeled: Mapping[int, Tensor]
    outputs: Sequence[Tensor]

    @property
    def source(self) -> Tensor:
        """The labels of the first labeled input."""
        return next(iter(self.labeled.values()))

    def argument(self, name: str, default: Any = None) -> Any:
        """Return an argument by its name in the operation's schema."""
        names = [argument.name for argument in self.func._schema.arguments]
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}.get(name, default)

    def put_all(self, labels: Tensor) -> None:
        """Let every output carry these labels, stretched where they do not vary."""
        for output in self.outputs:
            self.flow.put(output, core(labels).expand(output.shape))

    def note(self, safety: Safety, what: str, labels: Tensor | None = None) -> None:
        """Note that this operation does something to its inputs' channels (or to these ones)."""
        for affected in self.labeled.values() if labels is None else (labels,):
            self.flow.labels.note(core(affected), safety, f"{self.func._schema.name} {what}")


def _apply(step: _Step) -> None:
    """Follow an operation; one that its rule does not expect costs the channels in it, not the network."""
    try:
        _rule_for(step.func)(step)
    except Exception as error:
        step.note("unsupported", f"does something unexpected to these channels ({type(error).__name__}: {error})")


def _unknown(step: _Step) -> None:
    step.note("unsupported", "is not known to keep these channels apart")


def _nothing(step: _Step) -> None:
    """The outputs hold none of the input's values."""


def _same(step: _Step) -> None:
    if all(output.shape == step.source.shape for output in step.outputs):
        step.put_all(step.source)
    else:
        _unknown(step)


def _pointwise(step: _Step) -> None:
    """Elements meet: the channels on both sides leave together, but for those that are broadcast over others."""
    shape = step.outputs[0].shape
    result = torch.zeros((1,) * len(shape), dtype=torch.int64)
    for labels in _without_spread(step):
        ours, theirs = core(result), core(labels)
        common = torch.broadcast_shapes(ours.shape, theirs.shape)  # type: ignore[no-untyped-call]
        ours, theirs = ours.expand(common), theirs.expand(common)
        step.flow.labels.unite(ours, theirs)
        if core(result).any():
            step.note("unsupported", "joins them with what no layer computes", theirs * (ours == 0))
            step.note("unsupported", "joins them with what no layer computes", ours * (theirs == 0))
        result = torch.where(ours != 0, ours, theirs)
    result = tight(result.expand(shape))
    unlabeled = [tensor for tensor in step.inputs if id(tensor) not in step.labeled]
    if step.func._schema.is_mutable and any(tensor is step.args[0] and tensor._is_view() for tensor in unlabeled):
        step.note("unsupported", "writes them into a part of another tensor", result)
    elif any(_differs_along(tensor, dim - len(shape)) for tensor in unlabeled for dim in varying(result)):
        step.note("unsupported", "joins them with a tensor per channel that is no parameter", result)
    step.put_all(result)


def _without_spread(step: _Step) -> list[Tensor]:
    """Return the labels that meet; note those that are broadcast over others."""
    operands = [Operand(t, step.labeled.get(id(t))) for t in step.inputs if t.is_floating_point()]
    spread = spread_operands(operands, step.flow.labels)
    if not spread:
        return list(step.labeled.values())
    shapes = tuple(tuple(operand.tensor.shape) for operand in operands)
    seen = Broadcast(step.func._schema.name, shapes, tuple(spread))
    step.flow.broadcasts.update(dict.fromkeys(autograd_numbers(step.func), seen))
    for place in spread:
        step.note("unsupported", "applies each of them to all channels of another layer", operands[place].labels)
    gone = {id(operands[place].tensor) for place in spread}
    return [labels for tensor, labels in step.labeled.items() if tensor not in gone]


def _differs_along(tensor: Tensor, dim: int) -> bool:
    """Whether a tensor may have different elements along a dimension (counted from the end)."""
    return tensor.dim() >= -dim and tensor.shape[dim] > 1 and tensor.stride(dim) != 0


def _move(step: _Step) -> None:
    """Elements change places: run the same operation on the labels, and see whether channels stayed whole."""
    if step.labeled.get(id(step.args[0])) is not step.source or len(step.labeled) > 1:
        return _unknown(step)
    args, kwargs = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, (step.args, step.kwargs))
    if _name(step.func) in ("view", "_unsafe_view"):
        if step.outputs[0].dtype != step.args[0].dtype:
            return _unknown(step)
        moved: Any = step.source.reshape(step.outputs[0].shape)
    else:
        moved = step.func(step.source, *args[1:], **kwargs)
    for output, labels in zip(step.outputs, tree_leaves(moved), strict=True):
        labels = tight(labels)
        fault = _fault(step.source, labels)
        if fault:
            step.note("unsupported", fault)
        step.flow.put(output, labels)
    return None


def _fault(before: Tensor, after: Tensor) -> str:
    """Say what a move did to the channels, if removing some of them would change what the move does to the rest."""
    if len(varying(after)) > len(varying(before)):
        return "spreads these channels over several dimensions"
    old, new = core(before), core(after)
    if not torch.equal(torch.unique(old), torch.unique(new)):
        return "takes these channels apart"
    if len(varying(before)) == len(varying(after)) == 1:
        # A flattened map repeats each channel (1 1 2 2) or, channels last, all of them (1 2 1 2); both stay right.
        first, second = (torch.unique_consecutive(labels.flatten()) for labels in (old, new))
        if len(second) % len(first) or not bool((second.reshape(-1, len(first)) == first).all()):
            return "changes the order of these channels"
    return ""


def _cut(step: _Step) -> None:
    """Take one or several parts. Of equal parts of the channels the same members leave, so that they stay equal."""
    dim = step.argument("dim", 0) % step.source.dim()
    sizes = {output.shape[dim] for output in step.outputs}
    size = step.outputs[0].shape[dim]
    whole = len(step.labeled) == 1 and step.labeled.get(id(step.args[0])) is step.source and len(sizes) == 1
    strided = _name(step.func) == "slice" and step.argument("step", 1) != 1
    start = (step.argument("start") or 0) if _name(step.func) == "slice" else 0
    aligned = 1 < size < step.source.shape[dim] and step.source.shape[dim] % size == 0 and start % size == 0
    if dim in varying(step.source) and whole and aligned and not strided:
        labels = _coupled(step, dim, size)
        begin = start % step.source.shape[dim]
        for number, output in enumerate(step.outputs):
            step.flow.put(output, labels.narrow(dim, begin + number * size, size))
    else:
        _move(step)


def _glu(step: _Step) -> None:
    """One half, times a function of the other."""
    dim = step.argument("dim", -1) % step.source.dim()
    if dim in varying(step.source):
        size = step.source.shape[dim] // 2
        step.flow.put(step.outputs[0], _coupled(step, dim, size).narrow(dim, 0, size))
    else:
        _unknown(step)


def _coupled(step: _Step, dim: int, size: int) -> Tensor:
    """Let the same members of equal parts of the channels leave together; return the source's labels after that."""
    smallest = core(step.source)
    parts = smallest.unflatten(dim, (-1, size))  # type: ignore[no-untyped-call]
    first = parts.narrow(dim, 0, 1).expand_as(parts)
    step.flow.labels.unite(first, parts)
    lone = (parts.amin(dim, keepdim=True) == 0).expand_as(parts)
    step.note("unsupported", "cuts them into parts together with what no layer computes", parts * lone)
    return step.flow.labels.roots(smallest).expand(step.source.shape)


def _join(step: _Step) -> None:
    """Concatenate or stack."""
    pieces = [step.labeled.get(id(t), torch.zeros((), dtype=torch.int64).expand(t.shape)) for t in step.inputs]
    # A concatenation of maps need not be spelt out pixel by pixel.
    dim = step.argument("dim", 0) % step.outputs[0].dim()
    stacked = _name(step.func) == "stack"
    if not stacked:
        pieces = [piece for piece in pieces if piece.dim() == step.outputs[0].dim()]  # cat skips empty 1-d tensors
        kept = [
            d for d in range(step.outputs[0].dim()) if d == dim or any(d in varying(tight(piece)) for piece in pieces)
        ]
        pieces = [
            piece[tuple(slice(None) if d in kept else slice(0, 1) for d in range(piece.dim()))] for piece in pieces
        ]
    _level(step, pieces, None if stacked else dim)
    pieces = [step.flow.labels.roots(core(piece)).expand(piece.shape) for piece in pieces]
    joined = torch.stack(pieces, dim) if stacked else torch.cat(pieces, dim)
    step.flow.put(step.outputs[0], joined.expand(step.outputs[0].shape))


def _level(step: _Step, pieces: Sequence[Tensor], dim: int | None) -> None:
    """Let channels that lie side by side leave together: in all dimensions but one, pieces must be of one size."""
    for first, second in itertools.pairwise(pieces):
        ours, theirs = (core(piece) if dim is None else _one_of(core(piece), dim) for piece in (first, second))
        if ours is not None and theirs is not None:
            common = torch.broadcast_shapes(ours.shape, theirs.shape)  # type: ignore[no-untyped-call]
            step.flow.labels.unite(ours.expand(common), theirs.expand(common))


def _one_of(labels: Tensor, dim: int) -> Tensor | None:
    """Return the labels at one place along a dimension; None if there is none, or they differ along it."""
    differ = labels.shape[dim] != 1 and not bool((labels == labels.narrow(dim, 0, min(1, labels.shape[dim]))).all())
    return None if differ or not labels.numel() else labels.narrow(dim, 0, 1)


def _pad(step: _Step) -> None:
    pads = step.argument("pad")
    rank = step.source.dim()
    padded = {rank - 1 - place // 2 for place, size in enumerate(pads) if size}
    if padded & set(varying(step.source)):
        step.flow.put(step.outputs[0], torch.constant_pad_nd(step.source, pads))
    else:
        step.put_all(step.source)


def _window(step: _Step) -> None:
    """Pool or resize the trailing dimensions."""
    name = _name(step.func)
    trailing = next((count for count in (1, 2, 3) if f"{count}d" in name), 0)
    if any(dim >= step.source.dim() - trailing for dim in varying(step.source)):
        step.note("inexact", "mixes these channels")
        if step.outputs[0].shape == step.source.shape:
            step.put_all(step.source)
    elif trailing:
        step.put_all(step.source)
    else:
        _unknown(step)


def _reduce(step: _Step) -> None:
    dims = _dimensions(step)
    if dims & set(varying(step.source)):
        step.note("inexact", "mixes these channels")
    elif len(step.labeled) > 1:
        _unknown(step)
    elif step.outputs[0].dim() == step.source.dim():
        step.put_all(step.source)
    else:
        smallest = core(step.source)
        for dim in sorted(dims, reverse=True):
            smallest = smallest.squeeze(dim)
        step.put_all(smallest)


def _mix(step: _Step) -> None:
    """Normalize or accumulate along some dimensions, and keep the shape."""
    if _dimensions(step) & set(varying(step.source)):
        step.note("inexact", "mixes these channels")
    step.flow.put(step.outputs[0], step.source)


def _dimensions(step: _Step) -> set[int]:
    """Return the dimensions that a reduction or normalization runs over, counted from the front."""
    rank = step.source.dim()
    if _name(step.func) == "native_layer_norm":
        return set(range(rank - len(step.argument("normalized_shape")), rank))
    if _name(step.func) == "native_group_norm":
        return set(range(1, rank))
    dims = step.argument("dim")
    if dims is None or dims == []:
        return set(range(rank))
    return {dim % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}


_Rule = Callable[[_Step], None]

# By aten name; in-place variants (a trailing underscore) follow the same rule. Of what torch tags as pointwise, those
# are here of which a variant in place is not tagged.
_RULES: tuple[tuple[_Rule, tuple[str, ...]], ...] = (
    (_same, ("clone", "alias", "detach", "_to_copy", "lift_fresh", "contiguous", "as_strided", "zero", "fill")),
    (_pointwise, ("hardswish", "copy", "where", "masked_fill", "rsub", "add", "sub", "threshold")),
    (_pointwise, ("abs", "copysign", "gelu", "mish", "relu6", "true_divide", "eq", "ge", "gt", "le", "lt", "ne")),
    (_move, ("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze")),
    (_cut, ("slice", "split", "split_with_sizes")),
    (_glu, ("glu",)),
    (_move, ("select", "unbind", "unfold", "diagonal", "repeat")),
    (_move, ("roll", "flip", "index", "index_select", "gather", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle")),
    (_join, ("cat", "stack")),
    (_pad, ("constant_pad_nd",)),
    (_window, ("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "adaptive_max_pool1d", "max_pool2d_with_indices")),
    (_window, ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d")),
    (_window, ("max_pool3d_with_indices", "max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "_adaptive_avg_pool3d")),
    (_window, ("adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")),
    (_window, ("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d")),
    (_window, ("_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "reflection_pad2d", "replication_pad2d")),
    (_reduce, ("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "logsumexp", "prod", "norm")),
    (_reduce, ("linalg_vector_norm", "any", "all", "argmax", "argmin")),
    (_mix, ("_softmax", "_log_softmax", "cumsum", "native_layer_norm", "native_group_norm")),
    (_nothing, ("new_zeros", "new_ones", "new_empty", "new_full", "empty_like", "zeros_like", "ones_like")),
    (_nothing, ("full_like", "rand_like", "randn_like")),
)
_RULE_OF = {name: rule for rule, names in _RULES for name in names}


def _name(func: Any) -> str:
    name = str(func._schema.name).removeprefix("aten::")
    return name.removesuffix("_") if func._schema.is_mutable else name


def _rule_for(func: Any) -> _Rule:
    pointwise = torch.Tag.pointwise in func.tags
    return _RULE_OF.get(_name(func), _pointwise if pointwise else _unknown)


__all__ = ["Flow"]
