"""How a masked network becomes a small one, and the proof that it is equal."""
