r"""A weight of a memory during a block of chunks: what the block found, and what has been written since, in rows.

With inputs a_t and directions g_t = η_t ∂ℓ/∂(output), both at the state that the token's chunk began with, and the
strengths e_t = δ η_t of the delta decay, the write is

$$S_t = \theta_t S_{t-1} + g_t a_t^\top, \qquad M_t = \alpha_t M_{t-1} - e_t (M_{t-1} a_t) a_t^\top - S_t,$$

and in closed form (`nestopt.levels.deep.gate_products` has the coefficients), per token and without a copy of the
weight for it,

$$M_t = \gamma_t M_0 - c_t S_0 - \sum_{s\le t}(\Gamma_{ts} w_s + \kappa_{ts} g_s)\, a_s^\top, \qquad
  w_t = e_t M_{t-1} a_t,$$

where w solves one unit lower triangular system per chunk (NL eq. 83-91 in chunks). A new weight is made once a block:
where chunks are short, it would else be most of what is kept for the backward pass, being far larger than a chunk's
tokens. Within the block, a product with M_p is one with M_0, one with S_0, and two with rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from nestopt.core.precision import matmul
from nestopt.levels.deep.gate_products import GateProducts
from nestopt.levels.deep.weights import applied, moved, pulled, squares, squares_since


@dataclasses.dataclass(frozen=True)
class RankOneWrites:
    """What tokens write.

    Attributes:
        inputs: a `[.., n, in]`.
        steps: g `[.., n, out]`.
        decays: w `[.., n, out]`; None without delta decay.
    """

    inputs: Tensor
    steps: Tensor
    decays: Tensor | None

    def and_then(self, later: RankOneWrites) -> RankOneWrites:
        decays = None
        if self.decays is not None and later.decays is not None:
            decays = torch.cat([self.decays, later.decays], dim=-2)
        return RankOneWrites(
            torch.cat([self.inputs, later.inputs], dim=-2), torch.cat([self.steps, later.steps], dim=-2), decays
        )

    def left(self, at: GateProducts) -> Tensor:
        """Return `Γ ⊙ w + κ ⊙ g` `[.., n, out]` with the last row of Γ and κ: what is left of each write then."""
        Gamma, kappa = (None if x is None else x[..., -1, :, None] for x in (at.Gamma, at.kappa))
        if kappa is None:
            total = self.steps if self.decays is None else self.steps + self.decays
            return total if Gamma is None else Gamma * total
        if self.decays is None:
            return kappa * self.steps
        return kappa * self.steps + (self.decays if Gamma is None else Gamma * self.decays)


class BlockWeight:
    """One weight `[.., out, in]` in a block of chunks, which are taken in turn.

    Args:
        weight, momentum: M_0 and S_0; no momentum where the recurrence has none.
        fading: of the block's tokens.
    """

    def __init__(self, weight: Tensor, momentum: Tensor | None, fading: GateProducts) -> None:
        self.weight, self.momentum, self.fading = weight, momentum, fading
        self.done = 0
        self.rows: RankOneWrites | None = None
        self.gamma: Tensor | None = None
        self.c: Tensor | None = None
        self.left: Tensor | None = None
        self._applied: tuple[Any, ...] = ()

    # -- as a chunk finds it: M_p ------------------------------------------------------------------------------------

    def apply(self, x: Tensor, writes: int | None = None) -> Tensor:
        """M_p x: `[.., n, in]` to `[.., n, out]`. Of a chunk's last x the last `writes` rows, or all, are written."""
        base, self.weight = applied(self.weight, x)
        y, old = base if self.gamma is None else self.gamma * base, None
        if self.c is not None and self.momentum is not None:
            old, self.momentum = applied(self.momentum, x)
            y = y - self.c * old
        self._applied = x, base, old
        if writes is not None:
            self._applied = tuple(None if r is None else r[..., -writes:, :] for r in self._applied)
        return y if self.left is None or self.rows is None else y - matmul(matmul(x, self.rows.inputs.mT), self.left)

    def pull(self, d: Tensor) -> Tensor:
        """M_pᵀ d: `[.., C, out]` to `[.., C, in]`."""
        y, self.weight = pulled(self.weight, d)
        y = y if self.gamma is None else self.gamma * y
        if self.c is not None and self.momentum is not None:
            old, self.momentum = pulled(self.momentum, d)
            y = y - self.c * old
        return y if self.left is None or self.rows is None else y - matmul(matmul(d, self.left.mT), self.rows.inputs)

    def lengths(self) -> Tensor:
        """Squared lengths of the columns of M_p, `[.., in]`."""
        if self.left is None or self.rows is None:
            found, self.weight = squares(self.weight)
        else:
            found, self.weight, self.momentum = squares_since(
                self.weight, self.momentum, gamma=self.gamma, c=self.c, added=self.left, inputs=self.rows.inputs
            )
        return found

    # -- the chunk's write -------------------------------------------------------------------------------------------

    def write(self, steps: Tensor, strength: Tensor | None, near: Tensor | None) -> None:
        """Write the inputs a applied last, with g `[.., C, out]` and, for delta decay, its strength e `[.., C]`.

        `near` is a aᵀ `[.., C, C]`, which the delta decay needs.
        """
        x, base, old = self._applied
        rows = RankOneWrites(x, steps, None)
        if strength is not None and near is not None:
            rows = RankOneWrites(x, steps, self._decays(rows, base, old, strength, near))
        self.rows = rows if self.rows is None else self.rows.and_then(rows)

    def _decays(self, new: RankOneWrites, base: Tensor, old: Tensor | None, strength: Tensor, near: Tensor) -> Tensor:
        """w `[.., C, out]`, given M_0 a and S_0 a."""
        first, size = self.done, new.inputs.shape[-2]
        at = self.fading.before().rows(first, first + size)
        answers = base if at.gamma is None else at.gamma[..., None] * base
        if self.momentum is not None and at.c is not None:
            if old is None:
                old, self.momentum = applied(self.momentum, new.inputs)
            answers = answers - at.c[..., None] * old
        rows = new if self.rows is None else dataclasses.replace(self.rows, decays=None).and_then(new)
        if self.rows is not None:
            near = torch.cat([matmul(new.inputs, self.rows.inputs.mT), near], dim=-1)
        fed = _weigh(at.Gamma, near, first - 1)
        answers = answers - matmul(fed if at.kappa is None else at.kappa * near, rows.steps)
        if self.rows is not None and self.rows.decays is not None:
            answers = answers - matmul(fed[..., :first], self.rows.decays)
        # by the inverse, which is as small as the system: a solver takes twice as long for so many columns
        eye = torch.eye(size, dtype=base.dtype, device=base.device).expand_as(near[..., first:])
        system = (strength[..., None] * fed[..., first:]).mT
        inverse = torch.linalg.solve_triangular(system, eye, upper=True, left=False, unitriangular=True)
        return matmul(inverse.mT, strength[..., None] * answers)

    def read(self, x: Tensor, reads: str) -> Tensor:
        """M_t x_t `[.., C, out]` (`"before"`: M_{t-1} x_t) for each token t of the chunk that was written last."""
        assert self.rows is not None
        first = self.done
        at = (self.fading.before() if reads == "before" else self.fading).rows(first, first + x.shape[-2])
        y, self.weight = applied(self.weight, x)
        if at.gamma is not None:
            y = at.gamma[..., None] * y
        if self.momentum is not None and at.c is not None:
            old, self.momentum = applied(self.momentum, x)
            y = y - at.c[..., None] * old
        near = matmul(x, self.rows.inputs.mT)
        fed = _weigh(at.Gamma, near, first - (reads == "before"))
        steps, decays = self.rows.steps, self.rows.decays
        if at.kappa is None:
            return y - matmul(fed, steps if decays is None else steps + decays)
        y = y - matmul(at.kappa * near, steps)
        return y if decays is None else y - matmul(fed, decays)

    def close(self) -> None:
        """End the chunk: another of the block follows."""
        assert self.rows is not None
        self.done = done = self.rows.inputs.shape[-2]
        now = self.fading.rows(done - 1, done)
        self.gamma, self.c = (None if x is None else x[..., None] for x in (now.gamma, now.c))
        self.left = self.rows.left(now)

    def end(self) -> tuple[Tensor, Tensor | None]:
        """M and S after the block."""
        assert self.rows is not None
        length = self.rows.inputs.shape[-2]
        now = self.fading.rows(length - 1, length)
        gamma, c, theta = (None if x is None else x[..., 0] for x in (now.gamma, now.c, now.theta))
        steps = None if now.Theta is None else now.Theta[..., -1, :, None] * self.rows.steps
        return moved(
            self.weight,
            self.momentum,
            self.rows.inputs,
            gamma=gamma,
            added=self.rows.left(now),
            c=c,
            theta=theta,
            left=steps,
        )


def _weigh(shares: Tensor | None, near: Tensor, diagonal: int) -> Tensor:
    """Return `shares ⊙ near`; None is ones up to this diagonal."""
    return near.tril(diagonal) if shares is None else shares * near
