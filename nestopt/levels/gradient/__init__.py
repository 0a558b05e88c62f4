"""Levels of gradients: what optimizers are made of."""
