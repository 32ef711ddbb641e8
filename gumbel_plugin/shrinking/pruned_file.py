"""Files of small networks: safetensors with a JSON header that says how to rebuild one from its dense factory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError, DataError, LifecycleError, nearest, shown
from gumbel_plugin.graph.record import kept_of, note_kept, removed_blocks
from gumbel_plugin.graph.residual_blocks import residual_block
from gumbel_plugin.layers.compact_attention import COMPACT
from gumbel_plugin.layers.model_check import refuse_wrapped
from gumbel_plugin.layers.weights import modules_with_gates
from gumbel_plugin.storage.json_form import read_json
from gumbel_plugin.storage.tensor_file import DIGEST, read_tensors, require_digest, write_tensors
from gumbel_plugin.storage.versions import VERSION

FORMAT = "gumbel-plugin-network-2"
_OLD_FORMAT = "gumbel-plugin-network-1"
"""Of files without a digest."""
_KIND = "network file"
HINT = "this is a shrunk network: rebuild it with gumbel_plugin.load_pruned(path, factory)"
"""The name of an empty tensor in every file. Loaded into a dense network, torch's own error names it as unexpected."""

_MOST = 2**31
"""No size or index is larger."""

_SIZE, _INDEX = range(1 - _MOST, _MOST), range(_MOST)
_REQUIRED = {"kept": {str: [(None, [_INDEX])]}, "sizes": {str: {str: (_SIZE, [_SIZE])}}, "replaced": {str: str}}
_OPTIONAL = {"blocks": [str], "input_shape": (None, [_INDEX])}
"""What a network file says as JSON."""


def save_pruned(path: str | Path, model: nn.Module, /, **header: Any) -> None:
    """Write a shrunk network to a file, without pickle; it appears whole or not at all.

    The file holds the weights and, as JSON, the kept indices of every tensor that lost entries, the sizes that the
    layers have, the residual blocks that are gone, and the versions that wrote it.

    Args:
        path: The file to write.
        model: What `gumbel_plugin.shrink` or a pruner returned (or any model whose channels were removed).
        **header: More to note, plain values.

    Raises:
        ConfigError: If the model has state that is no tensor, or the file cannot be written.
        LifecycleError: If the model still has gates, or wrappers of NNI's.
    """
    refuse_wrapped(model, "save_pruned")
    if modules_with_gates(model):
        raise LifecycleError(
            "save_pruned got a model that is still gated, and whose channels are all there: extract() and detach() its "
            "session first, and shrink it"
        )
    state = model.state_dict()
    odd = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ConfigError(f"the model's state {odd!r} is no tensor; such a model cannot be written without pickle")
    kept = {name: [None if d is None else d.tolist() for d in dims] for name, dims in kept_of(model).items()}
    about = {
        "versions": {"torch": torch.__version__, "gumbel-plugin": VERSION},
        "kept": {name: dims for name, dims in kept.items() if name in state},
        "sizes": {name: sizes for name, module in model.named_modules() if (sizes := _sizes(module))},
        "blocks": list(removed_blocks(model)),
        "replaced": {name: type(m).__name__ for name, m in model.named_modules() if type(m) in COMPACT.values()},
        **header,
    }
    write_tensors(path, {**state, HINT: torch.empty(0)}, {FORMAT: json.dumps(about)})


def load_pruned(path: str | Path, factory: Callable[[], nn.Module]) -> nn.Module:
    """Rebuild a shrunk network from a file and the function that built the dense one.

    Example::

        small = load_pruned("small.safetensors", lambda: torchvision.models.resnet18(num_classes=10))

    Args:
        path: What `save_pruned` wrote, or a run's ``small.safetensors``.
        factory: Builds the dense network; its weights do not matter.

    Returns:
        The small network, in train mode if the factory's is.

    Raises:
        DataError: If the file is missing, damaged or another one, or the factory builds another network.
    """
    tensors, header = _read(path)
    tensors.pop(HINT, None)
    model = factory()
    dense = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in header.get("blocks", ()):
        _remove_block(model, name, path)
    for name, kind in header["replaced"].items():
        _replace(model, name, kind, path)
    _add_biases(model, tensors)
    _check_names(path, model, tensors)
    kept = {name: _kept(path, name, tensors, dims, dense.get(name)) for name, dims in header["kept"].items()}
    _set_sizes(model, header["sizes"], path)
    _fit_tensors(model, tensors)
    model.load_state_dict(tensors)
    note_kept(model, kept)
    return model


def read_header(path: str | Path) -> dict[str, Any]:
    """Return what a network file says of itself: versions, kept, sizes, replaced, and what else was noted.

    Raises:
        DataError: If the file is missing, damaged, or no network file.
    """
    return _read(path)[1]


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = read_tensors(path, _KIND)
    old = FORMAT not in metadata
    text = metadata.get(_OLD_FORMAT) if old else metadata[FORMAT]
    if text is None:
        found = shown(sorted(metadata))
        raise DataError(f"{path} is no network file of this version: its header has {found}, not {FORMAT!r}")
    require_digest(path, _KIND, DIGEST in metadata, old=old)
    return tensors, read_json(text, _REQUIRED, _OPTIONAL, f"network file {path} has a damaged header")


