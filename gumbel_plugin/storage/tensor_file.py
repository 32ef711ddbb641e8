"""Files of tensors that are safe to read: no code in them is run, and a digest says whether they are whole.

Most are safetensors, whose metadata holds the digest: of the metadata, and of the name, data type, shape and bytes of
every tensor. It does not sign anything: who can write the file can write its digest too.
"""

from __future__ import annotations

import ctypes
import io
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gumbel_plugin.errors import DataError
from gumbel_plugin.storage.files import check_readable, write_bytes

DIGEST = "digest"
"""The metadata's key of the digest."""


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata with their digest; the file appears whole or not at all.

    The same content is the same file, byte for byte.

    Args:
        path: The file to write.
        tensors: By name; they are copied to the CPU. Tensors that share memory are written one by one.
        metadata: What else the file says.

    Raises:
        ConfigError: If the file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, _in_order(save(plain, {**metadata, DIGEST: _digest(plain, metadata)})))


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a file, and check its digest if it has one.

    Whether a file may lack a digest depends on its format: see `require_digest`.

    Args:
        path: The file.
        kind: What it is, for messages: ``"masks file"``.

    Raises:
        DataError: If the file is missing, no safetensors file, or not what its digest was computed from.
    """
    check_readable(path, kind)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            intact = DIGEST not in metadata or metadata[DIGEST] == _digest(tensors, metadata)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise DataError(f"{kind} {path} cannot be read: {error}") from error
    if not intact:
        raise DataError(_damaged(path, kind))
    return tensors, metadata


def require_digest(path: str | Path, kind: str, found: bool, *, old: bool) -> None:
    """Refuse a file without a digest, unless it is of an old format, whose files had none: then warn.

    Raises:
        DataError: If so.
    """
    if old:
        warnings.warn(
            f"{kind} {path} was written by gumbel-plugin 0.1.0, without a digest: damage to it may go unnoticed; write "
            "it anew with this version",
            stacklevel=4,
        )
    elif not found:
        raise DataError(_damaged(path, kind))


def torch_content(content: bytes, path: str | Path, kind: str, allowed: Sequence[Any] = ()) -> Any:
    """Return what ``torch.save`` wrote, without running code in it.

    Args:
        content: The bytes that it wrote.
        path: Where they come from, for messages.
        kind: What that is, for messages.
        allowed: More classes that may be built, as ``torch.serialization.safe_globals`` takes them.

    Raises:
        DataError: If the content is damaged or holds anything else than plain values, tensors and what is allowed.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which torch.save does not do")  # nor may it unpack to terabytes
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise whatever its instructions lead to
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{kind} {path} cannot be read: {reason}") from error


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = sha256(json.dumps({k: v for k, v in metadata.items() if k != DIGEST}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))  # without numpy
    return digest.hexdigest()


def _in_order(content: bytes) -> bytes:
    """Return a safetensors file with its metadata in alphabetical order; the library's is random."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _damaged(path: str | Path, kind: str) -> str:
    return (
        f"{kind} {path} was damaged or changed after it was written: its digest does not fit its content; write it "
        "anew or take a good copy"
    )
