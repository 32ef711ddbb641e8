"""NNI's ModelSpeedup, made exact: what nobody reads any more leaves the network, and nothing else does."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from nni.compression.speedup import ModelSpeedup
from nni.compression.speedup.mask_updater import NoChangeMaskUpdater
from nni.compression.speedup.replacement import convert_to_coarse_mask
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError, GraphError
from gumbel_plugin.graph.channel_groups import ChannelGroup
from gumbel_plugin.graph.dependency_groups import DependencyGroups
from gumbel_plugin.layers.example_inputs import ExampleInputs, call_model, observing
from gumbel_plugin.layers.geometry import columns_view, input_channels, input_dimension
from gumbel_plugin.shrinking.shrink import masked_copy

Masks = dict[str, Tensor]
_logger = logging.getLogger(__name__)

# NNI takes a tensor for batched if its size is a multiple of the batch size: a prime mistakes fewer than NNI's 8. A few
# samples are enough where only exact zeros count, and memory grows with them.
_BATCH_SIZE = 5
# The modules whose input channels NNI can remove.
_SHRINKABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


def remove_by_nni(
    dependency: DependencyGroups,
    dead: Mapping[str, Tensor],
    example_inputs: ExampleInputs,
    remove: Callable[[], nn.Module],
) -> nn.Module:
    """Remove dead units as an engine of `shrink`; warn where NNI leaves some, and Torch-Pruning's functions do it."""
    columns = column_masks(dependency.model, dependency.groups, dead)
    masks = {name: {"weight": mask} for name, mask in columns.items()}
    try:
        by_nni = remove_channels(dependency.model, masks, example_inputs)
    except GraphError as error:
        small, problem = remove(), str(error)
    else:
        small = remove()
        left, right = (sum(parameter.numel() for parameter in each.parameters()) for each in (by_nni, small))
        if left == right:
            return by_nni
        problem = f"it leaves {left - right} parameters that can go"
    _logger.warning("NNI's ModelSpeedup cannot shrink this model (%s); Torch-Pruning's functions do it", problem)
    return small


def column_masks(model: nn.Module, groups: Sequence[ChannelGroup], dead: Mapping[str, Tensor]) -> Masks:
    """Return, by consumer, the mask of its weight that closes the input channels of dead units."""
    columns: Masks = {}
    for group in groups:
        for part in group.consumers if group.name in dead else ():
            layer = model.get_submodule(part.module)
            open_channels = columns.setdefault(part.module, torch.ones(input_channels(layer)))
            open_channels[part.positions[torch.isin(part.units, dead[group.name])]] = 0.0
    masks = {}
    for name, open_channels in columns.items():
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        masks[name] = columns_view(layer, open_channels.to(weight.device)).expand_as(weight).clone()
    return masks


def remove_channels(
    model: nn.Module, masks: Mapping[str, Mapping[str, Tensor | None]], example_inputs: Any
) -> nn.Module:
    """Remove the closed channels of a masked model with NNI's ModelSpeedup.

    The masks are multiplied into a copy, so that fine-grained zeros stay zero. The input channels that a layer's mask
    closes as a whole are then handed to NNI, which removes them together with all that computes or passes them on: what
    every reader multiplies by zero does not matter. Layers are never emptied: one channel stays, with zero weights.

    Args:
        model: The plain model (no wrappers, no gates), float32 or float64. It is left alone.
        masks: NNI's masks format, ``{module: {"weight": 0/1 tensor, "bias": ...}}``; left alone too.
        example_inputs: A tensor, a tuple of positional inputs, or a mapping of keyword inputs, batch first.

    Returns:
        A dense, smaller copy. Train/eval flags, ``requires_grad``, hooks and dtypes are those of the model.

    Raises:
        TargetError: If a mask does not fit (see `masked_copy`).
        GraphError: If the model does not run, NNI cannot trace or shrink it, or the result does not run.
        ConfigError: If the example inputs are none of the above.
    """
    small = masked_copy(model, masks)
    columns = _open_columns(small, masks)
    if all(bool(mask.all()) for mask in columns.values()):
        return small
    _check_runs(small, example_inputs, f"{type(model).__name__} does not run on the example inputs")
    before = dict(small.named_modules(remove_duplicate=False))
    trainable = [(parameter, parameter.requires_grad) for parameter in small.parameters()]
    attributes = set(vars(small))
    unsupported = _run_nni(small, columns, example_inputs)
    for parameter, flag in trainable:
        parameter.requires_grad_(flag)
        parameter.grad = None
    _keep_modules(small, before)
    for name in vars(small).keys() - attributes:  # constants that the tracer stored
        delattr(small, name)
    hint = f" (NNI cannot shrink modules of type {', '.join(unsupported)})" if unsupported else ""
    _check_runs(small, example_inputs, f"NNI's ModelSpeedup left a {type(model).__name__} that does not run{hint}")
    return small


