"""A level inside another: the slow one learns where the fast one's state, or the weights themselves, start again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nestopt.core.clock import advance, due, start
from nestopt.core.gates import bind
from nestopt.core.level import Level
from nestopt.core.order import Node
from nestopt.core.part import FieldError
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves, nested, tree_map
from nestopt.core.weights import OfWeights


class Nest(OfWeights):
    r"""A slow level learns where a fast level starts each of its contexts (NL sec. 3.3, eq. 28 and 72).

    The inner level runs for `outer.period` steps; then the outer level takes one step on (start - where the inner
    level's state arrived), which is the first-order meta-gradient, and the inner state is put back at the new start.
    With `outer=gd()` the start moves all the way, and the nest is its inner level. An outer level whose steps have a
    size of their own (adam, muon) needs a `step_size` of the size of the inner state: of gradients, for momenta.

    A state that is never negative (`Level.positive`: second moments) begins no context below both where it began and
    where it arrived.

    With `of="weights"` it is the weights whose start is learned: the stack `inner` trains them (the fast weights) for H
    updates, and then the outer level, shown how far they have come, moves the slow weights, from which the fast ones go
    on (their state stays):

    $$\Delta = W_{\mathrm{slow}} - W_{\mathrm{fast}}, \qquad
      W_{\mathrm{slow}} \leftarrow W_{\mathrm{slow}} - \mathrm{step\_size}\cdot\mathrm{outer}(\Delta), \qquad
      W_{\mathrm{fast}} \leftarrow W_{\mathrm{slow}}$$

    With `gd` as the outer level this is Lookahead (Zhang et al. 2019; its α is `step_size`) and Reptile (Nichol et al.
    2018), with `momentum` SlowMo (Wang et al. 2020, at a constant learning rate), and with
    `momentum(0.9, nesterov=True)`, `step_size=0.7` and `across_processes=True` DiLoCo (Douillard et al. 2023). Such a
    nest stands around a whole stack.

    Args:
        outer: the slow level; its `period` is the length of the inner level's context.
        inner: the fast level; its direction is the nest's.
        transfer: how knowledge crosses: `"init"`.
        step_size: of the outer level's steps, 0 or more. Default: 1; of weights ½ (a Lookahead's).
        of: whose start it is: `"state"` (default), the inner level's, or `"weights"`.
        across_processes: of weights: each process trains by itself, and what the outer level is shown is the mean over
            processes, the only thing that they exchange. Default False.
        period: of weights: H, if `outer` has no period of its own, which it then gets.

    Raises:
        FieldError: a number out of range; an inner level whose state grows, which has no start that could be learned;
            weights without a period or step size.
    """

    elementwise: ClassVar[bool] = True  # on weights; see `is_elementwise`

    outer: Level
    inner: Level  # type: ignore[misc]  # a field here
    transfer: Literal["init"] = "init"
    step_size: float | None = None
    of: Literal["state", "weights"] = "state"
    across_processes: bool = False  # type: ignore[misc]  # a field here

    def __post_init__(self) -> None:
        self.check_choice("of", ("state", "weights"))
        if self.of_weights:
            self._take_period()
        super().__post_init__()
        self.check_choice("transfer", ("init",))
        if self.step_size is not None:
            self.check("step_size", 0.0)
        if self.of_weights:
            return
        if self.across_processes:
            problem = "is not allowed: states stay with their process; give of='weights' as well"
            raise FieldError(self.label, "across_processes", self.across_processes, problem)
        if _grows(self.inner):
            problem = "is not allowed: it keeps its pairs, or grows otherwise, and has no start that could be learned"
            raise FieldError(self.label, "inner", self.inner, problem)

    def _take_period(self) -> None:
        if self.period > 1 and isinstance(self.outer, Level):
            if self.outer.period not in (1, self.period):
                problem = f"is not the outer level's {self.outer.period}; give one of the two"
                raise FieldError(self.label, "period", self.period, problem)
            self.outer, self.period = dataclasses.replace(self.outer, period=self.period), 1
        if self.step_size is None and isinstance(self.outer, Level) and self.outer.period == 1:
            problem = "is not allowed of weights; give how many updates lie between two moves of the slow ones, as 5"
            raise FieldError(self.label, "period", self.period, problem)

    @property
    def of_weights(self) -> bool:
        return self.of == "weights"

    @property
    def rate(self) -> float:
        """The step size of the outer level's steps."""
        if self.step_size is None:
            return 0.5 if self.of_weights else 1.0
        return self.step_size

    @property
    def is_elementwise(self) -> bool:
        return self.of_weights and super().is_elementwise

    @property
    def is_batched(self) -> bool:
        return self.of_weights and super().is_batched

    @property
    def qk_norm(self) -> bool:
        """Whether a layer should L2-normalise queries and keys: as the inner level asks."""
        return getattr(self.inner, "qk_norm", False)

    @property
    def v_norm(self) -> bool:
        """Whether a layer should L2-normalise values: as the inner level asks."""
        return getattr(self.inner, "v_norm", False)

    @property
    def of_tokens(self) -> bool:
        return self.inner.of_tokens

    def learned_start(self, dim_k: int, dim_v: int) -> dict[str, Tensor]:
        return {f"inner.{key}": x for key, x in self.inner.learned_start(dim_k, dim_v).items()}

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        if self.of_weights or not self.of_tokens:
            parent = OfWeights if self.of_weights else Level
            return parent.init_tokens(self, dim_k, dim_v, like, learned)
        if self.period > 1:
            problem = "is not allowed on tokens, where the outer level's period is its clock; leave it out"
            raise FieldError(self.label, "period", self.period, problem)
        return self._around(self.inner.init_tokens(dim_k, dim_v, like, nested(learned).get("inner", {})))

    def init(self, param: Tensor) -> State:
        if self.of_weights:
            return {**super().init(param), "slow": param.clone(), "outer": self.outer.init(param)}
        return self._around(start(self.inner, param))

    def _around(self, inner: State) -> State:
        outer = {path: self.outer.init(leaf) for path, leaf in leaves(inner)}
        return {"inner": inner, "start": tree_map(torch.clone, inner), "outer": nested(outer)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        if self.of_weights:
            return super().step(grad, state, signal)
        direction, inner = advance(self.inner, grad, state["inner"], signal)
        now = due(signal.step, self.outer.period)
        if now is False:
            return direction, {**state, "inner": inner}
        begins, outer = self._learn(inner, state, signal.every(self.outer.period))
        new = {"inner": begins, "start": begins, "outer": outer}
        if isinstance(now, Tensor):
            kept = {**state, "inner": inner}
            new = tree_map(lambda written, old: torch.where(now, written, old), new, kept)
        return direction, new

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        return super().step_(grad, state, signal) if self.of_weights else Level.step_(self, grad, state, signal)

    def before_last_(self, grad: Tensor, state: State, signal: Signal) -> tuple[Level, Tensor, State]:
        return super().before_last_(grad, state, signal) if self.of_weights else (self, grad, state)

    def acts(self, step: int) -> bool:
        return step % self.outer.period == 0

    def after_update(self, weights: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        slow, own = state["slow"], signal.every(self.outer.period).on(state["slow"])
        move, outer = self.outer.step(slow - weights, state["outer"], own)
        slow = slow - self.rate * move
        return slow, {**state, "slow": slow, "outer": outer}

    def explained(self) -> str:
        shown = ", by the mean of all processes" if self.across_processes else ""
        return f"every {self.outer.period} updates {self.outer.label} moves the slow weights, × {self.rate:g}{shown}"

    def evaluated(self, weights: Tensor, state: State) -> Tensor:
        slow: Tensor = state["slow"]
        return slow

    def _learn(self, inner: State, state: State, signal: Signal) -> tuple[State, State]:
        arrived, begins, outer = dict(leaves(inner)), {}, {}
        for path, at in leaves(state["start"]):
            node = state["outer"]
            for key in path.split("."):
                node = node[key]
            move, outer[path] = self.outer.step(at - arrived[path], node, signal.on(at))
            begins[path] = self.next_start(path, at, arrived[path], move)
        return nested(begins), nested(outer)

    def next_start(self, path: str, at: Tensor, arrived: Tensor, move: Tensor) -> Tensor:
        """Return where a tensor of the inner state begins its next context."""
        begins = at - self.rate * move
        return (
            torch.maximum(begins, torch.minimum(at, arrived)) if path.rpartition(".")[2] in self._positive else begins
        )

    @property
    def _positive(self) -> frozenset[str]:
        return frozenset().union(*(level.positive for level in levels_within(self)))

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        if self.of_weights:
            return super().nodes(name, period, after)
        every = period * self.period
        inner = self.inner.nodes(f"{name}.inner", every, after)
        if not any(leaves(start(self.inner, torch.zeros(2, 2)))):
            return inner  # which has no start to be learned
        needs = tuple(node.name for node in inner)
        outer = self.outer.nodes(f"{name}.outer", every, needs)
        learned = Node(
            f"{name}.start",
            every * self.outer.period,
            tuple(node.name for node in outer),
            memory="start of the inner level",
            objective="l2 to where it arrives",
            rule=self.outer.label,
        )
        return [*inner, *outer, learned]

    def nodes_of_weights(self, name: str, period: int, after: tuple[str, ...]) -> list[Node]:
        outer = self.outer.nodes(f"{name}.outer", period, after)
        slow = Node(
            f"{name}.slow",
            period * self.outer.period,
            tuple(node.name for node in outer),
            memory="slow weights",
            objective="l2 to where the fast weights arrive",
            rule=self.outer.label,
        )
        return [*outer, slow]


def levels_within(level: Level) -> Iterator[Level]:
    """Yield a level and all levels within it."""
    yield level
    for _, part in level.parts():
        if isinstance(part, Level):
            yield from levels_within(part)


def _grows(level: Level) -> bool:
    """Return whether the state of `level` grows: it says so, or it does in a step on a tensor without data."""
    if any(part.appends for part in levels_within(level)):
        return True
    bound, param = bind(level), torch.empty(2, 2, device="meta")
    try:
        state = start(bound, param)
        _, new = advance(bound, param, state, Signal(bound.period, param, 1.0))
        return {k: x.shape for k, x in leaves(new)} != {k: x.shape for k, x in leaves(state)}
    except Exception:  # it decides by values, or can't run on such a tensor: whoever runs it will see
        return False


def nest(
    outer: Any,
    inner: Any,
    transfer: Literal["init"] = "init",
    *,
    step_size: float | None = None,
    of: Literal["state", "weights"] = "state",
    across_processes: bool = False,
    period: int = 1,
) -> Nest:
    """Make a `Nest` of a slow level around a fast one; either may be given as a spec.

    >>> from nestopt.levels import adam, gd
    >>> lookahead = nest(gd(), adam(), of="weights", period=5)
    >>> lookahead.outer.period, lookahead.rate
    (5, 0.5)
    """
    return Nest(outer, inner, transfer, step_size, of, across_processes, period=period)
