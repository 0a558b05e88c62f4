"""Levels on gradients: `torch.optim` optimizers. Those that plugins register are here too, by their names."""

from typing import Any

from nestopt.core.hookspecs import Register, hookimpl
from nestopt.core.registry import UnknownName, registry
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


@hookimpl
def nestopt_register_optimizers(register: Register) -> None:
    """Register the optimizers that have names."""
    for cls in (SGD, Adam, AdamW, Muon, M3, DGD, Shampoo, DeltaMomentum, DeepMomentum):
        register(cls.__name__, cls)


def __getattr__(name: str) -> Any:
    """Optimizers of plugins, by name."""
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return registry.get("optimizer", name)
    except UnknownName as error:
        raise AttributeError(str(error)) from None
