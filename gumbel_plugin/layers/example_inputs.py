"""How a model is called on example inputs, and how such inputs are varied, moved and repeated.

*Example inputs* mean the same thing everywhere in this project: a tensor is the one positional argument, a tuple or
list holds the positional arguments, a mapping holds the keyword arguments. Arguments may nest (a list of images).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import chain
from numbers import Number
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gumbel_plugin.errors import ConfigError, shown

ExampleInputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
Inputs: TypeAlias = Tensor | tuple[Any, ...] | dict[str, Any]
"""Example inputs, normalized: a list became a tuple, a Hugging Face BatchEncoding a dict."""


def call_model(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Call a model on example inputs and return its output as it is.

    Args:
        model: The model, in whatever mode it is.
        example_inputs: A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Raises:
        ConfigError: If the inputs are none of these.
    """
    inputs = _normalized(example_inputs)
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def checked_inputs(example_inputs: ExampleInputs) -> Inputs:
    """Normalize example inputs; refuse those that no model can be traced and compared with, before it is called.

    Args:
        example_inputs: A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Returns:
        A tensor, a tuple or a dict, which every function here takes as it is.

    Raises:
        ConfigError: If they are none of these, hold no tensor, or their tensors are on the meta device or quantized,
            hold NaN (infinities are left to the model: additive attention masks have them), or no sample.
    """
    inputs = _normalized(example_inputs)
    tensors = [value for value in tree_leaves(inputs) if isinstance(value, Tensor)]
    if not tensors:
        raise ConfigError(f"example_inputs = {shown(example_inputs)}: there is no tensor in it")
    for tensor in tensors:
        shape = tuple(tensor.shape)
        if tensor.is_meta:
            raise ConfigError(f"example_inputs: a tensor of shape {shape} is on the meta device and has no values")
        if tensor.is_quantized:
            raise ConfigError(f"example_inputs: a tensor of shape {shape} is quantized; pass floating point values")
        if bool(torch.isnan(tensor).any()):
            raise ConfigError(f"example_inputs: a tensor of shape {shape} holds NaN, to which nothing compares")
    batched = next((tensor for tensor in tensors if tensor.dim() > 0), tensors[0])
    if batched.numel() == 0:
        raise ConfigError(f"example_inputs: a tensor of shape {tuple(batched.shape)} is empty; pass a sample")
    return inputs


