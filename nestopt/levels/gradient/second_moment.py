"""A second memory, of squared gradients, that scales another level's direction (NL eq. 105)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nestopt.core.associative import Gd
from nestopt.core.clock import advance, advance_, start
from nestopt.core.level import Level
from nestopt.core.mixing import plus_square
from nestopt.core.order import Node
from nestopt.core.scale import square_limit
from nestopt.core.signal import Signal
from nestopt.core.tree import State, tree_map
from nestopt.levels.gradient.scratch import scratch_like
from nestopt.levels.gradient.within import LIMIT, nodes_within, refuse_unused

_MEMORIES = {"entries": "vector", "rows": "a number a row", "factored": "a number a row and column"}


class SecondMoment(Level):
    r"""Divide a direction, entry by entry, by the root of the running second moment of the gradient (NL eq. 105).

    $$h \leftarrow \beta_2 h + (1-\beta_2) g^2, \qquad u = \frac{\mathrm{of}(g)}{\sqrt{h/(1-\beta_2^t)} + \epsilon}$$

    h sees the gradient that this level is shown: the two are memories in parallel, and Adam is
    `second_moment(of=momentum(β1, dampening=β1))`, over $1-\beta_1^t$. Of a direction that has forgotten the gradient's
    scale (`Level.forgets_scale`: muon), which that would bring back as its inverse, h sees the squares instead, as in
    AdaMuon, and an entry is held within ±3, the multiple of its usual size. With `of=gd` it is RMSProp, with
    `mode="sum"`, $h \leftarrow h + g^2$, AdaGrad. Convention: an average; entries of directions are of size about 1.
    Entries of g beyond ±2⁵⁰, whose squares would not fit float32, count as that.

    Args:
        beta2: decay of the average, in [0, 1). Default 0.999.
        eps: ε >= 0, added to the root. Default 1e-8.
        bias_correction: divide the average by 1 - β2^t. Default True.
        of: the level whose direction is scaled. Default `gd`.
        mode: `"ema"`, an average (default), or `"sum"`.
        over: which squares share a number: none (`"entries"`, default), those of one row of a matrix (`"rows"`, as in
            NorMuon), or a row's times a column's (`"factored"`, as in Adafactor: $h = r c / \overline r$ with r and c
            the averages of rows and columns). The latter two take matrices only, and next to no memory.
        sees: what h sees, `"gradient"` or `"direction"`. Default: the direction where it has forgotten scale.

    Raises:
        FieldError: a number out of range; `beta2` or `bias_correction` given for a sum, which has neither.
    """

    positive: ClassVar[frozenset[str]] = frozenset({"exp_avg_sq", "rows", "columns"})
    reads_param: ClassVar[bool] = False
    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    former_defaults: ClassVar[Mapping[str, Any]] = {"sees": "gradient"}
    objectives: ClassVar[dict[str, str]] = {"exp_avg_sq": "l2 to g²"}

    beta2: float = 0.999
    eps: float = 1e-8
    bias_correction: bool = True
    of: Level = dataclasses.field(default_factory=Gd)
    mode: Literal["ema", "sum"] = "ema"
    over: Literal["entries", "rows", "factored"] = "entries"
    sees: Literal["gradient", "direction"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta2", 0.0, 1.0, closed="[)")
        self.check("eps", 0.0)
        self.check_choice("mode", ("ema", "sum"))
        self.check_choice("over", ("entries", "rows", "factored"))
        self.check_choice("sees", ("gradient", "direction", None))
        if self.mode == "sum":
            refuse_unused(self, ("beta2", "bias_correction"), "mode='sum'")

    def init(self, param: Tensor) -> State:
        kept = torch.zeros_like(param) if self.over == "entries" else tree_map(torch.zeros_like, self._means(param))
        return {"exp_avg_sq": kept, "of": start(self.of, param)}

    @property
    def needs(self) -> frozenset[str]:
        return super().needs if self.over == "entries" else super().needs | {"matrix"}

    @property
    def is_elementwise(self) -> bool:
        return self.over == "entries" and super().is_elementwise

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        grad = grad.clamp(-square_limit(grad), square_limit(grad))
        direction, of = advance(self.of, grad, state["of"], signal.inside("of"))
        keep, take = self._weights
        seen = direction if self._own else grad
        if self.over == "entries":
            h = plus_square(keep * state["exp_avg_sq"], seen, take)
            kept: Tensor | dict[str, Tensor] = h
        else:
            means = tree_map(lambda old, new: keep * old + take * new, state["exp_avg_sq"], self._means(seen))
            kept, h = means, self._spread(means)
        square = signal.debias(h, self.beta2) if self._corrects else h
        # the root of an exact 0 has no gradient, and a level must be differentiable
        root = square.clamp_min(torch.finfo(h.dtype).tiny).sqrt()
        u = direction / (root + self.eps)
        return u.clamp(-LIMIT, LIMIT) if self._own else u, {"exp_avg_sq": kept, "of": of}

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        if self.over != "entries":
            return super().step_(grad, state, signal)
        grad = grad.clamp(-square_limit(grad), square_limit(grad))
        direction = advance_(self.of, grad, state["of"], signal.inside("of"))
        keep, take = self._weights
        seen = direction if self._own else grad
        h = state["exp_avg_sq"].mul_(keep).addcmul_(seen, seen, value=take)
        square = signal.debias(h, self.beta2) if self._corrects else h
        tiny = torch.finfo(h.dtype).tiny
        root = torch.sqrt(square if self.eps else square.clamp_min(tiny), out=scratch_like(direction))
        u = torch.div(direction, root.add_(self.eps), out=root)
        return u.clamp_(-LIMIT, LIMIT) if self._own else u

    @property
    def _own(self) -> bool:
        """Whether h is of the direction that it scales."""
        return self.of.forgets_scale if self.sees is None else self.sees == "direction"

    @property
    def forgets_scale(self) -> bool:
        return self._own or not self.of.forgets_scale

    def _means(self, grad: Tensor) -> State:
        """Return the mean squares that stand for those of a matrix's entries."""
        square = grad.square()
        rows = {"rows": square.mean(-1, keepdim=True)}
        return rows if self.over == "rows" else {**rows, "columns": square.mean(-2, keepdim=True)}

    def _spread(self, kept: State) -> Tensor:
        """Return the second moments that the kept ones stand for."""
        rows: Tensor = kept["rows"]
        if self.over == "rows":
            return rows
        return rows / rows.mean(-2, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny) * kept["columns"]

    @property
    def rates_as(self) -> str:
        return "adam" if self.mode == "ema" else self.label

    @property
    def _weights(self) -> tuple[float, float]:
        """Return the weights of the memory, and of a new square."""
        return (self.beta2, 1 - self.beta2) if self.mode == "ema" else (1.0, 1.0)

    @property
    def _corrects(self) -> bool:
        return self.bias_correction and self.mode == "ema"

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        every = period * self.period
        inner = nodes_within(self.of, f"{name}.of", every, after)
        own = f"{name}.exp_avg_sq" if inner else name
        if self._own:
            after = tuple(node.name for node in inner) or after
        objective = "l2 to u²" if self._own else self.objectives["exp_avg_sq"]
        return [*inner, Node(own, every, after, _MEMORIES[self.over], objective, self.label)]
