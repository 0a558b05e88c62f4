"""What some levels know beside the gradient: statistics of the inputs of layers, with the gradient's life."""
