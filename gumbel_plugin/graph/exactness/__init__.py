"""Which channel groups can be cut exactly.

`analysis` follows a label for every channel through one forward: `layer_rules` knows the layers, `propagation` the
operations between them, `channel_labels` which labels have met. `empirical_check` removes units from a copy of the
model, for what a forward does not show.
"""

from gumbel_plugin.graph.exactness.analysis import Cut, ExactnessAnalysis, Treatment
from gumbel_plugin.graph.exactness.broadcasting import Broadcast
from gumbel_plugin.graph.exactness.channel_labels import Safety
from gumbel_plugin.graph.exactness.empirical_check import check_empirically, double_copy
from gumbel_plugin.graph.exactness.label_classes import LabelClasses

__all__ = [
    "Broadcast",
    "Cut",
    "ExactnessAnalysis",
    "LabelClasses",
    "Safety",
    "Treatment",
    "check_empirically",
    "double_copy",
]
