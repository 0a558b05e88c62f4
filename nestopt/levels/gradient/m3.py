"""M3: orthogonalised momenta on two clocks, scaled by a second moment (NL eq. 75, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.order import Node
from nestopt.core.part import FieldError
from nestopt.core.scale import root_mean_square
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.levels.gradient.muon import DTYPES, Muon, Scale, check_iteration, orthogonal
from nestopt.levels.gradient.newton_schulz import QUINTIC, Form
from nestopt.levels.gradient.within import check_whole, refuse_unused

MATRIX = (-2, -1)


class M3(Level):
    r"""Multi-scale momentum Muon (NL Algorithm 1). Matrices only.

    $$M_1 \leftarrow \beta_1 M_1 + (1-\beta_1) g, \quad V \leftarrow \beta_2 V + (1-\beta_2) g^2, \quad
      M_2 \leftarrow \beta_3 M_2 + (1-\beta_3)\!\!\sum_{\text{last } f}\! g \;\text{ every } f \text{ steps}$$

    $$O_i = \mathrm{NewtonSchulz}(M_i), \qquad u = c\,\rho\;
      \frac{O_1 + \alpha O_2}{\sqrt{V/\overline{V}} + \epsilon}, \qquad
      \rho: \; \lVert u\rVert_F = c\,\lVert O_1\rVert_F$$

    Convention (`mode="ema"`): averages, whose start needs no correction, as O_i and V over its mean $\overline V$
    forget scale; the direction is as long as Muon's (`update_norm="rms"`), so Muon's learning rates serve and scaling
    all gradients changes nothing. The slow memory is read in the step that completes its period. It is the stack

        second_moment(of=parallel(muon(β1, nesterov=False), muon(β3, nesterov=False, period=f), weights=[1, α]))

    brought to that length (ε, relative to the root mean square of V here, apart).

    `mode="paper"` is the algorithm as printed, with sums that forget nothing: $M_1 \leftarrow M_1 + \beta_1 g$,
    $V \leftarrow V + \beta_2 g^2$, at the start of each period $M_2 \leftarrow M_2 + \beta_3 \sum g$ over the f
    gradients of the period before, and $u = (O_1 + \alpha O_2)/(\sqrt V + \epsilon)$. Its steps depend on the scale of
    gradients and shrink with time.

    State: M1, √V (`rms`: it stays in range for gradients of any size), M2 and O2 in the parameter's dtype, 16 bytes a
    parameter in float32; O2 in `dtype` where one is given
    (14 with bfloat16, which is what O2 is calculated in on most hardware). O2 is calculated once in f steps.

    Args:
        betas: β1, β2, β3, in [0, 1) (for the paper's sums, which they weigh, in [0, 1]). Default (0.95, 0.999, 0.9).
        alpha: weight α >= 0 of the slow memory. Default 0.5.
        slow_period: f, steps between two reads of the slow memory. (`period` is this level's own clock.) Default 16.
        steps, coefficients, dtype, form: of `newton_schulz`.
        eps: ε >= 0. Default 1e-8.
        mode: `"ema"` (default) or `"paper"`.
        update_norm: `"rms"` (default): ρ as above. None: ρ = 1.
        scale: c, by shape, as of `muon`. Default `"original"`.

    Raises:
        FieldError: a value out of range; `update_norm` or `scale` given for the paper's mode, which has neither.
    """

    positive: ClassVar[frozenset[str]] = frozenset({"rms"})
    momentum_field: ClassVar[str | None] = "betas"
    requires: ClassVar[frozenset[str]] = frozenset({"matrix"})
    reads_param: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    betas: tuple[float, float, float] = (0.95, 0.999, 0.9)
    alpha: float = 0.5
    slow_period: int = 16
    steps: int = 5
    coefficients: str | tuple[float, float, float] = QUINTIC
    eps: float = 1e-8
    mode: Literal["ema", "paper"] = "ema"
    update_norm: Literal["rms"] | None = "rms"
    scale: Scale | None = "original"
    dtype: str | None = None
    form: Form = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas = tuple(self.betas)  # type: ignore[assignment]
        self.check_choice("mode", ("ema", "paper"))
        paper = self.mode == "paper"
        if len(self.betas) != 3 or not all(0 <= beta < 1 or (paper and beta == 1) for beta in self.betas):
            allowed = "[0, 1]" if paper else "[0, 1)"
            raise FieldError(self.label, "betas", self.betas, f"is not allowed; give three numbers in {allowed}")
        self.check("alpha", 0.0)
        check_whole(self, "slow_period")
        self.check("eps", 0.0)
        self.check_choice("update_norm", ("rms", None))
        self.check_choice("scale", (*get_args(Scale), None))
        check_iteration(self)
        if paper:
            refuse_unused(self, ("update_norm", "scale"), "mode='paper'")

    def init(self, param: Tensor) -> State:
        # what `dtype=None` iterates in depends on the machine, and a checkpoint must not
        read = torch.zeros_like(param, dtype=DTYPES.get(self.dtype or ""))
        return {
            "momentum": torch.zeros_like(param),
            "rms": torch.zeros_like(param),
            "slow": {"momentum": torch.zeros_like(param), "read": read},
        }

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        beta1, _, beta3 = self.betas
        slow, first = state["slow"], (signal.step - 1) % self.slow_period == 0
        keep, take = self._weights
        if self.mode == "paper":
            m = state["momentum"] + beta1 * grad
            total = slow["momentum"] + beta3 * grad
            complete, due = slow["momentum"], first & (signal.step > 1)
        else:
            m = torch.lerp(state["momentum"], grad, 1 - beta1)
            total = _choose(first, lambda: beta3 * slow["momentum"], slow["momentum"]) + (1 - beta3) * grad
            complete, due = total, signal.step % self.slow_period == 0
        read = _choose(due, lambda: orthogonal(self, complete).to(slow["read"].dtype), slow["read"])
        # a root of 0 has no derivative
        root = torch.hypot(keep * state["rms"].clamp_min(torch.finfo(grad.dtype).tiny), take * grad)
        new = {"momentum": m, "rms": root, "slow": {"momentum": total, "read": read}}
        return self._direction(orthogonal(self, m), read, root), new

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        if isinstance(signal.step, Tensor):
            return super().step_(grad, state, signal)
        beta1, _, beta3 = self.betas
        m, root, total, read = state["momentum"], state["rms"], state["slow"]["momentum"], state["slow"]["read"]
        keep, take = self._weights
        torch.hypot(root.mul_(keep), take * grad, out=root)
        first = (signal.step - 1) % self.slow_period == 0
        if self.mode == "paper":
            if first and signal.step > 1:
                read.copy_(orthogonal(self, total, detached=True))
            m.add_(grad, alpha=beta1)
            total.add_(grad, alpha=beta3)
        else:
            m.lerp_(grad, 1 - beta1)
            if first:
                total.mul_(beta3)
            total.add_(grad, alpha=1 - beta3)
            if signal.step % self.slow_period == 0:
                read.copy_(orthogonal(self, total, detached=True))
        return self._direction_(orthogonal(self, m, detached=True), read, root)

    @property
    def _weights(self) -> tuple[float, float]:
        """Return the weights of √V and of g in the root of V's sum."""
        beta2 = self.betas[1]
        return (1.0, math.sqrt(beta2)) if self.mode == "paper" else (math.sqrt(beta2), math.sqrt(1 - beta2))

    def _direction(self, fast: Tensor, slow: Tensor, root: Tensor) -> Tensor:
        """Return u of what the memories read and √V."""
        tiny, fast = torch.finfo(root.dtype).tiny, fast.to(root.dtype)
        u, c = fast + self.alpha * slow.to(root.dtype), self._factor(root)
        if self.mode == "ema":
            root = root / root_mean_square(root, MATRIX)
        u = u / (root.clamp_min(math.sqrt(tiny)) + self.eps)
        if self.mode == "ema" and self.update_norm == "rms":
            c = c * _norm(fast) / _norm(u).clamp_min(tiny)
        return c * u

    def _direction_(self, fast: Tensor, slow: Tensor, root: Tensor) -> Tensor:
        """Do as `_direction`, written over `fast`, with one more tensor of its size."""
        tiny, u, c = torch.finfo(root.dtype).tiny, fast.to(root.dtype), self._factor(root)
        norm = _norm(u)
        u.add_(slow, alpha=self.alpha)
        root = root / (root_mean_square(root, MATRIX) if self.mode == "ema" else 1.0)
        u.div_(root.clamp_min_(math.sqrt(tiny)).add_(self.eps))
        if self.mode == "ema" and self.update_norm == "rms":
            c = c * norm / _norm(u).clamp_min(tiny)
        return u.mul_(c)

    @property
    def rates_as(self) -> str:
        if self.mode == "paper" or self.update_norm is None:
            return self.label
        return Muon(scale=self.scale).rates_as

    def _factor(self, like: Tensor) -> float | Tensor:
        """Return c of a matrix like this."""
        return Muon(scale=self.scale).factor(*like.shape[-2:]) if self.mode == "ema" else 1.0

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        every = period * self.period
        clocks = {"momentum": ("matrix", "dot", every), "rms": ("vector", "l2 to g²", every)}
        clocks["slow"] = ("matrix", "dot", every * self.slow_period)
        return [
            Node(f"{name}.{key}", own, after, memory, objective, self.label)
            for key, (memory, objective, own) in clocks.items()
        ]


def _choose(now: bool | Tensor, new: Callable[[], Tensor], old: Tensor) -> Tensor:
    """Return `new()` where it is time, else `old`; a step that is an int does not calculate what it does not need."""
    if isinstance(now, Tensor):
        return torch.where(now, new(), old)
    return new() if now else old


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=MATRIX, keepdim=True)