def random_inputs_like(
    example_inputs: ExampleInputs, generator: torch.Generator, dtype: torch.dtype | None = None
) -> Inputs:
    """Draw inputs of the same structure, shapes and devices.

    Floating tensors become standard normal. Integer tensors keep the values of each row (last dimension) in a random
    order: token ids stay in the vocabulary, a sequence keeps its one end token and a padding mask never closes a whole
    row. Everything else, bool tensors included, is kept.

    Args:
        example_inputs: What to imitate.
        generator: The CPU generator to draw from, so that every device sees the same numbers.
        dtype: Of the floating tensors; None keeps each one's own.
    """

    def draw(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype == torch.bool or value.is_complex():
            return value
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            return noise.to(device=value.device, dtype=dtype or value.dtype)
        if value.dim() == 0:
            return value
        order = torch.rand(value.shape, generator=generator, dtype=torch.float64).argsort(dim=-1)
        return value.gather(-1, order.to(value.device))

    return _mapped(draw, example_inputs)


def inputs_on_device_of(model: nn.Module, example_inputs: ExampleInputs) -> Inputs:
    """Move the tensors to the device of the model's first parameter or buffer (nowhere if it has none)."""
    device = next((tensor.device for tensor in _tensors_of(model)), None)
    return _mapped(lambda value: value.to(device) if isinstance(value, Tensor) else value, example_inputs)


def inputs_following(model: nn.Module, example_inputs: ExampleInputs, dtype: torch.dtype) -> Inputs:
    """Move the inputs with a model: to its device, and those of its former dtype to the one that it has now.

    Args:
        model: The model.
        example_inputs: What fitted the model before.
        dtype: The model's dtype then, see `dtype_of`.
    """
    now = dtype_of(model)

    def cast(value: Any) -> Any:
        return value.to(now) if isinstance(value, Tensor) and value.dtype == dtype else value

    return _mapped(cast, inputs_on_device_of(model, example_inputs))


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's first floating parameter or buffer, torch's default if it has none."""
    return next((each.dtype for each in _tensors_of(model) if each.is_floating_point()), torch.get_default_dtype())


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def batch_size_of(example_inputs: ExampleInputs) -> int:
    """Return the size of the first dimension of the first tensor that has one.

    Raises:
        ConfigError: If there is no such tensor, or it is empty.
    """
    for value in tree_leaves(_normalized(example_inputs)):
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] > 0:
            return value.shape[0]
    raise ConfigError("example_inputs hold no tensor with a batch dimension of at least 1")


def with_batch_size(example_inputs: ExampleInputs, batch_size: int) -> Inputs:
    """Repeat (or cut) the samples until there are ``batch_size`` of them.

    A tensor counts as batched if its first dimension has the size that `batch_size_of` reports; others are kept.

    Raises:
        ConfigError: If ``batch_size`` is not positive, or no tensor has a batch dimension.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size is {batch_size}; it must be at least 1")
    present = batch_size_of(example_inputs)
    index = torch.arange(batch_size) % present

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == present:
            return value.index_select(0, index.to(value.device))
        return value

    return _mapped(repeat, example_inputs)


@contextmanager
def observing(*models: nn.Module) -> Iterator[None]:
    """Run the models in eval mode without gradients, and leave no trace.

    On exit every submodule has its own train/eval flag again and torch's global generators (CPU and the models' CUDA
    devices) their state. The flags are set directly: a custom ``train()`` with side effects is not called.
    """
    flags = [(module, module.training) for model in models for module in model.modules()]
    cuda = {p.device for model in models for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(cuda, key=str)), torch.no_grad():
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, training in flags:
                module.training = training


_CACHES = frozenset(("past_key_values", "past_buckets_states", "cache_params", "mems"))
"""What Hugging Face calls the states that a language model keeps for its own next call."""


def named_tensors(
    output: Any, path: str = "output", above: frozenset[int] = frozenset()
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a nested output with the path to each; numbers and numpy's arrays become tensors.

    Left out are caches beside other outputs, by their name or their class's: keys and values of a language model are
    for its own next call, and it has fewer of them when heads are gone.

    Args:
        output: Tensors in containers, dataclasses and other objects with attributes; strings and functions hold none.
        path: What to call it.
        above: The ids of the objects that it is a part of, which it is not entered again.
    """
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, Number) or (type(output).__module__ == "numpy" and output.dtype.kind in "biufc"):
        yield path, torch.as_tensor(output)
    elif id(output) not in above and not (above and _is_cache(output)):
        for place, part in _parts(output):
            yield from named_tensors(part, path + place, above | {id(output)})


def _is_cache(part: Any) -> bool:
    return any(kind.__name__.endswith("Cache") for kind in type(part).__mro__)


def _parts(output: Any) -> list[tuple[str, Any]]:
    """Return the parts of a container or object, each with how it is written after the whole."""
    if isinstance(output, Mapping):  # before dataclasses: a Hugging Face ModelOutput is both
        return [(f"[{key!r}]", value) for key, value in output.items() if key not in _CACHES]
    if isinstance(output, (tuple, list)):
        return [(f"[{index}]", value) for index, value in enumerate(output)]
    if is_dataclass(output) and not isinstance(output, type):
        names = [field.name for field in fields(output) if field.name not in _CACHES]
        return [(f".{name}", getattr(output, name)) for name in names]
    if isinstance(output, (type, nn.Module)) or callable(output):
        return []
    return [(f".{name}", value) for name, value in getattr(output, "__dict__", {}).items() if name not in _CACHES]


def _mapped(change: Callable[[Any], Any], example_inputs: ExampleInputs) -> Inputs:
    result: Inputs = tree_map(change, _normalized(example_inputs))
    return result


def _normalized(example_inputs: ExampleInputs) -> Inputs:
    """Return a tensor, a tuple or a dict: the same object if it is one already, as `checked_inputs` returns it."""
    if isinstance(example_inputs, Tensor) or type(example_inputs) in (tuple, dict):
        return example_inputs  # type: ignore[return-value]
    if isinstance(example_inputs, Mapping):
        return dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs)
    raise ConfigError(
        f"example_inputs is a {type(example_inputs).__name__}; it must be a tensor, a tuple or list of positional "
        "arguments, or a mapping of keyword arguments"
    )
