"""Transformers adapter: `GumbelPruningCallback`, for the Hugging Face Trainer."""

import gumbel_plugin  # noqa: F401  (makes torchvision, and with it transformers, importable)
from gumbel_transformers.trainer_callback import GumbelPruningCallback

__all__ = ["GumbelPruningCallback"]
