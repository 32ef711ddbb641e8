"""NNI adapter: `GumbelPruner`, `speedup`, and NNI 3.0 made to run on today's torch (applied on import)."""

from gumbel_nni import compat

compat.apply()

from gumbel_nni.any_masks import speedup  # noqa: E402
from gumbel_nni.compat.unwrapping import unwrapped_copy  # noqa: E402
from gumbel_nni.config_evaluator import evaluator_from_config  # noqa: E402
from gumbel_nni.gumbel_pruner import GumbelPruner  # noqa: E402

__all__ = ["GumbelPruner", "compat", "evaluator_from_config", "speedup", "unwrapped_copy"]
