"""Conda (Wang et al. 2025, "Column-Normalized Adam", arXiv:2509.24218) as a level for nestopt."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

import nestopt
from nestopt.core import Node, State

LIMIT = 2.0**50
"""Entries beyond it count as that: their squares would not fit float32, and stay for ever."""


class Conda(nestopt.Level):
    r"""Conda: Adam whose squares are counted in the singular basis of its own momentum. Matrices only.

    $$m \leftarrow \beta_1 m + (1-\beta_1) g, \qquad h \leftarrow \beta_2 h + (1-\beta_2)\,(U^\top g)^2, \qquad
      u = \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t}\; U\, \frac{U^\top m}{\sqrt h + \epsilon}$$

    Two clocks: m and h at each step, and once in `basis_every` steps, and at the first, $U \Sigma V^\top = m$. Of a
    matrix with as many rows as columns or more, V takes the place of U, on the other side: the basis is that of the
    shorter side. h is not turned when the basis is. Convention: an average; entries are of size about 1, and AdamW's
    learning rates serve. No gradient passes through the basis. Its decomposition waits for a GPU.

    State: 2 m n + min(m, n)² numbers for an `[m, n]` matrix.

    Args:
        beta1: decay of the average m in [0, 1). Default 0.9.
        beta2: decay of the squares h in [0, 1). Default 0.999.
        eps: ε >= 0. Default 1e-8.
        basis_every: steps between two bases. Default 2000.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"matrix", "finite"})
    batched: ClassVar[bool] = True
    positive: ClassVar[frozenset[str]] = frozenset({"exp_avg_sq"})
    objectives: ClassVar[dict[str, str]] = {"exp_avg": "dot", "exp_avg_sq": "l2 to (Uᵀg)²"}

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    basis_every: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta1", 0.0, 1.0, closed="[)")
        self.check("beta2", 0.0, 1.0, closed="[)")
        self.check("eps", 0.0)
        self.check("basis_every", 1)

    @property
    def forgets_scale(self) -> bool:
        return True

    def init(self, param: Tensor) -> State:
        side = min(param.shape[-2:])
        zeros = torch.zeros_like(param)
        return {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "basis": param.new_zeros(side, side)}

    def step(self, grad: Tensor, state: State, signal: nestopt.Signal) -> tuple[Tensor, State]:
        m = torch.lerp(state["exp_avg"], grad.clamp(-LIMIT, LIMIT), 1 - self.beta1)
        basis = self._basis(m, state["basis"], signal.step)
        tall = m.shape[-2] >= m.shape[-1]
        seen, turned = (x @ basis if tall else basis.mT @ x for x in (grad.clamp(-LIMIT, LIMIT), m))
        h = torch.lerp(state["exp_avg_sq"], seen.square(), 1 - self.beta2)
        # the root of an exact 0 has no gradient, and a level must be differentiable
        u = turned / (h.clamp_min(torch.finfo(h.dtype).tiny).sqrt() + self.eps)
        u = u @ basis.mT if tall else basis @ u
        # Adam's two corrections, of which the second is Conda's after ε
        u = signal.debias(u, self.beta1) * signal.debias(torch.ones_like(u), self.beta2).rsqrt()
        return u, {"exp_avg": m, "exp_avg_sq": h, "basis": basis}

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        """Say for `describe` that the basis is on a clock of its own."""
        *fast, basis = super().nodes(name, period, after)
        slow: dict[str, Any] = {
            "period": basis.period * self.basis_every,
            "memory": "matrix",
            "objective": "singular vectors of m",
        }
        return [*fast, dataclasses.replace(basis, **slow)]

    def _basis(self, m: Tensor, old: Tensor, step: int | Tensor) -> Tensor:
        """Return the singular vectors of the shorter side, as columns, where it is their turn."""
        now = (step == 1) | (step % self.basis_every == 0)
        if now is False:
            return old
        wide = m.detach().to(torch.promote_types(m.dtype, torch.float32))
        left, _, right = torch.linalg.svd(wide, full_matrices=False)
        new = (right.mT if m.shape[-2] >= m.shape[-1] else left).to(m.dtype)
        return new if now is True else torch.where(now, new, old)


@nestopt.hookimpl
def nestopt_register_levels(register: nestopt.core.hookspecs.Register) -> None:
    register("conda", Conda)
