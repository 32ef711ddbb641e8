"""What a pruned network's topology shows: which inputs matter, along which paths, and which are interchangeable.

Source: Zhang, Tao, Zhang, *Neural Network Pruning by Gradient Descent*, arXiv 2311.12526, where a network pruned to a
few connections is read as an explanation. The formulas are this project's choice, stated where they are computed.
Everything is read from the weights that are left: no data is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError, MissingExtraError
from gumbel_plugin.insight.connections import INPUT, OUTPUT, Connections, find_connections
from gumbel_plugin.insight.paths import path_gradients
from gumbel_plugin.shrinking.shrink import masked_copy

try:
    import networkx as nx
except ImportError as error:
    raise MissingExtraError("networkx", "report") from error

Masks: TypeAlias = "Mapping[str, Mapping[str, Tensor | None]]"
Node: TypeAlias = "tuple[str, int]"


@dataclass(frozen=True, eq=False)
class Importance:
    """How much each input can reach the outputs.

    Attributes:
        per_output: Path weight from each input to each output, (outputs, *input_shape), float64, not negative.
    """

    per_output: Tensor

    @property
    def total(self) -> Tensor:
        """The sum over the outputs, of the input's shape."""
        return self.per_output.sum(0)


@dataclass(frozen=True)
class Part:
    """A part of the network that shares no connection with the rest.

    Attributes:
        inputs: Numbers of the inputs that it reads.
        outputs: Numbers of the outputs that it computes.
        units: How many hidden units it has.
        connections: How many weights it has.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    units: int
    connections: int


@dataclass(frozen=True)
class Symmetry:
    """Inputs that the network treats alike, up to sign.

    Attributes:
        inputs: Their numbers, ascending.
        signs: The sign of each relative to the first: +1 if the network sees their sum, -1 if their difference.
        score: How alike the least alike of them is to the first; 1 is exact.
    """

    inputs: tuple[int, ...]
    signs: tuple[int, ...]
    score: float


def feature_importance(model: nn.Module, masks: Masks, input_shape: Sequence[int] | None = None) -> Importance:
    """Return the path weight of every input: Σ over its paths to an output of Π |weight| along the path.

    That is the gradient of the network with absolute weights, without biases, and with activations that let everything
    through (see `gumbel_plugin.insight.paths`), which is exact for every graph of layers: chains, residuals, branches.

    Args:
        model: The network; it is left alone. Weights that are zero already count as cut.
        masks: NNI's masks format; ``{}`` if they are in the weights.
        input_shape: Shape of one input, without the batch; by default what a first linear layer reads.

    Raises:
        ConfigError: If the shape is needed and missing.
        GraphError: If the network multiplies activations (attention, gates), so that weights on paths have no meaning.
        TargetError: If the masks do not fit.
    """
    network = masked_copy(model, masks)
    return Importance(path_gradients(network, _shape_of(network, input_shape)))


def pathways(model: nn.Module, masks: Masks, input_shape: Sequence[int] | None = None) -> nx.DiGraph:
    """Return the kept connections as a graph from the inputs through the hidden units to the outputs.

    Nodes are ``("input", i)``, ``(module name, unit)`` and ``("output", k)``. A unit is a number, or a channel where
    convolutions read it. Only what lies on a path from an input to an output is in the graph; all outputs are, and one
    without a path (a constant) stands alone. Each node knows its ``layer`` (the place in the forward, inputs 0, outputs
    last) and its ``part`` (the place in `disjoint_parts`); each edge its ``connections`` (how many weights it is), its
    ``weight`` (Σ |weight|) and its ``value`` (Σ weight). The graph knows its ``input_units``, those without a path
    included.

    Args:
        model: See `feature_importance`.
        masks: See `feature_importance`.
        input_shape: See `feature_importance`.

    Raises:
        ConfigError: If the shape is needed and missing.
        GraphError: If the network's forward cannot be followed.
        TargetError: If the masks do not fit.
    """
    network = masked_copy(model, masks)
    graph = _live_graph(find_connections(network, _shape_of(network, input_shape)))
    graph = _name_outputs(graph)
    for number, nodes in enumerate(_components(graph)):
        for node in nodes:
            graph.nodes[node]["part"] = number
    return graph


def disjoint_parts(graph: nx.DiGraph) -> list[Part]:
    """Return the weakly connected parts of a graph of `pathways`, in the order of their first outputs."""
    return [_describe(graph.subgraph(nodes)) for nodes in _components(graph)]


def symmetries(
    model: nn.Module, masks: Masks, input_shape: Sequence[int] | None = None, tolerance: float = 0.1
) -> list[Symmetry]:
    """Return the groups of inputs whose kept connections are interchangeable up to sign.

    Inputs i and j are, if they are connected to the same first hidden units and their weights there agree: with v the
    weights of an input's connections and s = ±1, the score 1 − ‖vᵢ − s·vⱼ‖ / (‖vᵢ‖ + ‖vⱼ‖) is at least 1 − tolerance.
    Exchanging such inputs (and, for s = −1, the sign of both) leaves the network's outputs as they are, exactly where
    the score is 1. Connections on no path to an output do not count.

    Args:
        model: See `feature_importance`.
        masks: See `feature_importance`.
        input_shape: See `feature_importance`.
        tolerance: How far from exact, in [0, 1).

    Returns:
        Groups of at least two, the most alike first; an input is in one group at most.

    Raises:
        ConfigError: If the shape is needed and missing, or the tolerance is out of range.
        GraphError: If the network's forward cannot be followed.
        TargetError: If the masks do not fit.
    """
    if not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance is {tolerance}; it must be at least 0 and less than 1")
    network = masked_copy(model, masks)
    columns = _input_columns(find_connections(network, _shape_of(network, input_shape)))
    patterns: dict[bytes, list[int]] = {}
    for number, column in enumerate(columns):
        if bool(column.any()):
            patterns.setdefault((column != 0).numpy().tobytes(), []).append(number)
    groups = [group for members in patterns.values() for group in _alike(columns, members, 1 - tolerance)]
    return sorted(groups, key=lambda group: (-group.score, group.inputs))


def _shape_of(network: nn.Module, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is not None:
        return tuple(given)
    layers = (module for module in network.modules() if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)))
    first = next(layers, None)
    if not isinstance(first, nn.Linear):
        kind = "no layer" if first is None else f"a {type(first).__name__}"
        raise ConfigError(f"input_shape is missing: the network starts with {kind}, whose weights do not determine it")
    return (first.in_features,)


def _live_graph(found: Connections) -> nx.DiGraph:
    """Return what lies on a path from an input to an output, and every output as a node of its own."""
    graph = nx.DiGraph(input_units=found.input_units)
    graph.add_nodes_from(((INPUT, number) for number in range(found.input_units)), layer=0)
    for place, layer in enumerate(found.layers, start=1):
        graph.add_nodes_from(((layer.name, unit) for unit in range(len(layer.weight))), layer=place)
        for source in layer.sources:
            _add_edges(graph, source, layer.name, layer.kernels(source))
    last = len(found.layers)
    outputs = [(OUTPUT, number) for number in range(found.output_units)]
    graph.add_nodes_from(outputs, layer=last + 1)
    for source, link in found.outputs.items():
        for output, unit in link.nonzero().tolist():
            weight = abs(float(link[output, unit]))
            graph.add_edge((source, unit), (OUTPUT, output), connections=0, weight=weight, value=1.0)
    inputs = [(INPUT, number) for number in range(found.input_units)]
    live = _reached(graph, inputs) & _reached(graph.reverse(copy=False), outputs)
    graph.remove_nodes_from([node for node in graph if node not in live and node[0] != OUTPUT])
    return graph


def _add_edges(graph: nx.DiGraph, source: str, target: str, kernels: Tensor) -> None:
    counts = (kernels != 0).sum(2)
    weights, values = kernels.abs().sum(2), kernels.sum(2)
    for unit, read in counts.nonzero().tolist():
        graph.add_edge(
            (source, read),
            (target, unit),
            connections=int(counts[unit, read]),
            weight=float(weights[unit, read]),
            value=float(values[unit, read]),
        )


def _reached(graph: nx.DiGraph, starts: Sequence[Node]) -> set[Node]:
    seen, waiting = set(starts), list(starts)
    while waiting:
        new = [node for node in graph[waiting.pop()] if node not in seen]
        seen.update(new)
        waiting += new
    return seen


def _name_outputs(graph: nx.DiGraph) -> nx.DiGraph:
    """Let a unit that is an output, and nothing else, be the output's node."""
    names: dict[Node, Node] = {}
    for node in [node for node in graph if node[0] == OUTPUT]:
        read = list(graph.predecessors(node))
        if len(read) == 1 and read[0][0] != INPUT and graph.out_degree(read[0]) == 1:
            names[read[0]] = node
    graph.remove_nodes_from(list(names.values()))
    graph = nx.relabel_nodes(graph, names)
    last = max((layer for node, layer in graph.nodes(data="layer") if node[0] != OUTPUT), default=0) + 1
    for node in graph:
        if node[0] == OUTPUT:
            graph.nodes[node]["layer"] = last
    return graph


