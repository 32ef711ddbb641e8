"""Arithmetic in one precision throughout, and values that were rounded when they were stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_UNROUNDED = "unrounded_"
_MAY_BE_ROUNDED = ("bias", "weight")


@contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Compute in a floating type that models and inputs have already, whatever a forward casts or creates.

    TF32 and bfloat16 shortcuts are off meanwhile.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that torch.zeros(n) in a forward has the dtype of the weights it meets
    try:
        with _full_precision(), _AtLeast(dtype):
            yield
    finally:
        torch.set_default_dtype(before)


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of every parameter and buffer, by name."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.dtype for name, tensor in named}


@torch.no_grad()
def round_to(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """Give a float64 model its own dtypes back, in place.

    A bias or weight that this rounds is remembered as it was, in a plain attribute of its layer (no state dict holds
    it).

    Args:
        model: The model.
        dtypes: What `dtypes_of` said; a tensor it does not name takes the dtype of its layer, or of what is around it.
    """
    for prefix, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or tensor.dtype != torch.float64:
                continue
            wide = tensor.detach().clone()
            tensor.data = wide.to(_dtype_at(f"{prefix}.{name}".lstrip("."), dtypes))
            if name in _MAY_BE_ROUNDED and not torch.equal(tensor.double(), wide):
                setattr(module, _UNROUNDED + name, wide)
    return model


def _dtype_at(path: str, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """Return a tensor's dtype; of a new one, such as a projection that was packed, that of its nearest neighbor."""
    found = dtypes.get(path)
    while found is None and path:
        path = path.rpartition(".")[0]
        start = f"{path}." if path else ""
        found = next((each for name, each in dtypes.items() if name.startswith(start) and each.is_floating_point), None)
    return found or torch.float64


@contextmanager
def cast_to(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold a model in a floating type, biases and weights as they were before `round_to`; then give it its own back."""
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    try:
        _unround(model)
        model.to(dtype)
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for table, own in buffers:
            table.update(own)


def _unround(model: nn.Module) -> None:
    """Put back, in place, what biases and weights were before `round_to`, where they have not changed since."""
    for module in model.modules():
        for name in _MAY_BE_ROUNDED:
            wide, tensor = module.__dict__.get(_UNROUNDED + name), module._parameters.get(name)
            if wide is not None and tensor is not None and torch.equal(wide.to(tensor), tensor):
                tensor.data = wide.to(tensor.device)


class _AtLeast(TorchFunctionMode):
    """Turns every cast to a narrower floating type, and every tensor created in one, into ``dtype``.

    Many transformers compute their norms, softmax or logits in float32 whatever their dtype: in float64, such a cast
    would hide a difference or round it up to 1e-7.
    """

    _CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._CASTS:
            return args[0].to(self._dtype)
        return func(*map(self._widen, args), **{key: self._widen(value) for key, value in (kwargs or {}).items()})

    def _widen(self, value: Any) -> Any:
        if isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize < self._dtype.itemsize:
            return self._dtype
        return value


@contextmanager
def _full_precision() -> Iterator[None]:
    """Switch TF32 and bfloat16 shortcuts off: on a GPU convolutions use TF32 by default, good to 1e-3 only."""
    backends: Any = torch.backends
    value: str | bool
    if hasattr(backends.cudnn, "conv"):  # torch >= 2.9; its old switches refuse to be read once the new ones are used
        cudnn, mkldnn = backends.cudnn, backends.mkldnn
        owners = [cudnn.conv, cudnn.rnn, backends.cuda.matmul, mkldnn.conv, mkldnn.rnn, mkldnn.matmul]
        switch, value = "fp32_precision", "ieee"
    else:
        owners = [backends.cudnn, backends.cuda.matmul]
        switch, value = "allow_tf32", False
    before = [getattr(owner, switch) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, switch, value)
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            setattr(owner, switch, old)
