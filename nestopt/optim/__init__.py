"""Levels on gradients: `torch.optim` optimizers."""

from nestopt.optim.execute.functional import functional_step
from nestopt.optim.factory import optimizer
from nestopt.optim.nested_named import DGD, M3, DeepMomentum, DeltaMomentum, Shampoo
from nestopt.optim.optimizer import Nested
from nestopt.optim.sharded.by_hand import shard
from nestopt.optim.torch_named import SGD, Adam, AdamW, Muon
from nestopt.optim.views import Split

__all__ = [
    "DGD",
    "M3",
    "SGD",
    "Adam",
    "AdamW",
    "DeepMomentum",
    "DeltaMomentum",
    "Muon",
    "Nested",
    "Shampoo",
    "Split",
    "functional_step",
    "optimizer",
    "shard",
]
