"""A run from a YAML file: its network, its data, its training, and the command line."""
