"""Adam and momentum as one closed-form regression on gradients (NL eq. 101-105)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.part import FINITE, FieldError
from nestopt.core.scale import square_limit
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.levels.gradient.matrix_root import eigen
from nestopt.levels.gradient.shampoo import in_range


class RegressionOptimum(Level):
    r"""The elementwise memory m that best answers every gradient so far with a target P (NL eq. 101-105).

    $$u = \arg\min_m \sum_i w_i\lVert m\odot g_i - P\rVert^2 + \lambda\lVert m\rVert^2 = \frac{P\, s_1}{s_2 + \lambda},
      \qquad s_1 \leftarrow \beta_1 s_1 + (1-\beta_1) g, \quad s_2 \leftarrow \beta_2 s_2 + (1-\beta_2) g^2$$

    With $P = s_2^{1/2}$ (the total root of the squares) it is Adam's direction, up to ε and λ; with $P = s_2$ (the
    squares) it is momentum (eq. 104). It is the optimum where β1 = β2, so that one set of weights $w_i$ stands in both
    sums; Adam's own pair differs. Convention: averages, corrected for their start. Entries of g beyond ±2⁵⁰, whose
    squares would not fit float32, count as that.

    With a `side` the memory is a matrix that answers whole gradients, $m g_i^\top$ or $g_i^\top m$, and
    $s_2 \leftarrow \beta_2 s_2 + (1-\beta_2) g^\top g$ or $g g^\top$: $u = s_1\, s_2^p (s_2 + \lambda)^{-1}$ for
    `"right"`, from the other side for `"left"`. `target=0` asks for the identity and is a Newton-like step on the
    second moment's matrix, as long as the inverse of a gradient; `"root"` is matrix AdaGrad; `"square"` momentum.
    Directions in which no gradient lies are left alone. Matrices only; no gradient passes through the decomposition.

    Args:
        betas: β1 and β2 in [0, 1). Default (0.9, 0.999).
        target: P: `"root"` (default), `"square"`, or the power p >= 0 of $P = s_2^p$; 0 asks for the same answer to
            every gradient.
        ridge: λ >= 0. Default 1e-16, the square of Adam's usual ε.
        bias_correction: divide s_i by 1 - β_i^t, which makes both weighted means. Default True.
        side: None (default): entry by entry. `"left"` or `"right"`: as a matrix, decomposed at each step.

    Raises:
        FieldError: a number out of range, or a target or side of another name.
    """

    positive: ClassVar[frozenset[str]] = frozenset({"exp_avg_sq"})
    momentum_field: ClassVar[str | None] = "betas"
    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    objectives: ClassVar[dict[str, str]] = {"exp_avg": "l2 to P", "exp_avg_sq": "l2 to P"}

    betas: tuple[float, float] = (0.9, 0.999)
    target: Literal["root", "square"] | float = "root"
    ridge: float = 1e-16
    bias_correction: bool = True
    side: Literal["left", "right"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas = tuple(self.betas)  # type: ignore[assignment]
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise FieldError(self.label, "betas", self.betas, "is not allowed; give two numbers in [0, 1)")
        if isinstance(self.target, str):
            self.check_choice("target", POWERS)
        else:
            self.check("target", 0.0)
        self.check("ridge", 0.0)
        self.check_choice("side", (None, "left", "right"))

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"matrix", FINITE} if self.side else super().needs

    @property
    def is_elementwise(self) -> bool:
        return self.side is None and super().is_elementwise

    @property
    def rates_as(self) -> str:
        return "adam" if self.target in ("root", 0.5) else self.label

    def init(self, param: Tensor) -> State:
        if self.side is None:
            return {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        size = param.shape[-2 if self.side == "left" else -1]
        return {"exp_avg": torch.zeros_like(param), "gram": param.new_zeros(size, size)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        beta1, beta2 = self.betas
        if self.side is not None:
            return self._matrix_step(grad, state, signal)
        grad = grad.clamp(-square_limit(grad), square_limit(grad))
        s1 = torch.lerp(state["exp_avg"], grad, 1 - beta1)
        s2 = (state["exp_avg_sq"] * beta2).addcmul(grad, grad, value=1 - beta2)
        return self._optimum(s1, s2, signal), {"exp_avg": s1, "exp_avg_sq": s2}

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        if self.side is not None:
            return super().step_(grad, state, signal)
        beta1, beta2 = self.betas
        grad = grad.clamp(-square_limit(grad), square_limit(grad))
        s1 = state["exp_avg"].lerp_(grad, 1 - beta1)
        s2 = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        return self._optimum(s1, s2, signal)

    def _optimum(self, s1: Tensor, s2: Tensor, signal: Signal) -> Tensor:
        if self.bias_correction:
            s1, s2 = signal.debias(s1, self.betas[0]), signal.debias(s2, self.betas[1])
        # 0 / 0 where nothing but zeros has been seen, and a root without a derivative
        s2 = s2.clamp_min(torch.finfo(s2.dtype).tiny)
        return s2.pow(self._power) / (s2 + self.ridge) * s1

    @property
    def _power(self) -> float:
        return POWERS[self.target] if isinstance(self.target, str) else self.target

    def _matrix_step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        beta1, beta2 = self.betas
        grad, fine = in_range(grad)
        x = (grad if self.side == "left" else grad.mT).detach()
        s1 = torch.lerp(state["exp_avg"], grad, (1 - beta1) * fine)
        s2 = torch.lerp(state["gram"], x @ x.mT, (1 - beta2) * fine.detach())
        new = {"exp_avg": s1, "gram": s2}
        if self.bias_correction:
            s1, s2 = signal.debias(s1, beta1), signal.debias(s2, beta2)
        values, vectors = eigen(s2)
        seen = values > values.abs().amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
        values = torch.where(seen, values, 1.0)
        factors = torch.where(seen, values.pow(self._power) / (values + self.ridge), 0.0)
        solved = ((vectors * factors.unsqueeze(-2)) @ vectors.mT).to(s1.dtype)
        return (solved @ s1 if self.side == "left" else s1 @ solved) * fine, new


POWERS = {"root": 0.5, "square": 1.0}
"""p of the target P = s_2^p."""
