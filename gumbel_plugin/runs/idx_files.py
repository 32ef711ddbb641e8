"""The file format of MNIST and its successors."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gumbel_plugin.errors import DataError


def read_idx(path: Path) -> Tensor:
    """Read an idx file of unsigned bytes, gzipped if its name ends in ``.gz``.

    The format (LeCun, "The MNIST database"): two zero bytes, the type (8), the number of dimensions, each dimension as
    a big-endian 32-bit integer, then the bytes, the last dimension fastest.

    Returns:
        A uint8 tensor of the shape in the header, of at least one element.

    Raises:
        DataError: The file cannot be read, is of another type, or is shorter or longer than in its header.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise DataError(f"{path} is not an idx file of unsigned bytes: it starts with {content[:4].hex()}")
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    start = 4 + 4 * len(shape)
    if not len(content) - start == math.prod(shape) > 0:
        raise DataError(f"{path} is damaged: {len(content) - start} bytes follow a header of shape {shape}")
    values = np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    return torch.from_numpy(values.copy())  # a copy, because bytes are read-only
