"""Observes where attention heads are: what each block of an output projection's columns depends on.

No class and no name has to be known. A layer in which a softmax is computed is called once, with gradients; a head's
columns of what the output projection reads depend on that head's rows of the projections (however these are packed),
of biases, of tables, and on no others. Then the layer is tried with fewer heads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gumbel_plugin.graph.attention_at_work import PlainAttention, Softmaxes, dependencies
from gumbel_plugin.graph.exactness.empirical_check import double_copy, perturb
from gumbel_plugin.graph.head_attributes import Call, find_attributes, is_argument
from gumbel_plugin.graph.observed_kind import (
    READERS,
    HeadCut,
    HeadLayout,
    can_be_cut,
    channels_of,
    columns_of,
    is_statistic,
    note_layout,
    observed_names,
    statistics_of,
    tied,
    width_of,
)
from gumbel_plugin.layers.example_inputs import call_model, observing, random_inputs_like
from gumbel_plugin.layers.geometry import groups_of
from gumbel_plugin.layers.kept_tensors import forgetting_tensors
from gumbel_plugin.layers.precision import computing_in

_logger = logging.getLogger(__name__)


def observe_heads(
    model: nn.Module, example_inputs: Any, known: Callable[[nn.Module, str], bool], named: Mapping[nn.Module, int]
) -> None:
    """Note on every attention layer of a model where its heads are, if that can be observed.

    Args:
        model: The model; nothing else is changed.
        example_inputs: They give the shapes of the inputs.
        known: Whether a layer is an attention layer of a known kind, which is left alone.
        named: How many heads the user says that layers have. Where these are not observed, nothing is noted.
    """
    for layer in model.modules():
        note_layout(layer, None)
    try:
        with forgetting_tensors(model):
            suspects = _suspects(model, example_inputs, known)
        layouts = _observed(double_copy(model), example_inputs, suspects, [*named.values()]) if suspects else {}
    except Exception as error:  # a network may do anything; its heads stay whole then, as the warning of none says
        _logger.debug("no heads were observed: %s", error, exc_info=True)
        return
    for name, layout in layouts.items():
        note_layout(model.get_submodule(name), layout)
    if named and not observed_names(model, named):
        for layer in model.modules():
            note_layout(layer, None)


@dataclass(eq=False)
class _Suspect:
    """A layer that may be an attention layer.

    Attributes:
        name: Its name.
        reader: The name of the layer that reads what was attended.
        counts: How many heads it may have, the likeliest first.
    """

    name: str
    reader: str = ""
    counts: list[int] = field(default_factory=list)


# Where attention is computed ------------------------------------------------------------------------------------------


def _suspects(model: nn.Module, example_inputs: Any, known: Callable[[nn.Module, str], bool]) -> list[_Suspect]:
    """Return the layers in which a softmax is computed and that have projections, each with who reads it next."""
    matrices = {
        name for name, module in model.named_modules() if isinstance(module, READERS) and groups_of(module) == 1
    }
    owners = {name for name, module in model.named_modules() if any(m is not module for m in _matrices(module))}
    above: list[str] = []
    found: dict[str, _Suspect] = {}
    waiting: list[_Suspect] = []

    def meet(heads: int) -> None:
        owner = next((name for name in reversed(above) if name in owners), "")
        if owner and not any(known(model, name) for name in above if name):
            suspect = found.setdefault(owner, _Suspect(owner))
            suspect.counts += [heads] if heads else []
            waiting.append(suspect)

    def enter(name: str) -> None:
        above.append(name)
        if name in matrices:
            width = width_of(model.get_submodule(name))
            reading = [suspect for suspect in waiting if width not in suspect.counts]  # it is no mixer of heads
            for suspect in reading:
                suspect.reader = name
                waiting.remove(suspect)

    with _entered(model, enter, above.pop), observing(model), Softmaxes(meet):
        call_model(model, example_inputs)
    return [suspect for suspect in found.values() if suspect.reader and 1 not in suspect.counts]


def _matrices(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if isinstance(part, READERS))


@contextmanager
def _entered(model: nn.Module, enter: Callable[[str], None], leave: Callable[[], Any]) -> Iterator[None]:
    """Tell of every module that is called, and of its end."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        handles.append(module.register_forward_hook(lambda *_: leave() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# What each head depends on --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Seen:
    """One call of a suspect: how it was called, and what its heads use of each tensor.

    Attributes:
        call: The call.
        used: For tensors of the layer, by path, and of its arguments, by number: which entries (columns) along each
            dimension each head (rows) depends on.
        sources: Of arguments that another suspect returned, by number, that suspect's name.
    """

    call: Call
    used: Mapping[str | int, Sequence[Tensor]]
    sources: Mapping[int, str]


