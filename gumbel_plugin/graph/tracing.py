"""What surrounds Torch-Pruning's tracing of a user's model: how it is called, and that it is left as it was."""

from __future__ import annotations

import itertools
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from gumbel_plugin.errors import GraphError, GumbelPluginError, LifecycleError, shorten
from gumbel_plugin.graph.attention_heads import is_hidden, is_known, opaque_attention
from gumbel_plugin.graph.exactness import ExactnessAnalysis, Treatment
from gumbel_plugin.graph.guarded_graph import GuardedGraph, number_channels
from gumbel_plugin.graph.input_major_pruner import InputMajorPruner
from gumbel_plugin.graph.observed_heads import observe_heads
from gumbel_plugin.graph.observed_kind import heads_apart, observed_names
from gumbel_plugin.graph.tracing_repairs import CHANNELWISE_PRUNERS, repaired_tracing
from gumbel_plugin.graph.view_outputs import own_outputs
from gumbel_plugin.layers.example_inputs import call_model, checked_inputs, observing
from gumbel_plugin.layers.kept_tensors import forgetting_tensors
from gumbel_plugin.layers.weights import is_gate

Forward = Callable[[nn.Module, Any], Any]
"""What Torch-Pruning takes as ``forward_fn``: gets the model and the example inputs, returns the outputs."""


class _Through:
    """A model's forward while example inputs go through a function of the user's.

    It is set on the model itself, so that copies of the model, and all that calls them, go the same way.
    """

    def __init__(self, model: nn.Module, function: Forward, example_inputs: Any) -> None:
        self._model = model
        self._function = function
        self._kind = type(example_inputs)
        self._inside = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._inside:  # the function's own call of the model
            return type(self._model).forward(self._model, *args, **kwargs)
        inputs = args[0] if issubclass(self._kind, Tensor) else kwargs or self._kind(args)
        self._inside = True
        try:
            return self._function(self._model, inputs)
        finally:
            self._inside = False


@contextmanager
def calling(model: nn.Module, function: Forward | None, example_inputs: Any) -> Iterator[None]:
    """Let whoever calls the model, or a copy of it, on example inputs call this function instead.

    Args:
        model: The model.
        function: What calls it; None leaves everything as it is.
        example_inputs: Their type tells how to put the arguments of a call together again.
    """
    if function is None:
        yield
        return
    before = model.__dict__.get("forward")
    model.forward = _Through(model, function, example_inputs)
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


@contextmanager
def traceable(
    model: nn.Module, example_inputs: Any, named_heads: Mapping[nn.Module, int] | None = None
) -> Iterator[None]:
    """Let autograd see every parameter, in eval mode; frozen layers would be missing in the graph otherwise.

    The forward that Torch-Pruning traces is also the one in which the exactness analysis follows channels.

    Args:
        model: The model.
        example_inputs: What it is traced with.
        named_heads: How many heads layers have that the user named. Where these are not observed, what known attention
            layers do inside is shown.

    Raises:
        ConfigError: If nothing can be traced with the inputs, see `checked_inputs`.
        GraphError: If the model's forward fails on the example inputs, or the graph cannot be built.
    """
    checked_inputs(example_inputs)
    observe_heads(model, example_inputs, is_known, named_heads or {})
    own_attention = bool(named_heads) and not observed_names(model, named_heads or {})
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    inside = nullcontext() if own_attention else opaque_attention(model)
    try:
        with (
            warnings.catch_warnings(),
            forgetting_tensors(model),
            observing(model),
            torch.enable_grad(),
            inside,
            repaired_tracing(),
            _analyzed(not own_attention),
        ):
            warnings.filterwarnings("ignore", "Unwrapped parameters detected")  # the exactness analysis judges them
            for parameter in flags:
                parameter.requires_grad_(parameter.is_floating_point())
            yield
    except GumbelPluginError:
        raise
    except Exception as error:
        _require_forward(model, example_inputs)
        raise GraphError(f"Torch-Pruning cannot build the dependency graph: {reason_of(error)}") from error
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def _analyzed(opaque: bool) -> Iterator[None]:
    """Guard every graph that is traced meanwhile; an `ExactnessAnalysis` follows its forward, see `analysis_of`."""
    original = tp.DependencyGraph._trace

    def trace(graph: Any, model: nn.Module, example_inputs: Any, forward: Forward, **keys: Any) -> Any:
        GuardedGraph.guard(graph)
        analysis = graph.analysis = _new_analysis(graph, opaque)

        def followed(*args: Any) -> Any:
            with heads_apart(model) as computed:
                output = analysis.follow(lambda: forward(*args))
            return (output, computed) if computed else output

        with own_outputs(graph, model):
            return original(graph, model, example_inputs, followed, **keys)

    tp.DependencyGraph._trace = trace
    try:
        yield
    finally:
        tp.DependencyGraph._trace = original


