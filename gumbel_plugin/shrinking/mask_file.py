"""Masks that travel: safetensors with a JSON header, read without unpickling anything."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gumbel_plugin.errors import DataError

FORMAT = "gumbel-plugin-masks-1"


def save_masks(path: str | Path, masks: Mapping[str, Mapping[str, Tensor | None]], **header: str) -> None:
    """Write masks to a file; it appears whole or not at all.

    Args:
        path: The file to write.
        masks: NNI's masks format, ``{module: {target: 0/1 tensor}}``.
        **header: More to note, for instance the model's name.
    """
    tensors = {
        f"{module}.{target}": (mask.detach() != 0).to("cpu", torch.uint8).contiguous()
        for module, targets in masks.items()
        for target, mask in targets.items()
        if mask is not None
    }
    closed = sum(int((mask == 0).sum()) for mask in tensors.values())
    total = sum(mask.numel() for mask in tensors.values())
    metadata = {"format": FORMAT, "torch": torch.__version__, "sparsity": f"{closed / max(total, 1):.6f}", **header}
    temporary = Path(f"{path}.partial")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, path)


def load_masks(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Read masks that `save_masks` wrote, as float tensors.

    Raises:
        DataError: If the file is missing, damaged, or no masks file.
    """
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