def _observed(
    model: nn.Module, example_inputs: Any, suspects: Sequence[_Suspect], counts: Sequence[int]
) -> dict[str, HeadLayout]:
    """Return where the heads of suspects are, by name; the model is a float64 copy that may be changed."""
    generator = torch.Generator().manual_seed(0)
    perturb(model, generator)
    inputs = random_inputs_like(example_inputs, generator, torch.float64)
    seen: dict[str, list[tuple[int, _Seen]]] = {}
    with observing(model), computing_in(torch.float64), torch.enable_grad():
        with _probed(model, suspects, counts, seen), PlainAttention():
            call_model(model, inputs)
        found = {}
        for suspect in suspects:
            layout = _layout(model, suspect, seen.get(suspect.name, ()))
            if layout is not None:
                found[suspect.name] = layout
    return tied(found)


@contextmanager
def _probed(
    model: nn.Module, suspects: Sequence[_Suspect], counts: Sequence[int], seen: dict[str, list[tuple[int, _Seen]]]
) -> Iterator[None]:
    """Note of the first call of every suspect what its heads depend on."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    returned: dict[int, tuple[str, Tensor]] = {}
    probes = [_Probe(model, suspect, counts, seen, returned) for suspect in suspects]
    handles = [handle for probe in probes for handle in probe.handles()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Probe:
    """Hooks around one suspect: its inputs become leaves, and the reader's input is differentiated."""

    def __init__(
        self,
        model: nn.Module,
        suspect: _Suspect,
        counts: Sequence[int],
        seen: dict[str, list[tuple[int, _Seen]]],
        returned: dict[int, tuple[str, Tensor]],
    ) -> None:
        self._layer, self._reader = model.get_submodule(suspect.name), model.get_submodule(suspect.reader)
        self._suspect, self._seen, self._returned = suspect, seen, returned
        self._sources: dict[int, str] = {}
        self._counts = _possible_counts(self._layer, width_of(self._reader), [*counts, *suspect.counts])
        self._call: Call | None = None
        self._leaves: dict[str | int, Tensor] = {}

    def handles(self) -> list[Any]:
        """Register the hooks."""
        return [
            self._layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._layer.register_forward_hook(self._leave),
            self._reader.register_forward_pre_hook(self._read),
        ]

    def _enter(self, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self._call = Call(*tree_map(_without_history, (args, kwargs)))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if is_argument(leaf)]
        known = [(place, self._returned.get(id(leaf))) for place, leaf in enumerate(given)]
        self._sources = {place: each[0] for place, each in known if each is not None}
        args, kwargs = tree_map(_as_leaf, (self._call.args, self._call.kwargs))
        own = [*layer.named_parameters(), *(each for each in layer.named_buffers() if not is_statistic(layer, each[0]))]
        self._leaves = {name: tensor.requires_grad_(True) for name, tensor in own if tensor.is_floating_point()}
        self._leaves.update(enumerate(leaf for leaf in tree_leaves((args, kwargs)) if is_argument(leaf)))
        return args, kwargs

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._returned[id(leaf)] = self._suspect.name, leaf

    def _read(self, reader: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._call is None or not args or not args[0].requires_grad or self._suspect.name in self._seen:
            return None
        tensors = {name: tensor for name, tensor in self._leaves.items() if tensor.requires_grad}
        for heads in self._counts:
            used = dependencies(args[0], channels_of(reader), heads, tensors)
            self._seen.setdefault(self._suspect.name, []).append((heads, _Seen(self._call, used, self._sources)))
            if _units(used, heads).max() > 0:
                break
        return (args[0].detach(), *args[1:])


def _possible_counts(layer: nn.Module, width: int, likely: Sequence[int]) -> list[int]:
    """Return how many heads a layer may have, the likeliest first."""
    noted = [
        value
        for module in layer.modules()
        for key, value in vars(module).items()
        if isinstance(value, int) and not isinstance(value, bool) and "head" in key and "dim" not in key
    ]
    sizes = [width // value for key, value in vars(layer).items() if key.startswith("head_") and _divides(value, width)]
    return [n for n in dict.fromkeys([*likely, *noted, *sizes]) if 1 < n <= width and width % n == 0]


def _divides(value: Any, width: int) -> bool:
    return isinstance(value, int) and value > 0 and width % value == 0


def _without_history(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _as_leaf(leaf: Any) -> Any:
    return leaf.detach().requires_grad_(True) if is_argument(leaf) else leaf


# Which heads belong together ------------------------------------------------------------------------------------------


def _by_head(used: Sequence[Tensor]) -> list[int]:
    """Return the dimensions of a tensor along which heads depend on different entries."""
    return [dim for dim, each in enumerate(used) if not bool((each.any(0) == each.all(0)).all())]


def _units(used: Mapping[str | int, Sequence[Tensor]], heads: int) -> Tensor:
    """Return the unit of every head: heads that share an entry of a tensor, but not all of them do, leave together."""
    unit = torch.arange(heads)
    for dims in used.values():
        for dim in _by_head(dims):
            entries = dims[dim][:, ~dims[dim].all(0)].T
            for entry in torch.unique(entries, dim=0):
                if int(entry.sum()) > 1:
                    members = unit[entry]
                    unit[torch.isin(unit, members)] = members.min()
    numbered: Tensor = torch.unique(unit, return_inverse=True)[1]
    return numbered


def _layout(model: nn.Module, suspect: _Suspect, seen: Sequence[tuple[int, _Seen]]) -> HeadLayout | None:
    """Return where the heads of a layer are; None if it has none."""
    if not seen:
        return None
    heads, last = seen[-1]
    layer, reader = model.get_submodule(suspect.name), model.get_submodule(suspect.reader)
    unit = _units(last.used, heads)
    count = int(unit.max()) + 1
    columns = columns_of(reader, heads)
    columns = replace(columns, units=unit[columns.units])
    cuts, given, reason = _cuts(layer, last.used, unit)
    layout = HeadLayout(count, suspect.reader, columns, tuple(cuts))
    sources = {last.sources.get(int(cut.tensor), "") for cut in given}
    if not cuts:
        return None
    if count == 1 or not any(_is_projection(layer, cut) for cut in cuts):
        reason = "every head depends on what all of them compute: they are mixed, or normalized together"
    elif len(torch.unique(unit.bincount())) > 1:
        reason = "its heads share keys and values in groups of different sizes"
    elif "" in sources or len(sources) > 1:
        reason = "what it is given has a part for every head, and is computed elsewhere"
    if reason:
        return replace(layout, reason=reason)
    return _tried(layer, replace(layout, leader="".join(sources)), last.call.without(given), _inside(suspect))


def _tried(layer: nn.Module, layout: HeadLayout, call: Call, inside: str | None) -> HeadLayout:
    """Return a layout with the numbers that count heads, or why it does not work."""
    with torch.no_grad():
        attributes = find_attributes(layer, layout, call, inside)
    if attributes is None:
        kind = type(layer).__name__
        why = "a size is written into it, shared with other layers, or taken from its input"
        return replace(layout, reason=f"the forward of {kind} does not work with fewer heads: {why}")
    return replace(layout, attributes=attributes)


def _inside(suspect: _Suspect) -> str | None:
    prefix = f"{suspect.name}."
    return suspect.reader.removeprefix(prefix) if suspect.reader.startswith(prefix) else None


def _cuts(
    layer: nn.Module, used: Mapping[str | int, Sequence[Tensor]], unit: Tensor
) -> tuple[list[HeadCut], list[HeadCut], str]:
    """Return what leaves a layer's tensors and what it is given with its heads, and why that is not possible."""
    cuts: list[HeadCut] = []
    given: list[HeadCut] = []
    reason = ""
    for key, dims in used.items():
        along = _by_head(dims)
        if not along:
            continue
        entries = dims[along[0]]
        own = ~entries.all(0)
        positions = torch.nonzero(own).flatten()
        cut = HeadCut(str(key), along[0], positions, unit[entries[:, own].int().argmax(0)])
        if len(along) > 1 or bool((own & ~entries.any(0)).any()):
            reason = f"{_called(key)} belongs to its heads in no way that is known"
        elif isinstance(key, str) and not can_be_cut(layer, cut):
            reason = f"{key} has a part for every head, and cannot be cut"
        elif len(torch.unique(cut.units.bincount(minlength=int(unit.max()) + 1))) > 1:
            reason = f"{_called(key)} has parts of different sizes for its heads"
        if isinstance(key, int):
            given.append(cut)
        else:
            cuts += [cut, *statistics_of(layer, cut)]
    return cuts, given, reason


def _is_projection(layer: nn.Module, cut: HeadCut) -> bool:
    above, _, attribute = cut.tensor.rpartition(".")
    return attribute == "weight" and isinstance(layer.get_submodule(above), READERS)


def _called(key: str | int) -> str:
    return key if isinstance(key, str) else "what it is given"
