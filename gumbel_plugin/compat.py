"""The one compatibility shim of the core: torchvision beside a torch without CUDA.

The registry's torchvision wheel is built for CUDA. Beside a CPU build of torch its C++ library cannot be loaded,
and ``import torchvision`` (hence nni, lightning, transformers and torch_pruning, which import it) fails with
"operator torchvision::nms does not exist". Its models, transforms and data sets need none of those operators: it is
enough that their schemas are declared before torchvision asks for them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

# Seen with torchvision 0.28: these two are registered without asking whether the C++ library is there.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library unregisters its operators when it is collected


def make_torchvision_importable() -> bool:
    """Declare torchvision's operator schemas where its C++ library does not load.

    Does nothing where torchvision is missing, already declared, or loads as it is. Safe to call again.

    Returns:
        True if the schemas had to be declared (now or earlier).
    """
    if _declared:
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or _has_operators():
        return False
    library = Path(next(iter(spec.submodule_search_locations))) / "_C.so"
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError:
        fragment = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for schema in _SCHEMAS:
            fragment.define(schema)  # type: ignore[no-untyped-call]
        _declared.append(fragment)
        return True
    return False


def _has_operators() -> bool:
    return hasattr(torch.ops.torchvision, "nms")
