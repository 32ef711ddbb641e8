"""NNI 3.0 on today's torch, Python, Lightning and Transformers, repaired from outside.

NNI's last release dates from 2023; on torch 2.13 its QuickStart fails at ``ModelSpeedup`` (microsoft/nni#5768). Each
repair mends one breakage: a function with cause and remedy, registered in `gumbel_nni.compat.patching` and made by
`apply` where the breakage is. Replaced functions have NNI's own as ``__wrapped__``.
"""

from __future__ import annotations

import platform
import warnings
from importlib.metadata import version

import torch

from gumbel_nni.compat.patching import REPAIRS
from gumbel_plugin.errors import IncompatibleLibraryError, MissingExtraError
from gumbel_plugin.torchvision_import import make_torchvision_importable


def apply() -> tuple[str, ...]:
    """Make NNI work here; call it before NNI is imported, or at any time after. Idempotent.

    Returns:
        The names of the repairs that are in force.

    Raises:
        MissingExtraError: If NNI is not installed.
        IncompatibleLibraryError: If NNI cannot be imported on this Python, or with these libraries.
    """
    make_torchvision_importable()  # nni.compression imports it, and catches ImportError only
    _import_nni()
    from gumbel_nni.compat import (  # noqa: F401  (each imports NNI, and registers its repairs)
        compressors,
        evaluator_repairs,
        messages,
        speedup,
        trace_repairs,
        training_length,
        transposed,
    )

    return tuple(name for name, steps in REPAIRS.items() if all(step() for step in steps))


def _import_nni() -> None:
    """Import NNI without the warnings of its own import: they are errors under ``-W error``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import nni.common.concrete_trace_utils
            import nni.compression.pruning
            import nni.compression.speedup  # noqa: F401
        except Exception as error:  # what NNI raises where a library or a Python is not the one that it was made for
            if isinstance(error, ImportError) and (error.name or "").split(".")[0] == "nni":
                raise MissingExtraError("nni", "nni") from error
            raise IncompatibleLibraryError(
                f"NNI {version('nni')} does not work with Python {platform.python_version()} and torch "
                f"{torch.__version__} here ({type(error).__name__}: {error}); the rest of gumbel_plugin does without it"
            ) from error
