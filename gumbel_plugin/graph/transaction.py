"""All or nothing: what an error interrupts, or a caller abandons, is taken back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

_PACKAGES = ("gumbel_plugin", "gumbel_torch_pruning", "torch_pruning")


@contextmanager
def restored_on_error(*roots: Any, weights_change: bool = True) -> Iterator[None]:
    """Give objects back what they had, where an error comes up meanwhile or the generator around this is closed.

    All of it is the same objects as before: parameters (with their numbers, gradients and flags), modules, hooks, the
    dependency graph. Followed are modules, containers, and objects of this package and of Torch-Pruning.

    Args:
        roots: Models, or objects that hold models among other things.
        weights_change: Whether numbers in parameters may change: a copy of them is kept then, of buffers always.
    """
    saved = list(_saved(roots, weights_change))
    try:
        yield
    except BaseException:
        if not sys.is_finalizing():  # nobody is left to go on, and torch is half gone
            for each, content in saved:
                _restore(each, content)
        raise


def _saved(roots: tuple[Any, ...], weights_change: bool) -> Iterator[tuple[Any, Any]]:
    """Yield everything that can change, reached from these objects, with what it holds now."""
    seen, found = {id(root) for root in roots}, list(roots)
    followed: dict[type, bool] = {}
    while found:
        each = found.pop()
        if isinstance(each, nn.Module):
            for tensor in (*each._parameters.values(), *each._buffers.values()):
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    gradient = tensor.grad if tensor.is_leaf else None
                    keep = weights_change or not isinstance(tensor, nn.Parameter)
                    numbers = tensor.detach().clone() if keep else None
                    yield tensor, (tensor.data, numbers, gradient, tensor.requires_grad)
        if isinstance(each, list | set | tuple):
            content: Any = list(each)
            parts = content
        else:
            table = each if isinstance(each, dict) else vars(each)
            parts, content = [*table.values()], dict(table)
            parts += table if table is each else ()
        yield each, content
        for part in parts:
            kind = type(part)
            if kind not in followed:
                followed[kind] = _is_followed(kind)
            if followed[kind] and id(part) not in seen:
                seen.add(id(part))
                found.append(part)


def _is_followed(kind: type) -> bool:
    if issubclass(kind, dict | list | set | tuple | nn.Module):
        return kind is not torch.Size
    ours = kind.__module__.partition(".")[0] in _PACKAGES and not issubclass(kind, Tensor | Enum | type)
    frozen = is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return ours and not frozen and kind.__dictoffset__ != 0


@torch.no_grad()
def _restore(each: Any, content: Any) -> None:
    if isinstance(each, Tensor):
        each.data, numbers, each.grad, flag = content
        if numbers is not None:
            each.copy_(numbers)
        each.requires_grad_(flag)
    elif isinstance(each, list):
        each[:] = content
    elif not isinstance(each, tuple):
        table = each if isinstance(each, dict | set) else vars(each)
        table.clear()
        table.update(content)
