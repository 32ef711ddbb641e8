"""The one compatibility shim of the core: torchvision beside a torch that cannot load its C++ library.

The registry's torchvision wheel is built for CUDA. Beside a CPU build of torch its C++ library does not load, and
``import torchvision`` (hence nni, lightning, transformers and torch_pruning, which import it) fails with "operator
torchvision::nms does not exist". Its models, transforms and data sets need none of those operators: it is enough that
their schemas are declared before torchvision registers fake implementations for them.

Whether the library loads is torchvision's own decision, taken at its import; this module only watches for the outcome.
Where the library loads, or where torchvision is laid out in a way not seen here, nothing is declared.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

# Seen with torchvision 0.28: it registers fake implementations of these without asking whether the library is there.
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def make_torchvision_importable() -> None:
    """Let torchvision be imported, now or later, where its C++ library does not load; safe to call again."""
    if not any(type(finder).__qualname__ == _AfterExtension.__qualname__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterExtension())


class _AfterExtension(importlib.abc.MetaPathFinder):
    """Finds no module; it declares operators between two steps of torchvision's import.

    ``torchvision/__init__.py`` first imports ``torchvision.extension``, which tries to load the C++ library, and then
    its other submodules. The first of these to be looked for is the moment at which torchvision's decision is known.
    """

    def __init__(self) -> None:
        self._libraries: list[torch.library.Library] = []  # a Library unregisters its operators when it is collected

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return None, so that the import goes on as it would without this finder."""
        if fullname.startswith("torchvision.") and not self._libraries and _library_failed_to_load():
            library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
            for name, signature in _SCHEMAS.items():
                if not hasattr(torch.ops.torchvision, name):
                    library.define(name + signature)  # type: ignore[no-untyped-call]
            self._libraries.append(library)
        return None


def _library_failed_to_load() -> bool:
    """Whether torchvision has tried to load its C++ library, and could not."""
    extension = sys.modules.get("torchvision.extension")
    if extension is None or getattr(extension.__spec__, "_initializing", False):
        return False
    has_operators = getattr(extension, "_has_ops", None)
    return has_operators is not None and not has_operators()
