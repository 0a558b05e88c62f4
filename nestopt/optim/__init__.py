"""Levels on gradients: `torch.optim` optimizers."""

from nestopt.optim.factory import optimizer
from nestopt.optim.named import SGD, Adam, AdamW, Muon
from nestopt.optim.optimizer import Nested

__all__ = ["SGD", "Adam", "AdamW", "Muon", "Nested", "optimizer"]
