"""Which channel groups can be cut exactly: dyes for every channel, followed through one forward.

`judge` asks the questions, `layers` knows the layers, `flow` the operations between them, `dyes` the bookkeeping.
"""

from gumbel_torch_pruning.exactness.judge import Cut, Judge, Treatment

__all__ = ["Cut", "Judge", "Treatment"]
