"""Masks that travel: safetensors with a JSON header, read without unpickling anything."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gumbel_plugin.errors import DataError, TargetError
from gumbel_plugin.files import write_bytes
from gumbel_plugin.versions import library_versions

FORMAT = "gumbel-plugin-masks-1"
_JSON = ("shapes", "versions")


def save_masks(
    path: str | Path, masks: Mapping[str, Mapping[str, Tensor | None]], model: str = "", **header: str
) -> None:
    """Write masks to a file; it appears whole or not at all.

    Args:
        path: The file to write.
        masks: NNI's masks format, ``{module: {target: 0/1 tensor}}``.
        model: The model's name.
        **header: More to note.
    """
    check_format(masks)
    tensors = {
        f"{module}.{target}": (mask.detach() != 0).to("cpu", torch.uint8).contiguous()
        for module, targets in masks.items()
        for target, mask in targets.items()
        if mask is not None
    }
    closed = sum(int((mask == 0).sum()) for mask in tensors.values())
    total = sum(mask.numel() for mask in tensors.values())
    metadata = {
        "format": FORMAT,
        "model": model,
        "shapes": json.dumps({name: list(mask.shape) for name, mask in tensors.items()}),
        "sparsity": f"{closed / max(total, 1):.6f}",
        "versions": json.dumps(library_versions()),
        **header,
    }
    write_bytes(path, save(tensors, metadata))


def check_format(masks: Any) -> None:
    """Refuse what are no masks in NNI's format, ``{module: {target: tensor or None}}``.

    Raises:
        TargetError: With the module whose masks are none.
    """
    if not isinstance(masks, Mapping):
        raise TargetError(f"masks are a {type(masks).__name__}; they must be {{module: {{target: 0/1 tensor}}}}")
    for name, targets in masks.items():
        fits = isinstance(name, str) and isinstance(targets, Mapping)
        if not fits or not all(isinstance(mask, Tensor | None) for mask in targets.values()):
            raise TargetError(
                f"masks of module {name!r} are {type(targets).__name__}; they must be {{target: 0/1 tensor}}"
            )


def load_masks(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Read masks, as float tensors on the CPU.

    Args:
        path: What `save_masks` wrote. A file of ``torch.save(pruner.get_masks(), path)``, as NNI's users have them,
            is read too, with a warning; no code in it is run.

    Raises:
        DataError: If the file is missing, damaged, or no masks file.
    """
    if zipfile.is_zipfile(path):
        return _load_torch_file(path)
    masks: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise DataError(f"{path} is no masks file: its header says {json.dumps(header)}")
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                module, _, target = key.rpartition(".")
                masks.setdefault(module, {})[target] = file.get_tensor(key).float()
    except (SafetensorError, OSError) as error:
        raise DataError(f"masks file {path} cannot be read: {error}") from error
    return masks


def read_header(path: str | Path) -> dict[str, Any]:
    """Return what a masks file says of itself: ``format``, ``model``, ``shapes``, ``sparsity``, ``versions``, and more.

    Raises:
        DataError: If the file is missing or damaged, or `save_masks` did not write it.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise DataError(f"masks file {path} cannot be read: {error}") from error
    if header.get("format") != FORMAT:
        raise DataError(f"{path} is no masks file: its header says {json.dumps(header)}")
    return {key: json.loads(value) if key in _JSON else value for key, value in header.items()}


def _load_torch_file(path: str | Path) -> dict[str, dict[str, Tensor]]:
    # get_masks() of NNI returns a defaultdict(dict); nothing but that and tensors is built.
    allowed: list[Any] = [(_plain_dict, "collections.defaultdict"), dict]
    safe_globals = getattr(torch.serialization, "safe_globals", nullcontext)  # torch >= 2.5
    try:
        with safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"masks file {path} cannot be read: {first_line}") from error
    masks: dict[str, dict[str, Tensor]] = {}
    for module, targets in content.items() if isinstance(content, dict) else (("", None),):
        if not isinstance(module, str) or not isinstance(targets, dict):
            raise DataError(f"{path} is no masks file: it holds no {{module: {{target: tensor}}}}")
        for target, mask in targets.items():
            if isinstance(mask, Tensor):
                masks.setdefault(module, {})[target] = mask.float()
            elif mask is not None:
                raise DataError(f"{path} is no masks file: its {module}.{target} is a {type(mask).__name__}")
    warnings.warn(
        f"{path} is a torch.save file; gumbel_plugin.shrinking.mask_file.save_masks writes masks without pickle",
        stacklevel=3,
    )
    return masks


def _plain_dict(factory: type) -> dict[str, Any]:
    return {}
