"""Torch-Pruning's dependency graph, read as channel groups: who computes the channels, and who reads them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from gumbel_plugin.errors import EquivalenceError, GraphError
from gumbel_plugin.masks.targets import ChannelGroup, ChannelSlice, columns_view, input_channels, output_dimension
from gumbel_plugin.shrinking.equivalence import verify_equivalence
from gumbel_plugin.shrinking.inputs import call_model, observing
from gumbel_torch_pruning.attention import find_heads, kind_of, opaque_attention, remove_heads
from gumbel_torch_pruning.exactness import Cut, Judge, Treatment
from gumbel_torch_pruning.repairs import PRUNERS, repaired_tracing

_ROOTS = (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR)


class DependencyGroups:
    """The channel groups of one model, and the physical removal of their units.

    A group is called exact if a `Judge` finds it so, and after a trial: units were removed from a copy of the model, and
    its outputs compared. What the model's code takes for granted (a fixed size in a reshape, say) comes out there. A
    graph with customized pruners cannot be built again for a copy; its groups have no trial.

    Example::

        dependency = DependencyGroups(copy.deepcopy(model), example_inputs)
        for group in dependency.groups:
            ...
        dependency.remove("layer1.0.conv1", torch.tensor([0, 3]))

    Attributes:
        model: The model that the graph was built on, and that `remove` changes.
        groups: The model's channel groups.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        graph: Any = None,
        ignored_layers: Sequence[nn.Module] = (),
        root_module_types: Sequence[type[nn.Module]] = _ROOTS,
        parts: Callable[[Any], int] | None = None,
    ) -> None:
        """Trace the model.

        Args:
            model: The plain model, without gates. Its train/eval flags and requires_grad are kept.
            example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.
            graph: A `torch_pruning.DependencyGraph` of the model that exists already; built here without it.
            ignored_layers: Layers that keep all their channels; their groups are left out.
            root_module_types: Layers whose output channels define a group.
            parts: Says of one of Torch-Pruning's groups into how many equal parts its channels fall that lose the same
                members, in addition to what grouped layers demand.

        Raises:
            GraphError: If the model's forward fails on the example inputs, or the graph cannot be built.
        """
        self.model = model
        self._names = {module: name for name, module in model.named_modules()}
        self.graph = graph or _build_graph(model, example_inputs)
        self._parts = parts
        self._roots: dict[str, tuple[nn.Module, int]] = {}
        self._judge = Judge(model, example_inputs, self._parameters(), self._treatments(opaque_attention=graph is None))
        found = self.graph.get_all_groups(list(ignored_layers), tuple(root_module_types))
        groups = [self._describe(group) for group in found]
        if graph is None:  # the heads of attention layers, which only `remove` can take out
            groups += find_heads(model)
        customized = set(self.graph.CUSTOMIZED_PRUNERS) - set(PRUNERS)
        self.groups = groups if customized else _tried(model, example_inputs, groups)

    def remove(self, name: str, units: Tensor) -> None:
        """Remove units of a group from the model, everywhere they appear.

        Args:
            name: The group's name.
            units: Unit numbers, int64.
        """
        if remove_heads(self.model, name, units):
            return
        group = self.pruning_group(name, units)
        flags = {id(parameter): parameter.requires_grad for parameter in self.model.parameters()}
        trainable = {name: flags[id(parameter)] for name, parameter in self.model.named_parameters()}
        group.prune()
        for parameter_name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trainable[parameter_name])

    def pruning_group(self, name: str, units: Tensor) -> Any:
        """Return Torch-Pruning's group that removes these units of a group."""
        root, size = self._roots[name]
        gone = set(units.tolist())
        positions = [channel for channel in range(_channels(root)) if channel % size in gone]
        return self.graph.get_pruning_group(root, self.graph.get_pruner_of_module(root).prune_out_channels, positions)

    def _describe(self, group: Any) -> ChannelGroup:
        """Translate one of Torch-Pruning's groups; the graph's own objects do not leave this file."""
        root = group[0].dep.target.module
        name = self._names[root]
        size = _channels(root) // self._coupled(group)
        self._roots[name] = (root, size)
        producers: list[ChannelSlice] = []
        consumers: list[ChannelSlice] = []
        cuts: list[Cut] = []
        for item in group.items:
            module = item.dep.target.module
            positions, units = torch.tensor(item.idxs), torch.tensor(item.root_idxs) % size
            if module in self.graph._param_to_name:
                cuts.append(((self.graph._param_to_name[module], False), positions, units))
            elif module not in self._names:
                continue
            elif self._reads(item.dep):
                consumers.append(ChannelSlice(self._names[module], positions, units))
            elif isinstance(getattr(module, "weight", None), Tensor) and self._width(module) is not None:
                producers.append(ChannelSlice(self._names[module], positions, units))
        cuts += [((part.module, False), part.positions, part.units) for part in producers]
        cuts += [((part.module, True), part.positions, part.units) for part in consumers]
        safety, reason = self._judge.verdict(cuts)
        if safety == "exact":
            safety, reason = self._check_parts(size, producers, consumers)
        return ChannelGroup(name, size, tuple(producers), tuple(consumers), safety, reason)  # type: ignore[arg-type]

    def _parameters(self) -> dict[nn.Parameter, tuple[str, int]]:
        """Return the parameters that belong to no layer which Torch-Pruning knows, and where it would cut them."""
        graph = self.graph
        used = ((each, dim) for each, dim in graph.unwrapped_parameters if each in graph.module2node)
        return {parameter: (graph._param_to_name[parameter], dim) for parameter, dim in used}

    def _treatments(self, opaque_attention: bool) -> dict[nn.Module, Treatment]:
        """Return what is known of layers that are none of torch's own."""
        treatments: dict[nn.Module, Treatment] = {}
        for module in self._names:
            if type(module) in PRUNERS:
                treatments[module] = "each"
            elif module in self.graph.CUSTOMIZED_PRUNERS or type(module) in self.graph.CUSTOMIZED_PRUNERS:
                treatments[module] = "foreign"
            elif opaque_attention and kind_of(module) is not None:
                treatments[module] = "opaque"
        return treatments

    def _reads(self, dep: Any) -> bool:
        """Whether a dependency prunes the input channels of a layer that sums over them."""
        module = dep.target.module
        if not isinstance(module, _ROOTS) or dep.target.type == tp.ops.OPTYPE.DEPTHWISE_CONV:
            return False
        pruner = self.graph.get_pruner_of_module(module)
        return bool(dep.handler == pruner.prune_in_channels)

    def _width(self, module: nn.Module) -> int | None:
        """Return how many output channels a module has; None for a PReLU with one slope for all."""
        width: int | None = self.graph.get_pruner_of_module(module).get_out_channels(module)
        return width

    def _coupled(self, group: Any) -> int:
        """Return into how many equal parts the channels fall that must lose the same members (grouped layers)."""
        parts = 1 if self._parts is None else self._parts(group)
        for item in group.items:
            module = item.dep.target.module
            if isinstance(module, tp.ops.TORCH_CONV) and module.groups > 1:
                if item.dep.target.type != tp.ops.OPTYPE.DEPTHWISE_CONV:
                    parts = max(parts, module.groups)
            elif isinstance(module, nn.GroupNorm):
                parts = max(parts, module.num_groups)
        return parts

    def _check_parts(
        self, size: int, producers: Sequence[ChannelSlice], consumers: Sequence[ChannelSlice]
    ) -> tuple[str, str]:
        if not consumers:
            return "unsupported", "no convolution or linear layer reads it"
        if size < 2:
            return "unsupported", "it has one unit, which must stay"
        modules = dict(self.model.named_modules())
        for part in (*producers, *consumers):
            module = modules[part.module]
            width = input_channels(module) if part in consumers else self._width(module)
            if width is None or int(part.positions.max()) >= width:
                return "unsupported", f"Torch-Pruning does not find its channels in {part.module}"
            if output_dimension(module) is None:
                return "unsupported", f"{part.module} is a grouped transposed convolution, which cannot be cut"
        return "exact", ""


