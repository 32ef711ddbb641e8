"""Attention layers of any class, of which it was observed where their heads are: how they note it, and lose some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.graph.attention_kind import AttentionKind
from gumbel_plugin.graph.channel_groups import ChannelGroup, ChannelSlice
from gumbel_plugin.layers.compact_attention import part_of
from gumbel_plugin.layers.geometry import channel_dimension, is_depthwise, is_transposed

READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that can read what heads compute."""

_MARK = "_gumbel_heads"
_NORMS = nn.modules.batchnorm._BatchNorm

Place = tuple[str, str, int]
"""A whole number that counts heads or their channels: the module, by its path, the attribute, and where it is a tuple
the place in that; -1 where not."""


@dataclass(frozen=True, eq=False)
class HeadCut:
    """What leaves a parameter or buffer with the heads.

    Attributes:
        tensor: Its path.
        dim: The dimension that runs over heads.
        positions: Places along it, int64.
        units: The unit that each of them leaves with, int64.
    """

    tensor: str
    dim: int
    positions: Tensor
    units: Tensor

    def without(self, removed: Tensor) -> tuple[Tensor, HeadCut]:
        """Return which places stay, of those that heads have, and what can be cut afterwards."""
        stays = ~torch.isin(self.units, removed)
        gone, left = torch.sort(self.positions[~stays]).values, self.positions[stays]
        units = self.units[stays]
        return gone, replace(
            self,
            positions=left - torch.searchsorted(gone, left),
            units=units - torch.searchsorted(torch.sort(removed).values, units),
        )


@dataclass(frozen=True, eq=False)
class HeadLayout:
    """Where the heads of one attention layer are; paths begin at the layer, those of the reader at the model.

    Attributes:
        count: How many units there are: heads, or what shares keys and values.
        reader: The layer that reads what heads compute, the output projection.
        columns: What it loses; the tensor is its weight.
        cuts: What parameters and buffers of the attention layer lose.
        attributes: Whole numbers that are proportional to the number of heads.
        reason: Why no head can leave, empty if some can.
        leader: The layer with whose heads these leave, because it computes something of every head for both; empty if
            they leave by themselves.
        followers: The layers whose heads leave with these.
    """

    count: int
    reader: str
    columns: HeadCut
    cuts: tuple[HeadCut, ...]
    attributes: tuple[Place, ...] = ()
    reason: str = ""
    leader: str = ""
    followers: tuple[str, ...] = ()

    def without(self, removed: Tensor) -> HeadLayout:
        """Return where heads are when some have left."""
        return replace(
            self,
            count=self.count - len(removed),
            columns=self.columns.without(removed)[1],
            cuts=tuple(cut.without(removed)[1] for cut in self.cuts),
        )


def layout_of(layer: nn.Module) -> HeadLayout | None:
    """Return where an attention layer's heads are; None if that was not observed."""
    noted: dict[str, Any] | None = layer.__dict__.get(_MARK)
    if noted is None:
        return None
    cuts = [HeadCut(*each) for each in noted["cuts"]]
    return HeadLayout(**{**noted, "columns": HeadCut(*noted["columns"]), "cuts": tuple(cuts)})


def note_layout(layer: nn.Module, layout: HeadLayout | None) -> None:
    """Note on a layer where its heads are, or nothing: in plain types, so that a pickled one needs nothing of ours."""
    if layout is None:
        layer.__dict__.pop(_MARK, None)
        return
    layer.__dict__[_MARK] = {
        **vars(layout),
        "columns": tuple(vars(layout.columns).values()),
        "cuts": [tuple(vars(cut).values()) for cut in layout.cuts],
    }


def tied(layouts: Mapping[str, HeadLayout]) -> dict[str, HeadLayout]:
    """Bring layers together that share something of every head, such as position biases that the first one computes.

    Args:
        layouts: By the layer's name, in the order in which they are called; each knows from whom it got something.
    """
    first: dict[str, str] = {}
    for name, layout in layouts.items():
        first[name] = first.get(layout.leader, layout.leader) or name
    found = dict(layouts)
    for name in layouts:
        members = [other for other in layouts if first[other] == first[name]]
        reasons = [layouts[member].reason for member in members if layouts[member].reason]
        if first[name] not in layouts or len({layouts[member].count for member in members}) > 1:
            reasons.append("it shares something of every head with layers that have other heads")
        leads = first[name] == name
        found[name] = replace(
            layouts[name],
            reason=layouts[name].reason or next(iter(reasons), ""),
            leader="" if leads else first[name],
            followers=tuple(members[1:]) if leads else (),
        )
    return found


