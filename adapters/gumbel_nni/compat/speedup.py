"""Repairs of NNI's ModelSpeedup."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nni.compression.speedup import ModelSpeedup, mask_updater, model_speedup, utils
from nni.compression.speedup.container import NodeInfo
from torch import nn
from torch.fx import immutable_collections as fx
from torch.utils import _pytree as pytree

from gumbel_nni.compat.patching import repair, replaces
from gumbel_plugin.shrinking.mask_file import load_masks


@repair
def values_last_used_by_size() -> bool:
    """Let speedup forget a value whose last use is ``x.size()`` or ``x.dim()``.

    Cause (a slip, whatever the versions): it deletes ``_output_randomize``; the attribute is ``output_randomize``.
    """

    def forget(info: Any) -> None:
        del info.output_randomize

    NodeInfo._output_randomize = property(fdel=forget)
    return True


@repair
def pytree_nodes_of_fx() -> bool:
    """Give torch back its own registration of fx's immutable list and dict.

    Cause: speedup registers them as pytree nodes over torch's own registration, without key paths and serialized names.
    ``tree_flatten_with_path`` and ``treespec_dumps``, which torch.export uses, then fail in the whole process.
    """
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


@replaces(utils, "tree_map_zip", mask_updater, model_speedup)
def size_is_a_leaf(original: Any, function: Callable[..., Any], *trees: Any) -> Any:
    """Keep a torch.Size in one piece in speedup's trees.

    Cause: torch.fx.experimental.proxy_tensor registers torch.Size as a pytree node, and recent torch imports it for its
    own ends (an older one where torch.compile was used). A mask tree then has one leaf where the value tree has four:
    "'tuple' object has no attribute 'numel'", or "Inconsistent tree nodes length". As the import may still
    come, the repair is made everywhere.
    """
    flat = [pytree.tree_flatten(tree, is_leaf=lambda node: isinstance(node, torch.Size)) for tree in trees]
    leaves = zip(*(leaves for leaves, _ in flat), strict=True)
    return pytree.tree_unflatten([function(*values) for values in leaves], flat[0][1])


@replaces(ModelSpeedup, "__init__")
def masks_by_path(
    original: Any,
    self: Any,
    model: Any,
    dummy_input: Any,
    masks_or_file: Any,
    map_location: Any = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Let ModelSpeedup load masks from a file: ``torch.save(pruner.get_masks())``, or ours.

    Cause: torch.load builds only what is on its list (torch 2.6 and later); a pruner's masks are a
    ``defaultdict(dict)``. Remedy: `load_masks`, which builds that and nothing else.
    """
    if isinstance(masks_or_file, (str, Path)):
        masks_or_file = {
            name: {target: mask.to(map_location or mask.device) for target, mask in targets.items()}
            for name, targets in load_masks(masks_or_file).items()
        }
    original(self, model, dummy_input, masks_or_file, map_location, *args, **kwargs)


@replaces(ModelSpeedup, "__init__")
def modes_and_statistics(original: Any, self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Let ModelSpeedup leave train/eval flags and the statistics of batch norms alone.

    Cause (a slip, whatever the versions): tracing runs the model in the mode it is in, so that a model in train mode
    gets the dummy input into its running means; and replaced modules come back in train mode.
    """
    with _eval_mode(model):
        original(self, model, *args, **kwargs)


@replaces(ModelSpeedup, "speedup_model", part_of=modes_and_statistics)
def _speedup_in_eval_mode(original: Any, self: Any) -> nn.Module:
    with _eval_mode(self.bound_model):
        model: nn.Module = original(self)
    return model


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Set all modules to eval mode; give those that have their names afterwards the flags of before."""
    flags = {name: module.training for name, module in model.named_modules()}
    try:
        for module in model.modules():
            module.training = False
        yield
    finally:
        for name, module in model.named_modules():
            module.training = flags.get(name, module.training)
