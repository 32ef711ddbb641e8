"""Repairs of NNI's concrete_trace, which speedup traces models with."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nni.common.concrete_trace_utils import concrete_proxy, concrete_tracer
from nni.common.concrete_trace_utils.concrete_tracer import ConcreteTracer
from torch import nn

from gumbel_nni.compat.patching import repair, replaces


@repair
def tensor_methods_in_tracer() -> bool:
    """Let concrete_trace record tensor methods.

    Cause: the tracer knows them by ``__qualname__.startswith("_TensorBase")``, and torch calls the class TensorBase now
    (every version this project supports). Methods then stay unpatched, and builtins without a module fail: "'NoneType'
    object has no attribute 'startswith'". Remedy: the tracer's own table names where each method is to be patched.
    Static constructors (``_make_subclass``) never see a proxy and leave the table; what torch.Tensor overrides in
    Python is filed under the override, which is what the tracer made of it when it recognized the class.
    """
    table = ConcreteTracer.default_autowrap_leaf_function
    for method in [key for key in table if getattr(key, "__qualname__", "").startswith("TensorBase.")]:
        _, force, to_function = table.pop(method)
        if isinstance(method, types.BuiltinMethodType):
            continue
        public = getattr(torch.Tensor, method.__name__)
        table[public] = ([(torch.Tensor, method.__name__)] if public is method else [], force, to_function)
    return True


@repair
def python_functions_in_tracer() -> bool:
    """Let concrete_trace run what torch wraps in Python: norm, einsum, split and others of torch.functional.

    Cause (a slip, whatever the versions): while a leaf runs, the tracer's ``torch.norm`` calls the C function of that
    name, whose arguments differ: ``F.normalize`` in Swin V2 fails with a TypeError. Remedy: file them under the Python
    function only.
    """
    table = ConcreteTracer.default_autowrap_leaf_function
    for name in torch.functional.__all__:
        public = getattr(torch, name)
        if getattr(torch._C._VariableFunctions, name, public) is not public:
            table.pop(getattr(torch._C._VariableFunctions, name), None)
            table[public] = ([(torch, name)], False, public)
    return True


@repair
def type_in_tracer() -> bool:
    """Let concrete_trace wrap ``type``.

    Cause: ``functools.wraps(type)`` copies ``type.__type_params__``, in Python 3.12 a descriptor and no tuple:
    TypeError at every tracing. Remedy: the tracer's ``wraps`` leaves it out.
    """
    if isinstance(getattr(type, "__type_params__", ()), tuple):
        return False
    names: tuple[str, ...] = functools.WRAPPER_ASSIGNMENTS
    assigned = tuple(name for name in names if name != "__type_params__")
    wraps = functools.partial(functools.wraps, assigned=assigned)
    concrete_tracer.functools = types.SimpleNamespace(**{**vars(functools), "wraps": wraps})
    return True


@repair
def bytecode_caches_in_proxy() -> bool:
    """Let a proxy see which instruction is asking for its truth, its length or its items.

    Cause: the proxy takes ``list(dis.get_instructions(code))[f_lasti // 2]``. From Python 3.11 inline caches take
    code units that this list leaves out, and the jumps have new names: an IndexError, or the wrong instruction, at
    ``if tensor.shape[1] > 1`` and ``n, c, h, w = x.shape`` (ViT, ConvNeXt, EfficientNet). Remedy: give
    the module a ``dis`` whose list has one entry a code unit, and name the new jumps. Python 3.13 asks in TO_BOOL.
    """
    if sys.version_info < (3, 11):
        return False
    proxy = concrete_proxy.ConcreteProxy
    concrete_proxy.dis = types.SimpleNamespace(
        get_instructions=_one_instruction_a_unit, opmap=dis.opmap, Instruction=dis.Instruction
    )
    conditional = ("JUMP_IF_TRUE", "JUMP_IF_FALSE", "FORWARD_IF_TRUE", "FORWARD_IF_FALSE")
    conditional += ("BACKWARD_IF_TRUE", "BACKWARD_IF_FALSE")
    proxy.jump_opcodes = tuple(code for name, code in dis.opmap.items() if any(part in name for part in conditional))
    before = [dis.opmap[name] for name in ("COMPARE_OP", "UNARY_NOT", "TO_BOOL") if name in dis.opmap]
    proxy.jump_before_opcodes = tuple(before)
    return True


@replaces(concrete_tracer, "_create_wrapped_leaf_class")
@replaces(concrete_tracer, "_create_wrapped_leaf_iterable_class")
def generic_classes_in_tracer(original: Any, tracer: Any, clz: Any) -> Any:
    """Let traced code write ``list[int]`` and ``int.from_bytes``.

    Cause: the tracer puts callable objects in the place of int, list, tuple, dict and others, which take no subscript
    and have few attributes; ``F.max_pool2d(x, 2)`` evaluates ``torch.jit.annotate(list[int], [])`` (``List[int]`` until
    about torch 2.9): TypeError. An import while tracing reads ``int.from_bytes``, as the first ``torch.einsum`` did
    until about torch 2.8: AttributeError. Remedy: a subscript, or an attribute that the object has not, goes to the
    class behind it.
    """

    def public(self: Any, name: str) -> Any:
        if name.startswith("__"):  # functools.wraps copies what it finds of these
            raise AttributeError(name)
        return getattr(clz, name)

    wrapper = original(tracer, clz)
    type(wrapper).__getitem__ = lambda self, item: clz[item]
    type(wrapper).__getattr__ = public
    return wrapper


@replaces(
    concrete_tracer,
    "node_is_impure_wrapper",
    where="impure_random" in inspect.signature(torch.fx.Node.is_impure).parameters,
)
def impure_with_two_arguments(original: Any, node: torch.fx.Node, impure_random: bool = True) -> bool:
    """Let dead-code elimination call the tracer's purity check.

    Cause: torch.fx calls ``node.is_impure(impure_random)`` (from about torch 2.8); NNI puts a one-argument function in
    its place: TypeError.
    """
    return bool(original(node))


@replaces(ConcreteTracer, "trace")
def classes_after_tracing(original: Any, *args: Any, **kwargs: Any) -> torch.fx.Graph:
    """Leave torch's classes as they were when concrete_trace returns.

    Cause: the tracer ends with ``delattr(torch.autograd.Function, "apply")``, meant for a torch whose Function inherits
    ``apply``. It has its own now (every version this project supports), and without it custom functions lose
    torch.func and the defaults of their arguments, in the whole process (until about torch 2.13). The fx patcher also
    leaves copies of inherited methods behind (hundreds on torch.Tensor).
    """
    with _class_attributes_kept(torch.Tensor, nn.Module, torch.autograd.Function):
        graph: torch.fx.Graph = original(*args, **kwargs)
    return graph


@contextmanager
def _class_attributes_kept(*classes: type) -> Iterator[None]:
    """Put back what is missing on exit, and delete new attributes that only repeat what the class inherits."""
    before = {cls: dict(vars(cls)) for cls in classes}
    try:
        yield
    finally:
        for cls, attributes in before.items():
            for name in attributes.keys() - vars(cls).keys():
                setattr(cls, name, attributes[name])
            for name in vars(cls).keys() - attributes.keys():
                if any(vars(base).get(name) is vars(cls)[name] for base in cls.__mro__[1:]):
                    delattr(cls, name)


def _one_instruction_a_unit(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Yield one instruction for each code unit: over a cache, the instruction that follows it.

    So that ``units[f_lasti // 2]`` is the running instruction, and ``units[f_lasti // 2 + 1]`` the next one.
    """
    unit = 0
    for instruction in dis.get_instructions(code):
        while unit <= instruction.offset // 2:
            yield instruction
            unit += 1
