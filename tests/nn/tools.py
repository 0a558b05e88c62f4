"""Layers for tests: their levels, and what they are compared by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import nestopt
from nestopt.core import Gate, Level
from nestopt.core.features import Elu
from nestopt.core.memories import Mlp, Window
from nestopt.core.part import Heads
from nestopt.core.retentions import Decay
from nestopt.core.tree import leaves
from nestopt.levels import adam, attention, deltanet, gd, linear_attention, momentum, self_modifying, titans, ttt
from nestopt.nn import SequenceMemory
from tests.levels.gradient.tools import LINKS

F64 = torch.float64

OF_THEIR_OWN = {"cms", "mac", "mag", "mal"}
"""Registered levels that other layers run."""

REFUSED = {"adamw", "dgd", "ftrl", "ggd", "schedule_free", "weight_average"} | OF_THEIR_OWN
"""Registered levels that are not for `SequenceMemory`: those, and what needs a weight or a layer's inputs."""

COMPOSED = {"chain", "nest", "parallel"}
"""Registered levels that have no defaults."""

REGISTERED = sorted(set(nestopt.levels.list()) - REFUSED - COMPOSED - LINKS)

VARIANTS: dict[str, Level] = {
    "short window": attention(memory=Window(3)),
    "gated": linear_attention(retention=Decay(Gate(0.9))),
    "titans in chunks": titans(chunk=4, read="chunk"),
    "titans before": titans(chunk=3, read="before"),
    "titans, matrix": titans(memory=Mlp(depth=1, residual=False), chunk=3, read="chunk", retention=Decay(Heads(0.9))),
    "ttt in chunks": ttt(chunk=3, read="chunk", lr=Gate(0.5, 0.25, 1.0), features=Elu()),
    "ttt without gates": ttt(chunk=3, read="chunk", lr=0.5),
    "ttt, a write a chunk": ttt(chunk=4, write="chunk"),
    "titans with adam": titans(rule=adam(), step_size=0.01, chunk=3),
    "self_modifying in chunks": self_modifying(chunk=2, projection_chunk=4, momentum=Gate(0.5)),
    "self_modifying queries": self_modifying(adaptive=("q", "v"), chunk=3, projection_chunk=3),
    "deltanet of 2": deltanet(period=2),
    "chain": nestopt.core.chain(momentum(0.9), gd()),
    "nest": nestopt.core.nest(outer=gd(period=3), inner=momentum(0.9)),
}


def level_of(name: str) -> Level:
    return VARIANTS[name] if name in VARIANTS else nestopt.build("level", name)


LEVELS = [*REGISTERED, *VARIANTS]
"""Every level that runs on tokens, and some more by name."""


def make(name: str, dim: int = 8, heads: int = 2, **options: Any) -> SequenceMemory:
    """A float64 layer whose parameters are away from where they start, so that gates differ from token to token."""
    return away(SequenceMemory(level_of(name), dim, heads, **options).double())


def away(module: SequenceMemory) -> SequenceMemory:
    """`module`, its parameters moved away from where they start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def same(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def same_states(a: dict[str, Any], b: dict[str, Any], tolerance: float = 1e-10) -> None:
    same(dict(leaves(a)), dict(leaves(b)), tolerance)


def in_steps(module: SequenceMemory, x: Tensor, state: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
    """`module` on x `[B, T, dim]`, one token at a time."""
    ys = []
    for x_t in x.unbind(1):
        y, state = module.step(x_t, state)
        ys.append(y)
    assert state is not None
    return torch.stack(ys, dim=1), state
