"""How files are written and read: whole or not at all, and nothing in them is run."""
