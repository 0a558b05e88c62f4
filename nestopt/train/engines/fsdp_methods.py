"""Methods that engines see: what use a module's weights besides `forward`, called so that its hooks run around them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

from nestopt.models import HopeLM
from nestopt.nn import CMS, SequenceMemory

METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    SequenceMemory: ("init_state",),
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
    if isinstance(module, HopeLM):  # for the teach signal
        return [*module.norm.parameters(), *module.head.parameters()]
    return []


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
