"""Methods that engines see: what use a module's weights besides `forward`, called so that its hooks run around them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from nestopt.config import ConfigError
from nestopt.models import HopeLM
from nestopt.nn import CMS, SequenceMemory, TitansMixer

METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    SequenceMemory: ("init_state",),
    TitansMixer: ("init_state",),
    CMS: ("init_state", "read", "observe"),
    HopeLM: ("loss",),
}
"""Of each kind of module, the methods that others call and that use its weights."""


def users(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Yield the modules of `METHODS` in a model, inner ones first, each with its methods."""
    found = [
        (module, methods) for module in model.modules() for kind, methods in METHODS.items() if isinstance(module, kind)
    ]
    yield from reversed(found)


def weights_used(module: nn.Module) -> list[nn.Parameter]:
    """Return weights of modules within a module of `METHODS` that it uses itself, without calling these."""
    if isinstance(module, CMS):
        return list(module.levels.parameters())
    if isinstance(module, SequenceMemory):
        return list(module.start.parameters())
    if isinstance(module, TitansMixer):
        return [module.attention.persistent]
    if isinstance(module, HopeLM):  # for the teach signal
        return [*module.norm.parameters(), *module.head.parameters()]
    return []


def check_signal(model: nn.Module) -> None:
    """Raise ConfigError for a model that takes a backward pass within its forward one, where weights are cut up."""
    for module in model.modules():
        if isinstance(module, CMS) and module.taught and module.level.signal == "exact":
            allowed = (
                'this engine cuts weights up, and it takes a backward pass within the forward one; give "residual"'
            )
            raise ConfigError.refuse("model.mlp.signal", "exact", allowed)


def run_hooks_around(module: nn.Module, method: str) -> None:
    """Let a method of `module` go through the module's call, where engines put weights together and apart."""
    run = getattr(module, method)

    @functools.wraps(run)
    def called(*args: Any, **kwargs: Any) -> Any:
        before = module.__dict__.get("forward")
        module.forward = run
        try:
            return module(*args, **kwargs)
        finally:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.forward = before

    setattr(module, method, called)
