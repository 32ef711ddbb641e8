"""Which channels belong together, and their removal, on Torch-Pruning's dependency graph."""
