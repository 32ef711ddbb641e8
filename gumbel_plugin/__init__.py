"""Learned masks for neural networks, and the exact removal of what they close."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gumbel_plugin.errors import GumbelPluginError
from gumbel_plugin.storage.versions import VERSION
from gumbel_plugin.torchvision_import import make_torchvision_importable

if TYPE_CHECKING:
    from gumbel_nni import GumbelPruner
    from gumbel_plugin.config import PruningConfig
    from gumbel_plugin.shrinking.equivalence import EquivalenceReport, verify_equivalence
    from gumbel_plugin.shrinking.pruned_file import load_pruned, save_pruned
    from gumbel_plugin.shrinking.shrink import shrink
    from gumbel_plugin.training.distillation import Distillation
    from gumbel_plugin.training.recalibration import recalibrate
    from gumbel_plugin.training.session import MaskingSession
    from gumbel_torch_pruning import GumbelGroupPruner

make_torchvision_importable()

__version__ = VERSION

__all__ = [
    "Distillation",
    "EquivalenceReport",
    "GumbelGroupPruner",
    "GumbelPluginError",
    "GumbelPruner",
    "MaskingSession",
    "PruningConfig",
    "load_pruned",
    "recalibrate",
    "save_pruned",
    "shrink",
    "verify_equivalence",
]

# Where the other public names live. Each is imported when it is asked for: who loads a small network needs torch and
# safetensors only, and who has no NNI does without `GumbelPruner`.
_PLACES = {
    "Distillation": "gumbel_plugin.training.distillation",
    "EquivalenceReport": "gumbel_plugin.shrinking.equivalence",
    "GumbelGroupPruner": "gumbel_torch_pruning",
    "GumbelPruner": "gumbel_nni",
    "MaskingSession": "gumbel_plugin.training.session",
    "PruningConfig": "gumbel_plugin.config",
    "load_pruned": "gumbel_plugin.shrinking.pruned_file",
    "recalibrate": "gumbel_plugin.training.recalibration",
    "save_pruned": "gumbel_plugin.shrinking.pruned_file",
    "shrink": "gumbel_plugin.shrinking.shrink",
    "verify_equivalence": "gumbel_plugin.shrinking.equivalence",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
