"""Which channel groups can be cut exactly.

`judge` follows a dye for every channel through one forward: `layers` knows the layers, `flow` the operations between
them, `dyes` keeps the books. `trial` removes units from a copy of the model, for what a forward does not show.
"""

from gumbel_torch_pruning.exactness.dyes import Safety
from gumbel_torch_pruning.exactness.judge import Cut, Judge, Treatment
from gumbel_torch_pruning.exactness.trial import tried

__all__ = ["Cut", "Judge", "Safety", "Treatment", "tried"]
