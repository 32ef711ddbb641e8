"""Which channel groups can be cut exactly.

`judge` follows a dye for every channel through one forward: `layers` knows the layers, `flow` the operations between
them, `dyes` keeps the books. `trial` removes units from a copy of the model, for what a forward does not show.
"""

from gumbel_plugin.graph.exactness.analysis import Cut, Judge, Treatment
from gumbel_plugin.graph.exactness.channel_labels import Safety
from gumbel_plugin.graph.exactness.empirical_check import tried

__all__ = ["Cut", "Judge", "Safety", "Treatment", "tried"]