def observed_names(model: nn.Module, named: Mapping[nn.Module, int]) -> dict[str, list[nn.Module]]:
    """Return the attention layers with whose heads those of named layers leave; nothing unless all named ones fit.

    Args:
        model: The model.
        named: How many heads the user says that layers have.
    """
    found: dict[str, list[nn.Module]] = {}
    for name, layer in model.named_modules():
        layout = layout_of(layer)
        if layout is not None and not layout.reason:
            own = [_owner(layer, cut.tensor)[0] for cut in layout.cuts if cut.tensor.endswith("weight")]
            fitting = [part for part in own if part in named and named[part] % layout.count == 0]
            found.setdefault(layout.leader or name, []).extend(fitting)
    held = {part for parts in found.values() for part in parts}
    return {name: parts for name, parts in found.items() if parts} if held.issuperset(named) else {}


class ObservedHeads(AttentionKind):
    """The heads of a layer that bears a note of where they are."""

    hidden = False

    def matches(self, layer: nn.Module) -> bool:
        """See `AttentionKind.matches`."""
        return _MARK in layer.__dict__

    def describe(self, name: str, model: nn.Module) -> ChannelGroup | None:
        """See `AttentionKind.describe`."""
        layout = layout_of(model.get_submodule(name))
        assert layout is not None
        if layout.leader and not layout.reason:
            return None  # its heads are its leader's
        if layout.reason:
            return ChannelGroup(name, layout.count, (), (_columns(layout),), "unsupported", layout.reason)
        producers: list[ChannelSlice] = []
        consumers, outside = [], 0
        for path in (name, *layout.followers):
            layer = model.get_submodule(path)
            own = layout_of(layer)
            assert own is not None
            listed, others = _parts(layer, own)
            producers += [
                ChannelSlice(f"{path}.{cut.tensor.removesuffix('.weight')}", cut.positions, cut.units) for cut in listed
            ]
            consumers.append(_columns(own))
            outside += others
        return ChannelGroup(name, layout.count, tuple(producers), tuple(consumers), unlisted_weights=outside)

    def remove(self, name: str, model: nn.Module, units: Tensor) -> None:
        """See `AttentionKind.remove`."""
        leader = layout_of(model.get_submodule(name))
        assert leader is not None
        for path in (name, *leader.followers):
            layer = model.get_submodule(path)
            layout = layout_of(layer)
            assert layout is not None
            cut_layer(layer, layout, units)
            cut_columns(model.get_submodule(layout.reader), layout, units)
            note_layout(layer, layout.without(units))


def _columns(layout: HeadLayout) -> ChannelSlice:
    return ChannelSlice(layout.reader, layout.columns.positions, layout.columns.units)


def _parts(layer: nn.Module, layout: HeadLayout) -> tuple[list[HeadCut], int]:
    """Return what heads lose of weights that compute channels, and how many other numbers belong to each."""
    listed, others = [], 0
    for cut in layout.cuts:
        owner, attribute = _owner(layer, cut.tensor)
        tensor: Tensor = getattr(owner, attribute)
        if isinstance(owner, READERS) and cut.dim == 0:
            listed += [cut] if attribute == "weight" else []
        elif isinstance(tensor, nn.Parameter):
            others += len(cut.positions) * tensor.numel() // tensor.shape[cut.dim]
    return listed, others // layout.count