def _sizes(module: nn.Module) -> dict[str, Any]:
    """Return a module's whole numbers and tuples of them, among which are its sizes."""
    found = {}
    for key, value in vars(module).items():
        plain = isinstance(value, int) and not isinstance(value, bool)
        several = isinstance(value, tuple) and value and all(type(item) is int for item in value)
        if (plain or several) and not key.startswith("_"):
            found[key] = value
    return found


def _set_sizes(model: nn.Module, sizes: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Give modules the sizes that they have in the file; nothing but sizes that they have already is set."""
    modules = dict(model.named_modules())
    for name, found in sizes.items():
        if name not in modules:
            raise DataError(f"{path}: the factory's network has no module {shown(name)}{nearest(name, modules)}")
        module = modules[name]
        own = _sizes(module)
        most = None if type(module).__module__.startswith("torch.") else _MOST  # a layer of a user's may count calls
        for key, value in found.items():
            if key not in own:
                raise DataError(f"{path}: {shown(key)} is no size of {name!r}{nearest(key, own)}")
            old, new = own[key], tuple(value) if isinstance(value, list) else value
            if not _fits(new, old, most):
                raise DataError(f"{path}: {name}.{key} = {shown(new)} does not fit the factory's, which is {old}")
            setattr(module, key, new)


def _fits(new: Any, old: Any, most: int | None) -> bool:
    """Return whether a size is the dense network's, or a smaller one; one up to a limit where that is given."""
    if isinstance(old, tuple) or isinstance(new, tuple):
        same = isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new)
        return same and all(_fits(a, b, most) for a, b in zip(new, old, strict=True))
    return bool(new == old or 0 <= new <= (old if most is None else most))


def _kept(
    path: str | Path,
    name: str,
    tensors: Mapping[str, Tensor],
    dimensions: Sequence[Sequence[int] | None],
    dense: tuple[int, ...] | None,
) -> tuple[Tensor | None, ...]:
    """Return the kept indices of a tensor; they must be those of its entries in the dense tensor, in their order."""
    shape = tuple(tensors[name].shape) if name in tensors else ()
    if dense is None or len(dense) != len(shape) or dense == shape:  # new projections, or a factory that is small too
        dense = (_MOST,) * len(shape)
    found = tuple(None if indices is None else torch.tensor(indices, dtype=torch.int64) for indices in dimensions)
    fits = len(found) == len(shape) and all(
        left is None or (len(left) == size and bool((left.diff() > 0).all()) and bool((left < most).all()))
        for left, size, most in zip(found, shape, dense, strict=True)
    )
    if not fits:
        raise DataError(f"{path} has a damaged header: what it says was kept of {shown(name)} does not fit the tensor")
    return found


def _remove_block(model: nn.Module, name: str, path: str | Path) -> None:
    modules = dict(model.named_modules())
    block = residual_block(modules[name]) if name in modules else "it has no such module"
    if isinstance(block, str):
        raise DataError(f"{path}: the factory's network has no residual block {shown(name)}: {block}")
    model.set_submodule(name, block.remainder())


def _replace(model: nn.Module, name: str, kind: str, path: str | Path) -> None:
    """Put the kind of attention layer in place that can have lost heads."""
    layers = dict(model.named_modules())
    if kind not in COMPACT or not name or name not in layers:
        raise DataError(f"{path}: the factory's network has no attention layer {shown(name)}{nearest(name, layers)}")
    if type(layers[name]).__name__ == kind:
        return
    try:
        layer = COMPACT[kind](layers[name])
    except (AttributeError, TypeError) as error:
        raise DataError(f"{path}: the factory's {name!r} is no attention layer that {kind} replaces") from error
    model.set_submodule(name, layer)


def _add_biases(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give layers the biases that they got when the constants of removed channels were folded in."""
    for name, module in model.named_modules():
        stored = tensors.get(f"{name}.bias")
        if stored is not None and stored.dim() == 1 and module._parameters.get("bias", stored) is None:
            module._parameters["bias"] = nn.Parameter(torch.empty_like(stored))


def _check_names(path: str | Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    names = set(model.state_dict())
    for name in sorted(names ^ set(tensors)):
        have, lack = ("file", "network of the factory") if name in tensors else ("network of the factory", "file")
        raise DataError(f"{path}: the {have} has a tensor {shown(name)}, the {lack} has not; is it another network?")
    for name, tensor in model.state_dict().items():
        stored = tensors[name].shape
        if tensor.is_complex() != tensors[name].is_complex():
            raise DataError(f"{path}: {name!r} is {tensors[name].dtype} in the file, the factory's is {tensor.dtype}")
        if tensor.dim() != len(stored) or any(a < b for a, b in zip(tensor.shape, stored, strict=True)):
            raise DataError(
                f"{path}: {name!r} is {tuple(stored)} in the file and {tuple(tensor.shape)} in the "
                "network of the factory; the dense network cannot be the smaller one"
            )


def _fit_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers the shapes that they have in the file; what was shared stays shared."""
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for own in (module._parameters, module._buffers):
            for key, old in list(own.items()):
                stored = tensors.get(f"{name}.{key}" if name else key)
                if old is None or stored is None or stored.shape == old.shape:
                    continue
                fresh: Tensor = old.new_empty(stored.shape)
                if isinstance(old, nn.Parameter):
                    fresh = made.setdefault(id(old), nn.Parameter(fresh, old.requires_grad))
                own[key] = fresh
