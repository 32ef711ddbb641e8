"""Lightning adapter: `GumbelPruning`, a callback for any Trainer of ``lightning`` or ``pytorch_lightning``."""

from gumbel_lightning.lightning_callback import GumbelPruning

__all__ = ["GumbelPruning"]