def cut_layer(layer: nn.Module, layout: HeadLayout, units: Tensor, attributes: Sequence[Place] | None = None) -> None:
    """Remove heads from an attention layer, all but the columns of its reader.

    Args:
        layer: The layer; changed in place.
        layout: Where its heads are.
        units: Which of them go.
        attributes: Numbers to lower, by default those of the layout.
    """
    for cut in layout.cuts:
        _cut(layer, cut, units)
    left = layout.count - len(units)
    for path, attribute, place in layout.attributes if attributes is None else attributes:
        owner = layer.get_submodule(path)
        before = getattr(owner, attribute)
        if place < 0:
            setattr(owner, attribute, before // layout.count * left)
        else:
            lower = (*before[:place], before[place] // layout.count * left, *before[place + 1 :])
            setattr(owner, attribute, type(before)(lower) if type(before) in (tuple, torch.Size) else list(lower))


def cut_columns(reader: nn.Module, layout: HeadLayout, units: Tensor) -> None:
    """Remove from an output projection what it reads of some heads."""
    _cut(reader, layout.columns, units)


def _cut(module: nn.Module, cut: HeadCut, units: Tensor) -> None:
    owner, attribute = _owner(module, cut.tensor)
    tensor: Tensor = getattr(owner, attribute)
    kept = torch.ones(tensor.shape[cut.dim], dtype=torch.bool)
    kept[cut.without(units)[0]] = False
    places = torch.nonzero(kept).flatten()
    if isinstance(tensor, nn.Parameter):
        setattr(owner, attribute, part_of(tensor, cut.dim, places))
    else:
        setattr(owner, attribute, tensor.detach().index_select(cut.dim, places.to(tensor.device)))
    if attribute == "weight":
        _resize(owner, depthwise=hasattr(owner, "groups") and is_depthwise(owner))


def _resize(layer: Any, depthwise: bool) -> None:
    """Let a layer's sizes say what its weight is."""
    shape = layer.weight.shape
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif depthwise:
        layer.out_channels = layer.in_channels = layer.groups = shape[0]
    elif isinstance(layer, READERS):
        layer.out_channels, layer.in_channels = shape[:2]
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = shape[1]
    elif isinstance(layer, _NORMS):
        layer.num_features = shape[0]


def can_be_cut(module: nn.Module, cut: HeadCut) -> bool:
    """Whether a layer still works, and knows its sizes, when a parameter or buffer of it is cut."""
    owner, attribute = _owner(module, cut.tensor)
    if isinstance(owner, nn.modules.conv._ConvNd):
        plain = isinstance(owner, READERS) and not is_transposed(owner)
        return plain and cut.dim == 0 and (owner.groups == 1 or is_depthwise(owner))
    if isinstance(owner, nn.Linear | _NORMS):
        return cut.dim == 0
    if isinstance(owner, nn.Embedding):
        return cut.dim == 1
    return not type(owner).__module__.startswith("torch.") or attribute != "weight"


def is_statistic(module: nn.Module, path: str) -> bool:
    """Whether a buffer holds statistics of a batch norm, which torch does not differentiate for."""
    return isinstance(_owner(module, path)[0], _NORMS)


def statistics_of(module: nn.Module, cut: HeadCut) -> list[HeadCut]:
    """Return what a batch norm's statistics lose if its weight loses something."""
    owner, attribute = _owner(module, cut.tensor)
    if attribute != "weight" or not isinstance(owner, _NORMS):
        return []
    names = (name for name, buffer in owner.named_buffers() if buffer.dim() == 1)
    return [replace(cut, tensor=cut.tensor.removesuffix("weight") + name) for name in names]


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    above, _, name = path.rpartition(".")
    return module.get_submodule(above), name


@contextmanager
def heads_apart(model: nn.Module) -> Iterator[list[Tensor]]:
    """Cut every observed attention layer between what computes its heads and what reads them.

    Torch-Pruning follows autograd's nodes. Between the two it would tie heads, positions and windows to channels. So
    the reader's input has no history meanwhile, and what computes the heads is an output of the network.

    Yields:
        A list that gets these outputs.
    """
    computed: list[Tensor] = []
    handles = []
    for layer in model.modules():
        layout = layout_of(layer)
        if layout is None or layout.reason:
            continue
        reader = model.get_submodule(layout.reader)
        handles.append(reader.register_forward_pre_hook(lambda _, args: tuple(_without_history(args))))
        for cut in layout.cuts:
            owner, attribute = _owner(layer, cut.tensor)
            if isinstance(owner, READERS) and attribute == "weight":
                handles.append(owner.register_forward_hook(lambda _, __, output: computed.append(output)))
    try:
        yield computed
    finally:
        for handle in handles:
            handle.remove()


def _without_history(args: Sequence[Any]) -> list[Any]:
    return [each.detach() if isinstance(each, Tensor) else each for each in args]


def columns_of(reader: nn.Module, heads: int) -> HeadCut:
    """Return what a reader of heads that lie one after the other loses with each of them."""
    places = torch.arange(width_of(reader))
    return HeadCut("weight", 1, places, places // (len(places) // heads))


def width_of(reader: nn.Module) -> int:
    """Return how many channels a reader of heads reads."""
    weight = reader.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[1])


def channels_of(reader: nn.Module) -> int:
    """Return the dimension of a reader's input that runs over channels."""
    return -1 if isinstance(reader, nn.Linear) else channel_dimension(reader)
