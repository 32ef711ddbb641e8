"""Small networks that travel: safetensors with a JSON header that says how to rebuild one from its dense factory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from gumbel_plugin.errors import ConfigError, DataError, MissingExtraError, nearest
from gumbel_plugin.files import write_bytes
from gumbel_plugin.learning.blocks import residual_block
from gumbel_plugin.shrinking.blocks import removed_blocks, replace_block
from gumbel_plugin.shrinking.kept import kept_of, note_kept

FORMAT = "gumbel-plugin-network-1"
HINT = "this is a shrunk network: rebuild it with gumbel_plugin.load_pruned(path, factory)"
"""The name of an empty tensor in every file. Loaded into a dense network, torch's own error names it as unexpected."""

_COMPACT_MODULES = "gumbel_torch_pruning.attention_modules"
"""Where attention layers live that lost heads, of a class that torch's own layers are replaced by."""


def save_pruned(path: str | Path, model: nn.Module, /, **header: Any) -> None:
    """Write a shrunk network to a file, without pickle; it appears whole or not at all.

    The file holds the weights and, as JSON, the kept indices of every tensor that lost entries, the sizes that the
    layers have, the residual blocks that are gone, and the versions that wrote it.

    Args:
        path: The file to write.
        model: What `gumbel_plugin.shrink` or a pruner returned (or any model whose channels were removed).
        **header: More to note, plain values.

    Raises:
        ConfigError: If the model has state that is no tensor.
    """
    state = model.state_dict()
    odd = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ConfigError(f"the model's state {odd!r} is no tensor; such a model cannot be written without pickle")
    kept = {name: [None if d is None else d.tolist() for d in dims] for name, dims in kept_of(model).items()}
    about = {
        "versions": {"torch": torch.__version__, "gumbel-plugin": _own_version()},
        "kept": {name: dims for name, dims in kept.items() if name in state},
        "sizes": {name: sizes for name, module in model.named_modules() if (sizes := _sizes(module))},
        "blocks": list(removed_blocks(model)),
        "replaced": {n: type(m).__name__ for n, m in model.named_modules() if type(m).__module__ == _COMPACT_MODULES},
        **header,
    }
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    content = save({**tensors, HINT: torch.empty(0)}, {FORMAT: json.dumps(about)})  # one entry: their order is random
    write_bytes(path, content)


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
        MissingExtraError: If attention heads were removed and torch-pruning is not installed.
    """
    header = read_header(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name != HINT}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"network file {path} cannot be read: {error}") from error
    model = factory()
    for name in header.get("blocks", ()):
        _remove_block(model, name, path)
    for name, kind in header["replaced"].items():
        _replace(model, name, kind, path)
    _add_biases(model, tensors)
    _check_names(path, model, tensors)
    modules = dict(model.named_modules())
    for name, sizes in header["sizes"].items():
        module = modules.get(name)
        if module is None:
            raise DataError(f"{path}: the factory's network has no module {name!r}{nearest(name, modules)}")
        for key, value in sizes.items():
            setattr(module, key, tuple(value) if isinstance(value, list) else value)
    _fit_tensors(model, tensors)
    model.load_state_dict(tensors)
    kept = header["kept"].items()
    note_kept(model, {name: tuple(None if d is None else torch.tensor(d) for d in dims) for name, dims in kept})
    return model


def read_header(path: str | Path) -> dict[str, Any]:
    """Return what a network file says of itself: versions, kept, sizes, replaced, and what else was noted.

    Raises:
        DataError: If the file is missing, damaged, or no network file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DataError(f"network file {path} cannot be read: {error}") from error
    if FORMAT not in metadata:
        raise DataError(f"{path} is no network file of this version: its header has {sorted(metadata)}, not {FORMAT!r}")
    try:
        header: dict[str, Any] = json.loads(metadata[FORMAT])
    except ValueError as error:
        raise DataError(f"network file {path} has a damaged header: {error}") from error
    lists = ("kept", "sizes", "replaced")
    if not isinstance(header, dict) or any(not isinstance(header.get(key), dict) for key in lists):
        raise DataError(f"network file {path} has a damaged header: it lacks one of {', '.join(lists)}")
    return header


def _sizes(module: nn.Module) -> dict[str, Any]:
    """Return a module's whole numbers and tuples of them, among which are its sizes."""
    found = {}
    for key, value in vars(module).items():
        plain = isinstance(value, int) and not isinstance(value, bool)
        several = isinstance(value, tuple) and value and all(type(item) is int for item in value)
        if (plain or several) and not key.startswith("_"):
            found[key] = value
    return found


def _remove_block(model: nn.Module, name: str, path: str | Path) -> None:
    modules = dict(model.named_modules())
    block = residual_block(modules[name]) if name in modules else "it has no such module"
    if isinstance(block, str):
        raise DataError(f"{path}: the factory's network has no residual block {name!r}: {block}")
    replace_block(model, name, block)


def _replace(model: nn.Module, name: str, kind: str, path: str | Path) -> None:
    """Put the kind of attention layer in place that can have lost heads."""
    try:
        from gumbel_torch_pruning import attention_modules
    except ImportError as error:
        raise MissingExtraError("torch-pruning", "torch-pruning") from error
    parent, _, child = name.rpartition(".")
    layers = dict(model.named_modules())
    if parent not in layers or name not in layers or not hasattr(attention_modules, kind):
        raise DataError(f"{path}: the factory's network has no attention layer {name!r}{nearest(name, layers)}")
    if type(layers[name]).__name__ == kind:
        return
    make = getattr(attention_modules, kind)
    setattr(layers[parent], child, getattr(make, "of", make)(layers[name]))


def _add_biases(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give layers the biases that they got when the constants of removed channels were folded in."""
    for name, module in model.named_modules():
        stored = tensors.get(f"{name}.bias")
        if stored is not None and module._parameters.get("bias", stored) is None:
            module._parameters["bias"] = nn.Parameter(torch.empty_like(stored))


def _check_names(path: str | Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    names = set(model.state_dict())
    for name in sorted(names ^ set(tensors)):
        have, lack = ("file", "network of the factory") if name in tensors else ("network of the factory", "file")
        raise DataError(f"{path}: the {have} has a tensor {name!r}, the {lack} has not; is it another network?")
    for name, tensor in model.state_dict().items():
        stored = tensors[name].shape
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


def _own_version() -> str:
    from gumbel_plugin import __version__

    return __version__