def _components(graph: nx.DiGraph) -> list[set[Node]]:
    """Return the nodes of each weakly connected part; every part has an output."""
    parts = [set(nodes) for nodes in nx.weakly_connected_components(graph)]
    return sorted(parts, key=lambda nodes: min(number for name, number in nodes if name == OUTPUT))


def _describe(part: nx.DiGraph) -> Part:
    inputs, outputs = (tuple(sorted(n for name, n in part if name == kind)) for kind in (INPUT, OUTPUT))
    connections = sum(count for _, _, count in part.edges(data="connections"))
    return Part(inputs, outputs, len(part) - len(inputs) - len(outputs), connections)


def _input_columns(found: Connections) -> Tensor:
    """Return each input's weights into the first units that reach an output, or the outputs, (input units, weights)."""
    live = _live_graph(found)
    columns = [torch.zeros(found.input_units, 0, dtype=torch.float64)]
    for layer in found.layers:
        if INPUT in layer.sources:
            kernels = layer.kernels(INPUT)  # (out, inputs, elements)
            reaching = torch.tensor([(layer.name, unit) in live for unit in range(len(kernels))])
            columns.append((kernels * reaching[:, None, None]).transpose(0, 1).flatten(1))
    if INPUT in found.outputs:  # what reaches an output past all layers distinguishes inputs, too
        columns.append(found.outputs[INPUT].T)
    return torch.cat(columns, dim=1)


def _alike(columns: Tensor, members: Sequence[int], least: float) -> list[Symmetry]:
    """Group inputs of one pattern: each joins the first group whose first input it is alike to."""
    groups: list[tuple[list[int], list[int], list[float]]] = []
    for number in members:
        for inputs, signs, scores in groups:
            sign, score = _likeness(columns[inputs[0]], columns[number])
            if score >= least:
                inputs.append(number)
                signs.append(sign)
                scores.append(score)
                break
        else:
            groups.append(([number], [1], [1.0]))
    return [Symmetry(tuple(i), tuple(s), min(scores)) for i, s, scores in groups if len(i) > 1]


def _likeness(first: Tensor, second: Tensor) -> tuple[int, float]:
    sign = 1 if float(first @ second) >= 0 else -1
    apart = float(torch.linalg.vector_norm(first - sign * second))
    return sign, 1 - apart / float(torch.linalg.vector_norm(first) + torch.linalg.vector_norm(second))