def _open_columns(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor | None]]) -> Masks:
    """Return which input channels of masked layers are not closed as a whole, by the name that the graph will use."""
    names = {module: name for name, module in model.named_modules()}
    columns: Masks = {}
    for name, targets in masks.items():
        module, mask = model.get_submodule(name), targets.get("weight")
        if mask is not None and type(module) in _SHRINKABLE:
            others = [each for each in range(mask.dim()) if each != input_dimension(module)]
            is_open = (mask != 0).any(dim=others, keepdim=True)
            if not is_open.any():
                is_open.view(-1)[0] = True
            columns[names[module]] = is_open.to(module.get_parameter("weight")).expand_as(mask).clone()
    return columns


def _run_nni(small: nn.Module, columns: Masks, example_inputs: Any) -> list[str]:
    """Shrink the model in place; return the types of modules with parameters that NNI has no replacement for."""
    step = "trace"
    with _quiet(), observing(small), torch.enable_grad(), _default_dtype(small):
        torch.manual_seed(0)  # observing() puts the caller's generators back
        try:
            nni = _ExactSpeedup(small, _positional(small, example_inputs), columns)
            step = "shrink"
            nni.speedup_model()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            raise GraphError(f"NNI's ModelSpeedup cannot {step} {type(small).__name__} ({reason})") from error
    left = [info.module for info in nni.node_infos.values() if info.module is not None and not info.replaced]
    return sorted({type(module).__name__ for module in left if any(True for _ in module.parameters())})


