"""NNI 3.0 on today's torch, Python, Lightning and Transformers, repaired from outside.

NNI's last release dates from 2023; on torch 2.13 its QuickStart fails at ``ModelSpeedup`` (microsoft/nni#5768). Each
function below repairs one breakage. It looks for the breakage first, does nothing where there is none, may be called
again, and returns whether its repair is in force. Replaced functions carry NNI's own as ``__wrapped__``.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gumbel_plugin.compat import make_torchvision_importable
from gumbel_plugin.errors import MissingExtraError

_SPEEDUP_MODULES = ("utils", "mask_updater", "model_speedup")


def apply() -> tuple[str, ...]:
    """Make NNI work here; call it before NNI is imported, or at any time after. Idempotent.

    Returns:
        The names of the repairs that are in force.

    Raises:
        MissingExtraError: If NNI is not installed.
    """
    make_torchvision_importable()  # nni.compression imports it, and catches ImportError only
    _import_nni()
    return tuple(repair.__name__ for repair in _REPAIRS if repair())


def tensor_methods_in_tracer() -> bool:
    """Let concrete_trace record tensor methods.

    Cause: the tracer tells them by ``__qualname__.startswith("_TensorBase")``, and torch calls the class TensorBase now
    (every version this project supports). Methods then stay unpatched, and builtins without a module fail: "'NoneType'
    object has no attribute 'startswith'". Remedy: say in the tracer's own table where each method is to be patched.
    Static constructors (``_make_subclass``) never see a proxy and leave the table; what torch.Tensor overrides in
    Python is filed under the override, which is what the tracer made of it when it recognised the class.
    """
    if torch._C._TensorBase.__qualname__ == "_TensorBase":
        return False
    from nni.common.concrete_trace_utils.concrete_tracer import ConcreteTracer

    table = ConcreteTracer.default_autowrap_leaf_function
    for method in [key for key in table if getattr(key, "__qualname__", "").startswith("TensorBase.")]:
        _, force, to_function = table.pop(method)
        if isinstance(method, types.BuiltinMethodType):
            continue
        public = getattr(torch.Tensor, method.__name__)
        table[public] = ([(torch.Tensor, method.__name__)] if public is method else [], force, to_function)
    return True


def python_functions_in_tracer() -> bool:
    """Let concrete_trace run what torch wraps in Python: norm, einsum, split and others of torch.functional.

    Cause (a slip, whatever the versions): while a leaf runs, the tracer's ``torch.norm`` calls the C function of that
    name, whose arguments differ: ``F.normalize`` in Swin V2 fails with a TypeError. Remedy: file them under the Python
    function only.
    """
    from nni.common.concrete_trace_utils.concrete_tracer import ConcreteTracer

    table = ConcreteTracer.default_autowrap_leaf_function
    for name in torch.functional.__all__:
        public = getattr(torch, name)
        if getattr(torch._C._VariableFunctions, name, public) is not public:
            table.pop(getattr(torch._C._VariableFunctions, name), None)
            table[public] = ([(torch, name)], False, public)
    return True


def classes_after_tracing() -> bool:
    """Leave torch's classes as they were when concrete_trace returns.

    Cause: the tracer ends with ``delattr(torch.autograd.Function, "apply")``, meant for a torch whose Function inherits
    ``apply``. It has its own now (every version this project supports), and without it custom functions lose
    torch.func and the defaults of their arguments, in the whole process. The fx patcher also leaves copies of
    inherited methods behind (hundreds on torch.Tensor).
    """
    from nni.common.concrete_trace_utils.concrete_tracer import ConcreteTracer

    _replace_once(ConcreteTracer, "trace", _trace)
    return True


def impure_with_two_arguments() -> bool:
    """Let dead-code elimination call the tracer's purity check.

    Cause: torch.fx calls ``node.is_impure(impure_random)`` (from about torch 2.8); NNI puts a one-argument function in
    its place: TypeError.
    """
    from nni.common.concrete_trace_utils import concrete_tracer

    if "impure_random" not in inspect.signature(torch.fx.Node.is_impure).parameters:
        return False
    original = concrete_tracer.node_is_impure_wrapper
    if len(inspect.signature(original, follow_wrapped=False).parameters) > 1:
        return True

    def node_is_impure(node: torch.fx.Node, impure_random: bool = True) -> bool:
        return bool(original(node))

    node_is_impure.__wrapped__ = original  # type: ignore[attr-defined]
    concrete_tracer.node_is_impure_wrapper = node_is_impure
    return True


def bytecode_caches_in_proxy() -> bool:
    """Let a proxy see which instruction is asking for its truth, its length or its items.

    Cause: the proxy takes ``list(dis.get_instructions(code))[f_lasti // 2]``. From Python 3.11 inline caches take
    code units that this list leaves out, and the jumps have new names: an IndexError, or the wrong instruction, at
    ``if tensor.shape[1] > 1`` and ``n, c, h, w = x.shape`` (ViT, ConvNeXt, EfficientNet). Remedy: give
    the module a ``dis`` whose list has one entry a code unit, and name the new jumps. Python 3.13 asks in TO_BOOL.
    """
    if sys.version_info < (3, 11):
        return False
    from nni.common.concrete_trace_utils import concrete_proxy

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


def size_is_a_leaf() -> bool:
    """Keep a torch.Size in one piece in speedup's trees.

    Cause: torch.fx.experimental.proxy_tensor registers torch.Size as a pytree node, and recent torch imports it for its
    own ends (an older one where torch.compile was used). A mask tree then has one leaf where the value tree has four:
    "'tuple' object has no attribute 'numel'", or "Inconsistent tree nodes length". As the import may still
    come, the repair is made everywhere.
    """
    import nni.compression.speedup as package

    for name in _SPEEDUP_MODULES:
        module = getattr(package, name)
        if not hasattr(module.tree_map_zip, "__wrapped__"):
            module.tree_map_zip = functools.update_wrapper(_tree_map_zip, module.tree_map_zip)
    return True


def values_last_used_by_size() -> bool:
    """Let speedup forget a value whose last use is ``x.size()`` or ``x.dim()``.

    Cause (a slip, whatever the versions): it deletes ``_output_randomize``; the attribute is ``output_randomize``.
    """
    from nni.compression.speedup.container import NodeInfo

    def forget(info: Any) -> None:
        del info.output_randomize

    NodeInfo._output_randomize = property(fdel=forget)
    return True


def pytree_nodes_of_fx() -> bool:
    """Give torch back its own registration of fx's immutable list and dict.

    Cause: speedup registers them as pytree nodes over torch's own registration, without key paths and serialised names.
    ``tree_flatten_with_path`` and ``treespec_dumps``, which torch.export uses, then fail in the whole process.
    """
    from torch.fx import immutable_collections as fx

    if not hasattr(fx, "_immutable_list_flatten"):
        return False
    functions: dict[type, tuple[Any, ...]] = {
        fx.immutable_list: (fx._immutable_list_flatten, fx._immutable_list_unflatten, pytree._list_flatten_with_keys),
        fx.immutable_dict: (fx._immutable_dict_flatten, fx._immutable_dict_unflatten, pytree._dict_flatten_with_keys),
    }
    for cls, (flatten, unflatten, with_keys) in functions.items():
        if pytree.SUPPORTED_NODES[cls].flatten_fn is not flatten:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "already registered": that is the point
                pytree._private_register_pytree_node(
                    cls,
                    flatten,
                    unflatten,
                    serialized_type_name=f"torch.fx.immutable_collections.{cls.__name__}",
                    flatten_with_keys_fn=with_keys,
                )
    return True


def masks_by_path() -> bool:
    """Let ModelSpeedup load masks that were saved as ``torch.save(pruner.get_masks())``.

    Cause: torch.load builds only what is on its list (torch 2.6 and later); a pruner's masks are a
    ``defaultdict(dict)``. Remedy: while ModelSpeedup reads its file, and only then, a defaultdict loads as a dict.
    """
    from nni.compression.speedup import ModelSpeedup

    if not hasattr(torch.serialization, "safe_globals"):
        return False
    _replace_once(ModelSpeedup, "__init__", _init_speedup)
    return True


def settable_max_steps() -> bool:
    """Let LightningEvaluator limit the steps.

    Cause: NNI assigns ``trainer.fit_loop.max_steps``, a read-only property (Lightning 2.0 and later).
    """
    if "pytorch_lightning" not in sys.modules:
        return False
    from pytorch_lightning.loops import fit_loop

    loop = getattr(fit_loop, "_FitLoop", None) or fit_loop.FitLoop
    steps = inspect.getattr_static(loop, "max_steps", None)
    if not isinstance(steps, property):
        return False
    if steps.fset is None:
        loop.max_steps = steps.setter(lambda self, value: setattr(self.epoch_loop, "max_steps", value))
    return True


def loss_with_item_count() -> bool:
    """Let TransformersEvaluator patch the loss.

    Cause: Trainer calls ``compute_loss(..., num_items_in_batch=...)`` (Transformers 4.46 and later), which NNI's
    replacement does not take.
    """
    from nni.compression.utils import evaluator

    if not evaluator.TRANSFORMERS_INSTALLED:
        return False
    if "num_items_in_batch" not in inspect.signature(evaluator.HFTrainer.compute_loss).parameters:
        return False
    _replace_once(evaluator.TransformersEvaluator, "patch_loss", _patch_loss)
    return True


def default_optimizer_of_trainer() -> bool:
    """Let TransformersEvaluator trace the Trainer's default optimizer.

    Cause: NNI overwrites ``Trainer.get_optimizer_cls_and_kwargs`` with a one-argument function; Trainer calls it on the
    instance with the model too (Transformers 4.39 and later), and NNI leaves a plain function where the static
    method was.
    """
    from nni.compression.utils import evaluator

    if not evaluator.TRANSFORMERS_INSTALLED:
        return False
    if "model" not in inspect.signature(evaluator.HFTrainer.get_optimizer_cls_and_kwargs).parameters:
        return False
    _replace_once(evaluator.TransformersEvaluator, "_init_optimizer_helpers", _init_optimizer_helpers)
    return True


_REPAIRS: tuple[Callable[[], bool], ...] = (
    tensor_methods_in_tracer,
    python_functions_in_tracer,
    classes_after_tracing,
    impure_with_two_arguments,
    bytecode_caches_in_proxy,
    size_is_a_leaf,
    values_last_used_by_size,
    pytree_nodes_of_fx,
    masks_by_path,
    settable_max_steps,
    loss_with_item_count,
    default_optimizer_of_trainer,
)


def _import_nni() -> None:
    """Import NNI without the warnings of its own import: they are errors under ``-W error``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import nni.common.concrete_trace_utils
            import nni.compression.pruning
            import nni.compression.speedup  # noqa: F401
        except ImportError as error:
            if (error.name or "").split(".")[0] == "nni":
                raise MissingExtraError("nni", "nni") from error
            raise


def _trace(self: Any, *args: Any, **kwargs: Any) -> torch.fx.Graph:
    with _class_attributes_kept(torch.Tensor, nn.Module, torch.autograd.Function):
        graph: torch.fx.Graph = _trace.__wrapped__(self, *args, **kwargs)  # type: ignore[attr-defined]
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


def _tree_map_zip(function: Callable[..., Any], *trees: Any) -> Any:
    flat = [pytree.tree_flatten(tree, is_leaf=lambda node: isinstance(node, torch.Size)) for tree in trees]
    leaves = zip(*(leaves for leaves, _ in flat), strict=True)
    return pytree.tree_unflatten([function(*values) for values in leaves], flat[0][1])


def _replace_once(owner: type, name: str, replacement: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if original is not replacement:
        setattr(owner, name, functools.update_wrapper(replacement, original))


def _init_speedup(
    self: Any, model: Any, dummy_input: Any, masks_or_file: Any, map_location: Any = None, *args: Any, **kwargs: Any
) -> None:
    if isinstance(masks_or_file, (str, Path)):
        allowed: list[Any] = [(_plain_dict, "collections.defaultdict"), dict]
        with torch.serialization.safe_globals(allowed):
            masks_or_file = torch.load(masks_or_file, map_location)
    original = _init_speedup.__wrapped__  # type: ignore[attr-defined]
    original(self, model, dummy_input, masks_or_file, map_location, *args, **kwargs)


def _plain_dict(factory: type) -> dict[str, Any]:
    return {}


def _patch_loss(self: Any, patch: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
    compute_loss = self.trainer.compute_loss

    def patched(_: Any, model: Any, inputs: Any, return_outputs: bool = False, **extra: Any) -> Any:
        result = compute_loss(model, inputs, return_outputs, **extra)
        return (patch(result[0], inputs), result[1]) if return_outputs else patch(result, inputs)

    self.trainer.compute_loss = types.MethodType(patched, self.trainer)


def _init_optimizer_helpers(self: Any, pure_model: Any) -> None:
    import nni

    with _traced_default_optimizer(self.traced_trainer, nni):
        _init_optimizer_helpers.__wrapped__(self, pure_model)  # type: ignore[attr-defined]


@contextmanager
def _traced_default_optimizer(trainer: Any, nni: Any) -> Iterator[None]:
    """Put the Trainer's default optimizer, traced, where the user gave none that is traced."""
    if trainer.optimizer is not None and nni.common.is_traceable(trainer.optimizer):
        yield
        return
    cls, arguments = type(trainer).get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    trainer.get_optimizer_cls_and_kwargs = lambda args, model=None: (nni.trace(cls), arguments)
    trainer.optimizer = None
    try:
        trainer.optimizer = trainer.create_optimizer()
        yield
    finally:
        del trainer.get_optimizer_cls_and_kwargs
        trainer.optimizer = None
