"""What a network costs, and what its topology shows."""
