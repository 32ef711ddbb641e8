"""What a layer is: its geometry, its weight, how a model is called."""
