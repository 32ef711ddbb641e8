"""Which channel groups can be cut exactly.

`analysis` follows a label for every channel through one forward: `layers` knows the layers, `flow` the operations between
them, `labels` keeps the books. `check` removes units from a copy of the model, for what a forward does not show.
"""

from gumbel_plugin.graph.exactness.analysis import Cut, ExactnessAnalysis, Treatment
from gumbel_plugin.graph.exactness.channel_labels import Safety
from gumbel_plugin.graph.exactness.empirical_check import check_empirically

__all__ = ["Cut", "ExactnessAnalysis", "Safety", "Treatment", "check_empirically"]
