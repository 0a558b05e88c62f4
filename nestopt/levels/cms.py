"""The continuum memory system: memories on a spectrum of clocks (NL eq. 70-75)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from nestopt.core.compose import Parallel
from nestopt.core.level import Level
from nestopt.core.memories import Memory, Mlp
from nestopt.core.order import Node
from nestopt.core.part import FieldError
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.levels.muon import Muon


class Cms(Level):
    r"""A continuum of memories, one per clock.

    On tokens (static): a chain of blocks, $x \leftarrow x + M^{(\ell)}(\mathrm{rms\_norm}(x))$, level by level; with
    one level it is a Transformer's MLP. The blocks' weights are parameters, and a level with period C has its weights
    updated once in C optimizer steps, on the sum of their gradients: `nestopt.optimizer` sees the periods.

    On gradients: one copy of `rule` per period, all shown the gradient, directions summed with `weights`: the
    continuum of M3 (eq. 75).

    Args:
        periods: C of each level, fastest first or slowest first, as you like. Default (1, 16).
        memory: one block. Default a two-layer MLP, 4 · dim hidden units.
        rule: what runs at each period on gradients. Default `muon`.
        weights: of the directions, one per period. Default: all 1.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"shape"})

    periods: tuple[int, ...] = (1, 16)
    memory: Memory = dataclasses.field(default_factory=lambda: Mlp(residual=False))
    rule: Level = dataclasses.field(default_factory=Muon)
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.periods = tuple(self.periods)
        if not self.periods or any(isinstance(p, bool) or not isinstance(p, int) or p < 1 for p in self.periods):
            raise FieldError(
                "cms", "periods", self.periods, "is not allowed; give whole numbers of steps, 1 or more each"
            )
        if self.weights is not None:
            self.weights = tuple(self.weights)
            if len(self.weights) != len(self.periods):
                problem = f"is not allowed; give one number for each of periods={self.periods}"
                raise FieldError("cms", "weights", self.weights, problem)

    @property
    def needs(self) -> frozenset[str]:
        # the memory is for tokens: on gradients only the rule is shown anything
        return self.requires | self.rule.needs

    # -- on gradients ------------------------------------------------------------------------------------------------

    def clocks(self) -> Parallel:
        """The rule at each period, side by side: what a cms is on gradients."""
        names = level_names(self.periods)
        levels = {name: dataclasses.replace(self.rule, period=p) for name, p in zip(names, self.periods, strict=True)}
        return Parallel(levels, weights=self.weights)

    def init(self, param: Tensor) -> State:
        return self.clocks().init(param)

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return self.clocks().step(grad, state, signal)

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        return self.clocks().step_(grad, state, signal)

    # -- on tokens ---------------------------------------------------------------------------------------------------

    def learned_start(self, dim_k: int, dim_v: int) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name in level_names(self.periods)
            for key, value in self.block(dim_k).learned_start(dim_k, dim_v).items()
        }

    def block(self, dim: int) -> Memory:
        """One level's memory for tokens of `dim` numbers."""
        if isinstance(self.memory, Mlp) and self.memory.hidden is None:
            return dataclasses.replace(self.memory, hidden=4 * dim)
        return self.memory

    def begin(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        return dict(learned or self.learned_start(dim_k, dim_v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        x, block = q, self.block(q.shape[-1])
        for name in level_names(self.periods):
            theta = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            x = x + block.read(theta, F.rms_norm(x, x.shape[-1:]))
        return x, state

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        return self.clocks().nodes(name, period * self.period, after)


def level_names(periods: tuple[int, ...]) -> list[str]:
    """A name per level: `every_16`, with a count where a period comes twice."""
    names: list[str] = []
    for period in periods:
        base = f"every_{period}"
        count = sum(name == base or name.startswith(f"{base}_") for name in names)
        names.append(base if count == 0 else f"{base}_{count + 1}")
    return names
