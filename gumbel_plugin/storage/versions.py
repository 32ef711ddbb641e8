"""Which libraries are here."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

VERSION = "0.1.0"
"""Of gumbel-plugin."""

_LIBRARIES = ("gumbel-plugin", "torch", "torchvision", "torch-pruning", "nni", "lightning")


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a result depends on."""
    found = {"python": platform.python_version()}
    for package in _LIBRARIES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # names the build too, as 2.14.1+cu130
    return found