def _positional(model: nn.Module, example_inputs: Any) -> tuple[Any, ...]:
    """Return the arguments in the order of forward: NNI takes the values of a dict in the dict's order."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, Mapping):
        bound = inspect.signature(model.forward).bind(**example_inputs)
        bound.apply_defaults()
        return bound.args
    return tuple(example_inputs)


class _ExactSpeedup(ModelSpeedup):  # type: ignore[misc]
    """ModelSpeedup that closes a channel only for a reason.

    NNI runs the network on random weights and inputs, and closes what is constant over the batch (standard deviation
    below 1e-6) or has no gradient. Three things make that wrong or fragile, and are changed here:

    - a constant that is not zero matters, and a small weight is not a constant: only exact zeros count;
    - weights that happen to be zero or constant (a fresh classifier, a layer scale) mean nothing: they are randomized;
    - a gradient of ones cancels where a sum is constant (differences, softmax): it is random and positive.

    Conflicts are none between masks of input channels; NNI's resolution would rewrite them. The passes over the graph
    are NNI's, but hold the activations of the whole network once and not five times.
    """

    def __init__(self, model: nn.Module, arguments: tuple[Any, ...], columns: Masks) -> None:
        logger = logging.Logger("nni.compression.speedup")  # a private one, without an output
        logger.addHandler(logging.NullHandler())
        updaters = [_CarryingMaskUpdater()]
        super().__init__(model, arguments, {}, batch_size=_BATCH_SIZE, customized_mask_updaters=updaters, logger=logger)
        called = {node.target for node in self.graph_module.graph.nodes if node.op == "call_module"}
        self.masks = {name: {"weight": mask} for name, mask in columns.items() if name in called}

    def fix_mask_conflict(self) -> None:
        """Leave the masks as they are."""

    @torch.no_grad()
    def initialize_propagate(self, args: Sequence[Any]) -> None:
        """Make every parameter random; ModelSpeedup puts the values back when it has inferred the masks."""
        for parameter in self.graph_module.parameters():
            if parameter.is_floating_point() and parameter.numel() > 0:
                low, high = (float(bound) for bound in parameter.aminmax())
                parameter.uniform_(*((low, high) if low < high else (0.1, 1.0)))
        super().initialize_propagate(args)

    @torch.no_grad()
    def propagate_originally(self) -> None:
        """Run the network; without gradients, or every output would hold on to its inputs."""
        super().propagate_originally()

    def update_direct_sparsity(self) -> None:
        """Find what is closed from the inputs on; NNI prepares all nodes at once and logs statistics of each."""
        for node in self.graph_module.graph.nodes:
            updater = self.node_infos[node].mask_updater
            updater.direct_update_preprocess(self, node)
            updater.direct_update_process(self, node)
            updater.direct_update_postprocess(self, node)

    def update_indirect_sparsity(self) -> None:
        """Find what nothing reads, from the outputs back; a node that is done needs its values no more."""
        nodes = list(reversed(self.graph_module.graph.nodes))
        for node in nodes:
            self.node_infos[node].mask_updater.indirect_update_preprocess(self, node)
        for node in nodes:
            info = self.node_infos[node]
            info.mask_updater.indirect_update_process(self, node)
            info.mask_updater.indirect_update_postprocess(self, node)
            info.output_origin = info.output_grad = None

    def replace_compressed_modules(self) -> None:
        """Replace, unless two calls of one module would take different channels; NNI would go by the first."""
        open_channels: dict[str, list[Tensor]] = {}
        for node, info in self.node_infos.items():
            if type(info.module) in (*_SHRINKABLE, nn.Embedding):
                channel = -1 if isinstance(info.module, (nn.Linear, nn.Embedding)) else 1
                masks = (self.node_infos[node.args[0]].output_masks, info.output_masks)
                found = [convert_to_coarse_mask(mask, channel)[1] for mask in masks if isinstance(mask, Tensor)]
                first = open_channels.setdefault(node.target, found)
                if not all(map(torch.equal, first, found)):
                    raise ValueError(f"calls of {node.target!r} would lose different channels")
        super().replace_compressed_modules()

    def direct_calc_mask(self, output: Any, output_mask: Tensor | None = None, batch_dim: int | None = None) -> Any:
        """Close what is exactly zero in the whole batch."""
        if not isinstance(output, Tensor) or not self.tensor_propagate_check(output):
            return None
        dimension = self.batch_dim if batch_dim is None else batch_dim
        zero = (output == 0).all(dim=dimension, keepdim=True)
        if not output.is_floating_point():  # a zero index is no closed channel
            zero = torch.zeros_like(zero)
        mask = torch.ones_like(zero, dtype=torch.get_default_dtype()) if output_mask is None else output_mask
        return mask.narrow(dimension, 0, 1).masked_fill(zero, 0)

    def indirect_backward(self, output: Any, output_mask: Tensor | None) -> None:
        """Send a random positive gradient into what is open."""
        if isinstance(output, Tensor) and output.grad_fn is not None and self.tensor_propagate_check(output):
            assert output_mask is not None
            gradient = output_mask.expand_as(output).to(output.dtype) * (torch.rand_like(output) + 0.5)
            # the outputs of one call share their graph
            output.backward(gradient, retain_graph=True)  # type: ignore[no-untyped-call]


class _CarryingMaskUpdater(NoChangeMaskUpdater):  # type: ignore[misc]
    """NoChangeMaskUpdater with two slips of NNI mended.

    Items of a tuple report their gradient to the tuple, not to themselves; an activation without a gradient (of a
    table that does not depend on the batch) reports none.
    """

    def indirect_activation(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> None:
        if model_speedup.node_infos[node].output_grad is not None:
            super().indirect_activation(model_speedup, node)

    def indirect_getitem(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> None:
        source, key = node.args
        infos = model_speedup.node_infos
        assert isinstance(source, torch.fx.Node)
        if isinstance(key, torch.fx.Node):
            key = infos[key].output_origin
        gradients = infos[source].output_grad
        items: Any = dict(gradients) if isinstance(gradients, dict) else list(gradients)
        items[key] = _added(items[key], infos[node].output_grad)
        infos[source].output_grad = items


def _added(old: Any, new: Any) -> Any:
    if isinstance(old, (tuple, list)):
        return [_added(*pair) for pair in zip(old, new, strict=True)]
    if old is None or new is None:
        return new if old is None else old
    return old + new


def _keep_modules(small: nn.Module, before: Mapping[str, nn.Module]) -> None:
    """Put the original modules back, with the tensors and sizes of NNI's new ones.

    NNI builds every module anew: in train mode, trainable, without hooks, on the CPU, in the default dtype.
    """
    after = dict(small.named_modules(remove_duplicate=False))
    for name in after.keys() - before.keys():  # added by the tracer
        if "." not in name:
            delattr(small, name)
    for name, old in before.items():
        new = after.get(name, old)
        if new is old:
            continue
        if type(new) is type(old):
            _take_over(old, new)
            parent, _, child = name.rpartition(".")
            setattr(small.get_submodule(parent), child, old)
        else:  # a PReLU without channels became an Identity
            new.training = old.training


@torch.no_grad()
def _take_over(old: nn.Module, new: nn.Module) -> None:
    for key, value in vars(new).items():
        if not key.startswith("_") and key != "training":
            setattr(old, key, value)
    for name, parameter in old.named_parameters(recurse=False):
        smaller = getattr(new, name)
        if smaller.shape != parameter.shape:
            setattr(old, name, nn.Parameter(smaller.to(parameter), parameter.requires_grad))
    for name, buffer in old.named_buffers(recurse=False):
        smaller = getattr(new, name)
        if smaller.shape != buffer.shape:
            setattr(old, name, smaller.to(buffer))


def _check_runs(model: nn.Module, example_inputs: Any, complaint: str) -> None:
    try:
        with observing(model):
            call_model(model, example_inputs)
    except ConfigError:
        raise
    except Exception as error:
        raise GraphError(f"{complaint}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Swallow what NNI prints, logs and warns about."""
    root = logging.getLogger("nni")
    level = root.level
    silence = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        warnings.simplefilter("ignore")
        root.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            root.setLevel(level)


@contextmanager
def _default_dtype(model: nn.Module) -> Iterator[None]:
    """Make the model's widest dtype the default: NNI builds new tensors in the default one."""
    before = torch.get_default_dtype()
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    torch.set_default_dtype(reduce(torch.promote_types, dtypes) if dtypes else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
