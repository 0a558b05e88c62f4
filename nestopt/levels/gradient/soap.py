"""SOAP: a slow eigenbasis of gradients around a fast level (NL sec. 2: levels on clocks of their own)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.clock import advance, due, start
from nestopt.core.level import Level
from nestopt.core.nesting import levels_within
from nestopt.core.order import Node
from nestopt.core.part import FINITE, FieldError
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves, replaced, tree_map
from nestopt.levels.gradient.adam import Adam
from nestopt.levels.gradient.matrix_root import eigen
from nestopt.levels.gradient.shampoo import SIDES, in_range, kept
from nestopt.levels.gradient.within import check_whole, nodes_within


class Soap(Level):
    r"""SOAP (Vyas et al. 2024): a fast level in a slow eigenbasis of what it is shown. Matrices only.

    $$L \leftarrow \beta L + (1-\beta) g g^\top, \quad R \leftarrow \beta R + (1-\beta) g^\top g, \qquad
      u = Q_L\,\mathrm{of}(Q_L^\top g\,Q_R)\,Q_R^\top$$

    Once in `basis_every` steps $Q_L \leftarrow \mathrm{QR}(L Q_L)$, its columns sorted by their eigenvalues, and Q_R
    likewise: a step of power iteration, and the fast level's state moves along, averages of gradients turned into the
    new basis, second moments only sorted with it. The first gradient makes the first basis and moves nothing; each
    gradient is seen in the basis of those before it. Convention: that of `of`, whose count begins with the second step.
    No gradient passes through the bases.

    State: 2(m² + n²) numbers for an `[m, n]` matrix, and that of `of`.

    Args:
        of: the level within. Default `adam(betas=(0.95, 0.95))`, which makes it SOAP.
        beta: decay of L and R in [0, 1). Default 0.95.
        basis_every: steps between two bases. Default 10.
        max_size: a side longer than this keeps its own coordinates. Default 8192.

    Raises:
        FieldError: a number out of range; at `init`, both sides longer than `max_size`.
        ValueError: a level within that needs the parameter, which it is not shown.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"matrix", FINITE})
    batched: ClassVar[bool] = True

    of: Level = dataclasses.field(default_factory=lambda: Adam((0.95, 0.95)))
    beta: float = 0.95
    basis_every: int = 10
    max_size: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", 0.0, 1.0, closed="[)")
        check_whole(self, "basis_every", "max_size")

    @property
    def rates_as(self) -> str:
        return self.of.rates_as

    @property
    def forgets_scale(self) -> bool:
        return self.of.forgets_scale

    def init(self, param: Tensor) -> State:
        state: State = {}
        for side, size in zip(SIDES, param.shape[-2:], strict=True):
            size = size if size <= self.max_size else 0  # the keys are the same for parameters of every shape
            state[side] = {"gram": param.new_zeros(size, size), "basis": param.new_zeros(size, size)}
        if param.numel() and not kept(state):
            problem = f"leaves no side of a parameter of shape {tuple(param.shape)}; raise it, or give it another stack"
            raise FieldError(self.label, "max_size", self.max_size, problem)
        return {**state, "of": start(self.of, param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        grad, fine = in_range(grad)
        first = signal.step == 1
        before = signal.step - 1 if not isinstance(signal.step, Tensor) else (signal.step - 1).clamp(min=1)
        direction, new = torch.zeros_like(grad), {**state}
        if first is not True:
            seen = _turned(grad, state, into=True)
            inner = dataclasses.replace(signal.on(None).inside("of"), step=before)
            direction, of = advance(self.of, seen, state["of"], inner)
            direction, new["of"] = _turned(direction, state, into=False) * fine, of
            if isinstance(first, Tensor):
                direction = torch.where(first, 0.0, direction)
                new["of"] = tree_map(lambda written, old: torch.where(first, old, written), of, state["of"])
        for side in kept(state):
            x = (grad if side == "left" else grad.mT).detach()
            gram = torch.lerp(state[side]["gram"], x @ x.mT, (1 - self.beta) * fine.detach())
            new[side] = {"gram": gram, "basis": state[side]["basis"]}
        if first is True:
            return direction, self._begun(new)
        now = due(before, self.basis_every)
        if now is False:
            return direction, new
        moved = self._moved(new, grad.shape)
        if isinstance(first, Tensor):
            moved = tree_map(lambda turned, old: torch.where(now & ~first, turned, old), moved, new)
            moved = tree_map(lambda begun, old: torch.where(first, begun, old), self._begun(new), moved)
        return direction, moved

    def _begun(self, state: State) -> State:
        """Return `state` with the eigenbases of its Gram matrices, the largest eigenvalue first."""
        new = {**state}
        for side in kept(state):
            gram = state[side]["gram"]
            new[side] = {"gram": gram, "basis": eigen(gram)[1].flip(-1).to(gram.dtype)}
        return new

    def _moved(self, state: State, shape: torch.Size) -> State:
        """Return `state` after one step of power iteration, with the fast level's state in the new bases."""
        new, turns, orders = {**state}, {}, {}
        second_moments = frozenset().union(*(level.positive for level in levels_within(self.of)))
        for side in kept(state):
            gram, basis = state[side]["gram"], state[side]["basis"]
            product = gram @ basis
            order = (basis * product).sum(-2).argsort(-1, descending=True)
            product = torch.take_along_dim(product, order.unsqueeze(-2), -1)
            wide = product.to(torch.promote_types(product.dtype, torch.float32))
            fresh = torch.linalg.qr(wide)[0].to(product.dtype)
            new[side] = {"gram": gram, "basis": fresh}
            turns[side], orders[side] = basis.mT @ fresh, order
        found = {}
        for path, leaf in leaves(state["of"]):
            if leaf.ndim == len(shape) and path.rpartition(".")[2] in second_moments:  # or of rows, or of columns
                if "left" in orders and leaf.shape[-2] == shape[-2]:
                    leaf = torch.take_along_dim(leaf, orders["left"].unsqueeze(-1), -2)
                if "right" in orders and leaf.shape[-1] == shape[-1]:
                    leaf = torch.take_along_dim(leaf, orders["right"].unsqueeze(-2), -1)
            elif leaf.shape == shape:
                leaf = turns["left"].mT @ leaf if "left" in turns else leaf
                leaf = leaf @ turns["right"] if "right" in turns else leaf
            found[path] = leaf
        return {**new, "of": replaced(state["of"], found)}

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        every = period * self.period
        sides = [
            Node(f"{name}.{s}", every * self.basis_every, after, "matrix", "l2 to g gᵀ", self.label) for s in SIDES
        ]
        return [*sides, *nodes_within(self.of, f"{name}.of", every, after)]


def _turned(x: Tensor, state: State, *, into: bool) -> Tensor:
    """Return `x` in the bases of a state, or what is in them back in its own coordinates."""
    for side in kept(state):
        basis = state[side]["basis"]
        x = (basis.mT if into else basis) @ x if side == "left" else x @ (basis if into else basis.mT)
    return x
