"""Learned masks for neural networks, and the exact removal of what they close."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gumbel_plugin.torchvision_import import make_torchvision_importable

make_torchvision_importable()

from gumbel_plugin.config import PruningConfig  # noqa: E402
from gumbel_plugin.errors import GumbelPluginError, MissingExtraError  # noqa: E402
from gumbel_plugin.shrinking.equivalence import EquivalenceReport, verify_equivalence  # noqa: E402
from gumbel_plugin.shrinking.pruned_file import load_pruned, save_pruned  # noqa: E402
from gumbel_plugin.shrinking.shrink import shrink  # noqa: E402
from gumbel_plugin.storage.versions import VERSION  # noqa: E402
from gumbel_plugin.training.session import MaskingSession  # noqa: E402

if TYPE_CHECKING:
    from gumbel_nni import GumbelPruner
    from gumbel_torch_pruning import GumbelGroupPruner

__version__ = VERSION

# What lives in an adapter: (its package, the package that must be installed, the extra that installs it).
_ADAPTERS = {
    "GumbelPruner": ("gumbel_nni", "nni", "nni"),
    "GumbelGroupPruner": ("gumbel_torch_pruning", "torch_pruning", "torch-pruning"),
}

__all__ = [
    "EquivalenceReport",
    "GumbelGroupPruner",
    "GumbelPluginError",
    "GumbelPruner",
    "MaskingSession",
    "PruningConfig",
    "load_pruned",
    "save_pruned",
    "shrink",
    "verify_equivalence",
]


def __getattr__(name: str) -> Any:
    if name not in _ADAPTERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    adapter, package, extra = _ADAPTERS[name]
    try:
        return getattr(import_module(adapter), name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(package, extra) from error
