"""Tensors that modules keep in plain attributes: caches of biases, positions and masks that a forward fills."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from gumbel_plugin.layers.weights import how_to_keep_weights

_OWN = frozenset(vars(nn.Module()))
"""What every module has: parameters, buffers, children, hooks and flags."""

_CLOSED = (type, ModuleType, FunctionType, MethodType, nn.Module, Tensor, str, bytes, int, float)
"""What is not looked into: modules are looked at one by one."""


def kept_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a module's plain attributes, each with the attribute's name; nested ones too."""
    for name, value in vars(module).items():
        if name not in _OWN:
            yield from ((name, tensor) for tensor in _tensors(value))


@contextmanager
def forgetting_tensors(*models: nn.Module) -> Iterator[None]:
    """Take off again what forwards meanwhile leave on modules in plain attributes and buffers, if it holds tensors.

    A tensor that was computed from weights would be outdated once they change, and while autograd watches it cannot
    even be copied. Modules that got new parameters or children are left alone: they completed themselves.
    """
    before = [_Kept(module) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for kept in before:
            kept.restore()


class _Kept:
    """What a module has in its plain attributes and buffers, and in what they contain."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = {name: value for name, value in vars(module).items() if name not in _OWN}
        self._tables = [(table, dict(table)) for table in (module._buffers, *_tables(self._attributes))]
        self._lists = [(each, each.copy()) for each in _parts(self._attributes) if isinstance(each, list | set)]
        self._own = {*module._parameters, *module._modules}
        self._tensors = {id(tensor) for tensor in self._present()}

    def restore(self) -> None:
        """Let the module have it again, if tensors came in and the module's own parts are the same."""
        module = self._module
        same = self._own == {*module._parameters, *module._modules}
        if not same or all(id(tensor) in self._tensors for tensor in self._present()):
            return
        for name in [name for name in vars(module) if name not in _OWN and name not in self._attributes]:
            del vars(module)[name]
        vars(module).update(self._attributes)
        for table, content in self._tables:
            table.clear()
            table.update(content)
        for each, items in self._lists:
            each.clear()
            each.update(items) if isinstance(each, set) else each.extend(items)

    def _present(self) -> Iterator[Tensor]:
        yield from (tensor for _, tensor in kept_tensors(self._module))
        yield from (buffer for buffer in self._module._buffers.values() if buffer is not None)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (part for part in _parts(value) if isinstance(part, Tensor))


def _tables(value: Any) -> Iterator[dict[Any, Any]]:
    """Yield the dictionaries and the attributes of objects in a value."""
    for part in _parts(value):
        if isinstance(part, dict):
            if part is not value:
                yield part
        elif not isinstance(part, (*_CLOSED, list, set, tuple)) and hasattr(part, "__dict__"):
            yield vars(part)


def _parts(value: Any) -> Iterator[Any]:
    """Yield a value and all that it contains: in containers, and in attributes of plain objects."""
    seen: set[int] = set()
    found = [value]
    while found:
        part = found.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, dict):
            found += part.values()
        elif isinstance(part, list | set | tuple | frozenset):
            found += part
        elif not isinstance(part, _CLOSED) and hasattr(part, "__dict__"):
            found += vars(part).values()


def copy_hint(model: nn.Module) -> str:
    """Return what to do about weights and attributes that are computed from others, which torch does not copy."""
    for name, module in model.named_modules():
        way = how_to_keep_weights(module)
        if way:
            return f"{name!r} has a computed weight, call {way} first"
        for attribute, value in kept_tensors(module):
            if not value.is_leaf:
                place = ".".join(filter(None, (name, attribute)))
                return f"{place!r} is a tensor computed from others, which torch does not copy; delete or detach it"
    return ""