def analysis_of(graph: Any, example_inputs: Any, opaque: bool) -> ExactnessAnalysis:
    """Return what is known of the channels of a graph's model, from its trace or, if it was cut since, from a forward.

    Args:
        graph: A `torch_pruning.DependencyGraph`, built in `traceable`.
        example_inputs: What the model is called with.
        opaque: Whether known attention layers are not looked into.
    """
    analysis: ExactnessAnalysis | None = graph.__dict__.pop("analysis", None)
    if analysis is None:
        analysis = _new_analysis(graph, opaque)
        with forgetting_tensors(graph.model), observing(graph.model):
            analysis.follow(lambda: call_model(graph.model, example_inputs))
    return analysis


def _new_analysis(graph: Any, opaque: bool) -> ExactnessAnalysis:
    parameters = {parameter: (graph._param_to_name[parameter], dim) for parameter, dim in graph.unwrapped_parameters}
    treatments: dict[nn.Module, Treatment] = {}
    for module in graph.model.modules():
        if isinstance(graph.get_pruner_of_module(module), CHANNELWISE_PRUNERS):
            treatments[module] = "each"
        elif isinstance(graph.get_pruner_of_module(module), InputMajorPruner):
            continue  # a linear layer like any other
        elif module in graph.CUSTOMIZED_PRUNERS or type(module) in graph.CUSTOMIZED_PRUNERS:
            treatments[module] = "foreign"
        elif opaque and is_hidden(module):
            treatments[module] = "opaque"
    return ExactnessAnalysis(graph.model, parameters, treatments)


def _require_forward(model: nn.Module, example_inputs: Any) -> None:
    """Run the model once, in eval mode.

    Raises:
        GraphError: If its forward fails on the example inputs.
    """
    try:
        with forgetting_tensors(model), observing(model):
            call_model(model, example_inputs)
    except Exception as error:
        raise GraphError(f"the model's forward fails on the example inputs: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Return an error's kind, text and place: the innermost line of code that is not torch's own."""
    inside_torch = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((inside_torch, "<"))]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {shorten(text, 600)}{place}"


def catch_up(graph: Any, replaced: Mapping[int, nn.Parameter]) -> None:
    """Bring a dependency graph up to date after something was removed, where Torch-Pruning forgets to.

    Args:
        graph: The graph.
        replaced: The new parameters by the ids of the old ones.
    """
    pairs = [(replaced.get(id(parameter), parameter), dim) for parameter, dim in graph.unwrapped_parameters]
    graph.unwrapped_parameters = pairs
    graph._param_to_name = {replaced.get(id(each), each): name for each, name in graph._param_to_name.items()}
    for node in graph.module2node.values():
        if node.type == tp.ops.OPTYPE.SPLIT and node.module.split_sizes is not None:  # unknown sizes stay unknown
            node.module.offsets = [0, *itertools.accumulate(node.module.split_sizes)]
    number_channels(graph)  # where the pieces of a concatenation begin


def shared_parts(graph: Any) -> dict[int, Any]:
    """Return what copies of a dependency graph share with it, as the memo of a deep copy.

    Autograd's nodes and modules cannot be copied, and the graph's pruning functions are compared by identity.
    """
    parts = [graph.ops, *graph.REGISTERED_PRUNERS.values(), *graph.CUSTOMIZED_PRUNERS.values()]
    parts += [node.grad_fn for node in graph.module2node.values()]
    return {id(part): part for part in parts}


class Structure:
    """Which layers a model had, of which shapes, when gates were attached."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = _layers(model)

    def check(self, model: nn.Module) -> None:
        """Compare with the model's layers as they are now.

        Raises:
            LifecycleError: If one was added, removed, replaced or reshaped.
        """
        now = _layers(model)
        for name in {**self._layers, **now}:
            (layer, shapes), (known, known_shapes) = now.get(name, (None, ())), self._layers.get(name, (None, ()))
            if layer is not known or shapes != known_shapes:
                raise LifecycleError(
                    f"the model's layer {name!r} was added, removed, replaced or reshaped after the gates were "
                    "attached; build a new pruner on the changed model"
                )


def _layers(model: nn.Module) -> dict[str, tuple[nn.Module, tuple[torch.Size, ...]]]:
    return {
        name: (module, tuple(parameter.shape for parameter in module.parameters(recurse=False)))
        for name, module in model.named_modules()
        if not is_gate(name)
    }