def find_groups(model: nn.Module, example_inputs: Any) -> list[ChannelGroup]:
    """Return the channel groups of a model, which is left as it is.

    Args:
        model: The plain model.
        example_inputs: A tensor, a tuple of positional inputs, or a dict of keyword inputs.

    Raises:
        GraphError: If the model's forward fails on the example inputs, or the graph cannot be built.
    """
    return DependencyGroups(copy.deepcopy(model), example_inputs).groups


def _tried(model: nn.Module, example_inputs: Any, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Return the groups with those marked whose units cannot be removed exactly."""
    exact = [group for group in groups if group.safety == "exact"]
    faults = {group.name: group for group in _faulty(model, example_inputs, exact)}
    return [faults.get(group.name, group) for group in groups]


def _faulty(model: nn.Module, example_inputs: Any, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Return the groups that fail a trial, marked; those that do not are tried together."""
    safety, reason = _trial(model, example_inputs, groups) if groups else ("exact", "")
    if safety == "exact":
        return []
    if len(groups) == 1:
        return [replace(groups[0], safety=safety, reason=reason)]  # type: ignore[arg-type]
    halves = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    return [group for half in halves for group in _faulty(model, example_inputs, half)]


def _trial(model: nn.Module, example_inputs: Any, groups: Sequence[ChannelGroup]) -> tuple[str, str]:
    """Remove about half of the units of some groups from a copy; return how safe that is, and why it is not exact."""
    generator = torch.Generator().manual_seed(0)
    masked = copy.deepcopy(model)
    _shake(masked, generator)
    closed = {group.name: _odd_half(group.size, generator) for group in groups}
    for group in groups:
        _close(masked, group, closed[group.name])
    small = copy.deepcopy(masked)
    try:
        graph = _build_graph(small, example_inputs)
        for group in groups:
            if remove_heads(small, group.name, closed[group.name]):
                continue
            root = small.get_submodule(group.name)
            part = next(part for part in group.producers if part.module == group.name)
            positions = part.positions[torch.isin(part.units, closed[group.name])].tolist()
            prune = graph.get_pruner_of_module(root).prune_out_channels
            graph.get_pruning_group(root, prune, positions).prune()
        report = verify_equivalence(masked, small, example_inputs, samples=1, dtypes=(torch.float64,))
    except EquivalenceError as error:
        return "unsupported", f"without some of its units the outputs have another form: {error}"
    except Exception as error:
        return "unsupported", f"the model does not run without some of its units: {error}"
    return ("exact", "") if report.passed else ("inexact", "something mixes these channels before they are read")


def _odd_half(size: int, generator: torch.Generator) -> Tensor:
    """Return about half of the units, at random.

    Their number has no factor in common with the size, so that units which really belong together in pairs or triples
    (the parts of a `chunk`) are torn apart.
    """
    numbers = [number for number in range(1, size) if math.gcd(number, size) == 1]
    return torch.randperm(size, generator=generator)[: min(numbers, key=lambda number: abs(number - size / 2))]


@torch.no_grad()
def _shake(model: nn.Module, generator: torch.Generator) -> None:
    """Add noise to every parameter: one that starts at zero or is constant would hide what it multiplies."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() > 0:
            scale = 0.3 * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)


@torch.no_grad()
def _close(model: nn.Module, group: ChannelGroup, units: Tensor) -> None:
    """Zero what the consumers read of these units, and make the units themselves loud: nobody else should hear."""
    for part in (*group.producers, *group.consumers):
        module = model.get_submodule(part.module)
        weight, chosen = module.weight, part.positions[torch.isin(part.units, units)]
        assert isinstance(weight, Tensor)
        if part in group.consumers:
            factors = torch.ones(input_channels(module)).index_fill(0, chosen, 0.0)
            weight.mul_(columns_view(module, factors).to(weight))
        else:
            dimension = output_dimension(module)
            assert dimension is not None
            factors = torch.ones(weight.shape[dimension]).index_fill(0, chosen, 4.0).to(weight)
            weight.mul_(factors.reshape([-1 if d == dimension else 1 for d in range(weight.dim())]))


def _build_graph(model: nn.Module, example_inputs: Any) -> Any:
    with _traceable(model), opaque_attention(model), repaired_tracing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_forward(model, example_inputs)
        try:
            return tp.DependencyGraph().build_dependency(
                model,
                example_inputs,
                forward_fn=_forward,
                output_transform=mark_outputs,
                customized_pruners={kind: pruner() for kind, pruner in PRUNERS.items()},
                verbose=False,
            )
        except Exception as error:
            raise GraphError(f"Torch-Pruning cannot build the dependency graph: {error!r}") from error


def check_forward(model: nn.Module, example_inputs: Any) -> None:
    """Run the model once, in eval mode.

    Raises:
        GraphError: If its forward fails on the example inputs.
    """
    try:
        with observing(model):
            call_model(model, example_inputs)
    except Exception as error:
        raise GraphError(f"the model's forward fails on the example inputs: {error}") from error


def _forward(model: nn.Module, example_inputs: Any) -> Any:
    return call_model(model, example_inputs)


def mark_outputs(outputs: Any) -> list[Tensor]:
    """Give every output a node of its own: a final layer alone is not recognised as an output."""
    tensors: list[Tensor] = [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [tensor.clone() for tensor in tensors if tensor.grad_fn is not None]


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Let autograd see every parameter, in eval mode; restore all flags afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with observing(model), torch.enable_grad():
        for parameter in flags:
            parameter.requires_grad_(parameter.is_floating_point())
        try:
            yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)


def _channels(module: nn.Module) -> int:
    channels = getattr(module, "out_channels", getattr(module, "out_features", None))
    assert isinstance(channels, int)
    return channels
