"""Whole attention heads as channel groups: how each kind of attention layer stores its heads, and loses some.

What a head computes reaches the rest of the network only through its columns of the output projection, so closing them
makes its queries, keys and values irrelevant; the scale of the scores depends on the size of a head, which stays.

A new kind of attention is one subclass of `AttentionKind` and one line in `KINDS`. Layers of all other classes are
observed, see `observed_heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gumbel_plugin.graph.attention_kind import AttentionKind
from gumbel_plugin.graph.channel_groups import ChannelGroup, ChannelSlice
from gumbel_plugin.graph.observed_kind import ObservedHeads
from gumbel_plugin.layers.compact_attention import CompactMultiheadAttention, CompactWindowAttention, part_of

# Where layers note how many heads they have; their forward may read any of them.
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads")


@dataclass(frozen=True)
class LinearHeads(AttentionKind):
    """Separate linear layers for queries, keys, values and output, as Hugging Face models have them.

    With grouped queries a unit is one head of keys and values and all query heads that share it.

    Attributes:
        projections: The attributes of the layer that hold the three linear layers.
        output: The attribute that holds the output projection, or its path from the layer's parent.
        outside: Whether the output projection belongs to the parent's other child.
    """

    projections: tuple[str, str, str]
    output: str
    outside: bool = False

    def matches(self, layer: nn.Module) -> bool:
        """See `AttentionKind.matches`."""
        names = self.projections if self.outside else (*self.projections, self.output)
        return _head_size(layer) is not None and all(isinstance(getattr(layer, n, None), nn.Linear) for n in names)

    def describe(self, name: str, model: nn.Module) -> ChannelGroup | None:
        """See `AttentionKind.describe`."""
        layer = model.get_submodule(name)
        size, path = _head_size(layer), self._output_path(name)
        output = _find(model, path)
        query, key, value = (getattr(layer, projection).out_features for projection in self.projections)
        if size is None or not isinstance(output, nn.Linear) or output.in_features != query:
            return None
        units = key // size
        if key != value or key % size or query % key or units == 0:
            return None
        producers = tuple(
            _slice(f"{name}.{projection}", width, width // units)
            for projection, width in zip(self.projections, (query, key, value), strict=True)
        )
        return ChannelGroup(name, units, producers, (_slice(path, query, query // units),))

    def remove(self, name: str, model: nn.Module, units: Tensor) -> None:
        """See `AttentionKind.remove`."""
        group, layer = self.describe(name, model), model.get_submodule(name)
        assert group is not None
        for part in group.producers:
            _keep_rows(model.get_submodule(part.module), _kept(part, units))
        for part in group.consumers:
            _keep_columns(model.get_submodule(part.module), _kept(part, units))
        left = (group.size - len(units)) / group.size
        for attribute in (*_HEAD_COUNTS, "num_key_value_heads", "all_head_size"):
            if isinstance(getattr(layer, attribute, None), int):
                setattr(layer, attribute, round(getattr(layer, attribute) * left))

    def _output_path(self, name: str) -> str:
        above = name.rpartition(".")[0] if self.outside else name
        return f"{above}.{self.output}".lstrip(".")


class CompactHeads(LinearHeads):
    """The heads of a `CompactMultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__(("q_proj", "k_proj", "v_proj"), "out_proj")

    def matches(self, layer: nn.Module) -> bool:
        """See `AttentionKind.matches`."""
        return isinstance(layer, CompactMultiheadAttention)

    def remove(self, name: str, model: nn.Module, units: Tensor) -> None:
        """See `AttentionKind.remove`."""
        layer: Any = model.get_submodule(name)
        layer.mask_heads = layer.mask_heads[_others(layer.num_heads, units)]
        super().remove(name, model, units)


class TorchHeads(AttentionKind):
    """The heads of `nn.MultiheadAttention`, whose projections are packed into one parameter."""

    def matches(self, layer: nn.Module) -> bool:
        """See `AttentionKind.matches`."""
        return isinstance(layer, nn.MultiheadAttention)

    def describe(self, name: str, model: nn.Module) -> ChannelGroup | None:
        """See `AttentionKind.describe`."""
        layer: Any = model.get_submodule(name)
        output = _slice(f"{name}.out_proj", layer.embed_dim, layer.head_dim)
        unit = layer.head_dim * (layer.embed_dim + layer.kdim + layer.vdim)
        reason = ""
        if type(layer) is not nn.MultiheadAttention:
            reason = f"{name} is a {type(layer).__name__}, not nn.MultiheadAttention itself"
        elif layer.bias_k is not None or layer.add_zero_attn:
            reason = f"{name} has add_bias_kv or add_zero_attn, which the compact layer lacks"
        safety: Any = "unsupported" if reason else "exact"
        return ChannelGroup(name, layer.num_heads, (), (output,), safety, reason, unlisted_weights=unit)

    def remove(self, name: str, model: nn.Module, units: Tensor) -> None:
        """See `AttentionKind.remove`."""
        attention: Any = model.get_submodule(name)
        _replace(model, name, CompactMultiheadAttention(attention))
        CompactHeads().remove(name, model, units)


class WindowHeads(AttentionKind):
    """The heads of torchvision's shifted window attention, V1 and V2, and of its compact form."""

    def matches(self, layer: nn.Module) -> bool:
        """See `AttentionKind.matches`."""
        return any(kind.__name__ == "ShiftedWindowAttention" for kind in type(layer).__mro__) or isinstance(
            layer, CompactWindowAttention
        )

    def describe(self, name: str, model: nn.Module) -> ChannelGroup | None:
        """See `AttentionKind.describe`."""
        layer: Any = model.get_submodule(name)
        width, heads = layer.proj.in_features, layer.num_heads
        packed = torch.arange(3 * width)  # row r of qkv: its part r // width, its head (r % width) // head_dim
        rows = ChannelSlice(f"{name}.qkv", packed, packed % width // (width // heads))
        return ChannelGroup(name, heads, (rows,), (_slice(f"{name}.proj", width, width // heads),))

    @torch.no_grad()
    def remove(self, name: str, model: nn.Module, units: Tensor) -> None:
        """See `AttentionKind.remove`."""
        group, layer = self.describe(name, model), model.get_submodule(name)
        assert group is not None
        if not isinstance(layer, CompactWindowAttention):
            layer = CompactWindowAttention(layer)
            _replace(model, name, layer)
        kept = _others(layer.num_heads, units)
        _keep_rows(layer.qkv, _kept(group.producers[0], units))
        _keep_columns(layer.proj, _kept(group.consumers[0], units))
        if layer.logit_scale is None:
            layer.relative_position_bias_table = part_of(layer.relative_position_bias_table, 1, kept)
        else:
            layer.logit_scale = part_of(layer.logit_scale, 0, kept)
            _keep_rows(layer.cpb_mlp[-1], kept)
        layer.num_heads = len(kept)


@dataclass(frozen=True)
class NamedHeads:
    """The heads of a layer that is written with linear layers of its own, which a user named.

    Attributes:
        reader: The linear layer that reads what the heads compute, the output projection.
        size: How many of its input columns one head has.
        layers: The named layers: queries, keys and values, in one or several.
    """

    reader: str
    size: int
    layers: tuple[str, ...]

    def count(self, model: nn.Module) -> int:
        """Return how many heads a model has."""
        reader: Any = model.get_submodule(self.reader)
        return int(reader.in_features) // self.size

    def sync(self, model: nn.Module, before: int) -> None:
        """Set how many heads are left where the attention layers note it."""
        for layer in self.layers:
            owner = model.get_submodule(layer.rpartition(".")[0])
            for attribute in _HEAD_COUNTS:
                if getattr(owner, attribute, None) == before:
                    setattr(owner, attribute, self.count(model))


KINDS: list[AttentionKind] = [
    ObservedHeads(),
    TorchHeads(),
    CompactHeads(),
    WindowHeads(),
    LinearHeads(("q_proj", "k_proj", "v_proj"), "o_proj"),  # Llama and its family
    LinearHeads(("q_proj", "k_proj", "v_proj"), "out_proj"),  # CLIP, BART, OPT, ...
    LinearHeads(("query", "key", "value"), "output.dense", outside=True),  # BERT and its family
]
"""The kinds of attention that are known; the first that matches a layer is taken."""


def kind_of(layer: nn.Module) -> AttentionKind | None:
    """Return the kind of an attention layer, None if a module is none of a known kind."""
    return next((kind for kind in KINDS if kind.matches(layer)), None)


def is_hidden(layer: nn.Module) -> bool:
    """Whether a module is an attention layer into which nobody looks while a dependency graph is traced."""
    kind = kind_of(layer)
    return kind is not None and kind.hidden


def is_known(model: nn.Module, name: str) -> bool:
    """Whether all that the heads of an attention layer have is known from its kind, so that nothing is to be observed.

    A table of position biases, say, is none of the projections that a kind knows of, and has an entry per head.
    """
    layer = model.get_submodule(name)
    kind = next((kind for kind in KINDS if kind.hidden and kind.matches(layer)), None)
    group = None if kind is None else kind.describe(name, model)
    if group is None or not isinstance(kind, LinearHeads):
        return kind is not None and not isinstance(kind, LinearHeads)
    listed = tuple(f"{part.module}." for part in (*group.producers, *group.consumers))
    others = [p for key, p in layer.named_parameters() if not f"{name}.{key}".startswith(listed)]
    return not any(group.size in parameter.shape for parameter in others)


def find_heads(model: nn.Module) -> list[ChannelGroup]:
    """Return the heads of every attention layer of a known kind, each layer a group that has the layer's name.

    A model that is itself an attention layer has none: there is nothing to put a smaller layer into.
    """
    found = [(name, kind_of(layer)) for name, layer in model.named_modules() if name]
    groups = [kind.describe(name, model) for name, kind in found if kind is not None]
    return [_with_a_choice(group) for group in groups if group is not None]


def remove_heads(model: nn.Module, name: str, units: Tensor) -> bool:
    """Remove heads of an attention layer, in place in the model.

    Args:
        model: The model.
        name: A group's name.
        units: Numbers of the group's units, int64; at least one other must be left.

    Returns:
        Whether the name is that of an attention layer; if not, nothing was done.
    """
    kind = kind_of(model.get_submodule(name))
    if kind is None:
        return False
    kind.remove(name, model, units.cpu())
    return True


@contextmanager
def opaque_attention(model: nn.Module) -> Iterator[None]:
    """Let autograd see every known attention layer as one operation, while a dependency graph is traced.

    Torch-Pruning follows each autograd node. Inside an attention layer it would tie heads, positions and windows to
    channels: q, k and v would make groups of their own, and on Swin and Llama it would not come to an end.
    """
    layers = [layer for layer in model.modules() if is_hidden(layer)]
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _as_one_operation(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:  # a wrapper's
                layer.forward = forward


def _as_one_operation(forward: Callable[..., Any]) -> Callable[..., Any]:
    def opaque(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            outputs = forward(*args, **kwargs)
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        return tree_map(
            lambda leaf: (
                AttentionLayer.apply(leaf, *sources)  # type: ignore[no-untyped-call]
                if isinstance(leaf, Tensor) and leaf.is_floating_point()
                else leaf
            ),
            outputs,
        )

    return opaque


class AttentionLayer(torch.autograd.Function):
    """Its node, AttentionLayerBackward, stands for a whole attention layer."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *sources: Tensor) -> Tensor:
        """Return the layer's output, which depends on the sources."""
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Refuse: a graph is only read."""
        raise NotImplementedError("an attention layer was traced, not run")


def _with_a_choice(group: ChannelGroup) -> ChannelGroup:
    if group.size > 1 or group.reason:
        return group
    return replace(group, safety="unsupported", reason="it has one head, which must stay")


def _head_size(layer: nn.Module) -> int | None:
    size = getattr(layer, "head_dim", getattr(layer, "attention_head_size", None))
    return size if isinstance(size, int) and size > 0 else None


def _find(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _slice(module: str, channels: int, per_unit: int) -> ChannelSlice:
    positions = torch.arange(channels)
    return ChannelSlice(module, positions, positions // per_unit)


def _others(count: int, units: Tensor) -> Tensor:
    numbers = torch.arange(count)
    return numbers[~torch.isin(numbers, units)]


def _kept(part: ChannelSlice, removed: Tensor) -> Tensor:
    return part.positions[~torch.isin(part.units, removed)]


def _keep_rows(linear: nn.Module, kept: Tensor) -> None:
    assert isinstance(linear, nn.Linear)
    linear.weight = part_of(linear.weight, 0, kept)
    if linear.bias is not None:
        linear.bias = part_of(linear.bias, 0, kept)
    linear.out_features = len(kept)


def _keep_columns(linear: nn.Module, kept: Tensor) -> None:
    assert isinstance(linear, nn.Linear)
    linear.weight = part_of(linear.weight, 1, kept)
    linear.in_features = len(kept)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
