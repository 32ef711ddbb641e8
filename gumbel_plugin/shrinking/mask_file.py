"""Mask files: safetensors with a JSON header, read without unpickling anything."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gumbel_plugin.errors import DataError, TargetError, shorten
from gumbel_plugin.storage.files import check_readable
from gumbel_plugin.storage.mask_format import check_format
from gumbel_plugin.storage.tensor_file import DIGEST, read_tensors, require_digest, torch_content, write_tensors
from gumbel_plugin.storage.versions import library_versions

FORMAT = "gumbel-plugin-masks-2"
_OLD_FORMAT = "gumbel-plugin-masks-1"
"""Of files without a digest."""
_JSON = ("shapes", "versions")
_KIND = "masks file"


def save_masks(path: str | Path, masks: Mapping[str, Mapping[str, Tensor | None]], model: str = "") -> None:
    """Write masks to a file; it appears whole or not at all.

    Args:
        path: The file to write.
        masks: NNI's masks format, ``{module: {target: 0/1 tensor}}``.
        model: The model's name.

    Raises:
        TargetError: If they are no masks, or hold anything but 0 and 1.
        ConfigError: If the file cannot be written.
    """
    check_format(masks)
    tensors = {
        f"{module}.{target}": mask.detach().to("cpu", torch.uint8)
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
    }
    write_tensors(path, tensors, metadata)


def load_masks(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Read masks, as float tensors on the CPU.

    Args:
        path: What `save_masks` wrote. A file of ``torch.save(pruner.get_masks(), path)``, as NNI's users have them,
            is read too, with a warning; no code in it is run.

    Raises:
        DataError: If the file is missing, damaged, or no masks file, or a mask holds anything but 0 and 1.
    """
    check_readable(path, _KIND)
    with_pickle = zipfile.is_zipfile(path)
    content = torch_content(Path(path).read_bytes(), path, _KIND, _ALLOWED) if with_pickle else _tensor_masks(path)
    try:
        check_format(content)
    except TargetError as error:
        raise DataError(f"{path} is no masks file: {error}") from error
    if with_pickle:
        warnings.warn(
            f"{path} is a torch.save file; gumbel_plugin.shrinking.mask_file.save_masks writes masks without pickle",
            stacklevel=2,
        )
    masks: dict[str, dict[str, Tensor]] = {}
    for module, targets in content.items():
        for target, mask in targets.items():
            if mask is not None:
                masks.setdefault(module, {})[target] = mask.float()
    return masks


def read_header(path: str | Path) -> dict[str, Any]:
    """Return what a masks file says of itself: ``format``, ``model``, ``shapes``, ``sparsity`` and ``versions``.

    Raises:
        DataError: If the file is missing or damaged, or `save_masks` did not write it.
    """
    header = _read(path)[1]
    try:
        return {key: json.loads(value) if key in _JSON else value for key, value in header.items()}
    except (ValueError, RecursionError) as error:
        raise DataError(f"masks file {path} has a damaged header: {error}") from error


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, header = read_tensors(path, _KIND)
    if header.get("format") not in (FORMAT, _OLD_FORMAT):
        raise DataError(f"{path} is no masks file: its header says {shorten(json.dumps(header), 400)}")
    require_digest(path, _KIND, DIGEST in header, old=header["format"] == _OLD_FORMAT)
    return tensors, header


def _tensor_masks(path: str | Path) -> dict[str, dict[str, Tensor]]:
    masks: dict[str, dict[str, Tensor]] = {}
    for key, mask in _read(path)[0].items():
        module, _, target = key.rpartition(".")
        masks.setdefault(module, {})[target] = mask
    return masks


def _plain_dict(factory: type) -> dict[str, Any]:
    return {}


# get_masks() of NNI returns a defaultdict(dict); nothing but that and tensors is built.
_ALLOWED: list[Any] = [(_plain_dict, "collections.defaultdict"), dict]
