"""M3: orthogonalised momenta on two clocks, scaled by a second moment (NL eq. 75, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, get_args

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
from nestopt.levels.gradient.within import LIMIT, check_whole, refuse_unused, warn_of_mode

MATRIX = (-2, -1)


class M3(Level):
    r"""Multi-scale momentum Muon (NL Algorithm 1). Matrices only.

    $$M_1 \leftarrow \beta_1 M_1 + (1-\beta_1) g, \quad
      M_2 \leftarrow \beta_3 M_2 + (1-\beta_3)\!\!\sum_{\text{last } f}\! g \;\text{ every } f \text{ steps}, \quad
      O = \mathrm{NewtonSchulz}\big((1-\beta_1) g + \beta_1 M_1\big) + \alpha\,\mathrm{NewtonSchulz}(M_2)$$

    $$V \leftarrow \beta_2 V + (1-\beta_2) O^2, \quad
      u = c\,\rho\,\frac{O}{\sqrt{V/(1-\beta_2^t)} + \epsilon} \;\text{ within } \pm 3\,c\,\rho, \quad
      \rho: \; \lVert u\rVert_F = c\,\lVert O_1\rVert_F$$

    Convention: V is of the directions that it scales, which have no scale, and not of gradients, whose small entries
    would get nearly all of a step. $O_1$ is the first summand of O, as of `muon`; a step is as long as Muon's
    (`update_norm="rms"`), so its learning rates serve, and scaling all gradients changes nothing. The slow memory is
    read in the step that completes its period.

    `mode="ema"` has V of gradients, as the paper: $V \leftarrow \beta_2 V + (1-\beta_2) g^2$ over its mean,
    $O_1 = \mathrm{NewtonSchulz}(M_1)$, nothing held within bounds; it is the stack

        second_moment(of=parallel(muon(β1, nesterov=False), muon(β3, nesterov=False, period=f), weights=[1, α]),
                      sees="gradient")

    brought to that length (ε, relative to the root mean square of V there, apart). `mode="paper"` is the algorithm as
    printed, with sums that forget nothing: $M_1 \leftarrow M_1 + \beta_1 g$, $V \leftarrow V + \beta_2 g^2$, at the
    start of each period $M_2 \leftarrow M_2 + \beta_3 \sum g$ over the f gradients of the period before, and
    $u = (O_1 + \alpha O_2)/(\sqrt V + \epsilon)$. Its steps depend on the scale of gradients and shrink with time. Both
    warn: neither trains as Muon does.

    State: M1, √V (`rms`: it stays in range for gradients of any size), M2 and O2 in the parameter's dtype, 16 bytes a
    parameter in float32; O2 in `dtype` where one is given (14 with bfloat16, which is what O2 is calculated in on most
    hardware). O2 is calculated once in f steps.

    Args:
        betas: β1, β2, β3, in [0, 1) (for the paper's sums, which they weigh, in [0, 1]). Default (0.95, 0.999, 0.9).
        alpha: weight α >= 0 of the slow memory. Default 0.1; in the modes `"ema"` and `"paper"` 0.5.
        slow_period: f, steps between two reads of the slow memory. (`period` is this level's own clock.) Default 16.
        steps, coefficients, dtype, form: of `newton_schulz`.
        eps: ε >= 0, beside entries of √V of about 1/√n. Default 1e-6: float16 has gradients then.
        mode: `"direction"` (default), `"ema"` or `"paper"`.
        update_norm: `"rms"` (default): ρ as above. None: ρ = 1.
        scale: c, by shape, as of `muon`. Default `"original"`.

    Raises:
        FieldError: a value out of range; `update_norm` or `scale` given for the paper's mode, which has neither.
    """

    former_defaults: ClassVar[Mapping[str, Any]] = {"mode": "ema", "eps": 1e-8}
    positive: ClassVar[frozenset[str]] = frozenset({"rms"})
    momentum_field: ClassVar[str | None] = "betas"
    requires: ClassVar[frozenset[str]] = frozenset({"matrix"})
    reads_param: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    betas: tuple[float, float, float] = (0.95, 0.999, 0.9)
    alpha: float | None = None
    slow_period: int = 16
    steps: int = 5
    coefficients: str | tuple[float, float, float] = QUINTIC
    eps: float = 1e-6
    mode: Literal["direction", "ema", "paper"] = "direction"
    update_norm: Literal["rms"] | None = "rms"
    scale: Scale | None = "original"
    dtype: str | None = None
    form: Form = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas = tuple(self.betas)  # type: ignore[assignment]
        self.check_choice("mode", ("direction", "ema", "paper"))
        paper = self.mode == "paper"
        if len(self.betas) != 3 or not all(0 <= beta < 1 or (paper and beta == 1) for beta in self.betas):
            allowed = "[0, 1]" if paper else "[0, 1)"
            raise FieldError(self.label, "betas", self.betas, f"is not allowed; give three numbers in {allowed}")
        if self.alpha is not None:
            self.check("alpha", 0.0)
        check_whole(self, "slow_period")
        self.check("eps", 0.0)
        self.check_choice("update_norm", ("rms", None))
        self.check_choice("scale", (*get_args(Scale), None))
        check_iteration(self)
        if paper:
            refuse_unused(self, ("update_norm", "scale"), "mode='paper'")
        if self.mode != "direction":
            sums = "Algorithm 1 to the letter, whose sums diverge" if paper else "of V of gradients, as the paper's"
            warn_of_mode(self, f"{sums}, so that small entries get most of a step")

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
        fast = orthogonal(self, torch.lerp(grad, m, beta1) if self._own else m).to(m.dtype)
        o = fast + self._alpha * read.to(m.dtype)
        # a root of 0 has no derivative
        tiny = torch.finfo(grad.dtype).tiny
        root = torch.hypot(keep * state["rms"].clamp_min(tiny), take * (o if self._own else grad))
        new = {"momentum": m, "rms": root, "slow": {"momentum": total, "read": read}}
        c, u = self._factor(root), self._divided(o, root, signal)
        if self.mode != "paper" and self.update_norm == "rms":
            c = c * _norm(fast) / _divisor(u)
        return c * u, new

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        if isinstance(signal.step, Tensor):
            return super().step_(grad, state, signal)
        beta1, _, beta3 = self.betas
        m, root, total, read = state["momentum"], state["rms"], state["slow"]["momentum"], state["slow"]["read"]
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
        seen = torch.lerp(grad, m, beta1) if self._own else m
        o, (keep, take), c = orthogonal(self, seen, detached=True).to(m.dtype), self._weights, self._factor(m)
        norm = _norm(o)
        o.add_(read, alpha=self._alpha)
        torch.hypot(root.mul_(keep), take * (o if self._own else grad), out=root)
        u = self._divided(o, root, signal, in_place=True)
        if self.mode != "paper" and self.update_norm == "rms":
            c = c * norm / _divisor(u)
        return u.mul_(c)

    @property
    def _own(self) -> bool:
        """Whether V is of the directions."""
        return self.mode == "direction"

    @property
    def _alpha(self) -> float:
        return self.alpha if self.alpha is not None else 0.1 if self._own else 0.5

    @property
    def _weights(self) -> tuple[float, float]:
        """Return the weights of √V and of what it sees in the root of V's sum."""
        beta2 = self.betas[1]
        return (1.0, math.sqrt(beta2)) if self.mode == "paper" else (math.sqrt(beta2), math.sqrt(1 - beta2))

    def _divided(self, o: Tensor, root: Tensor, signal: Signal, *, in_place: bool = False) -> Tensor:
        """Return o over √V, which may be written over `o`."""
        if self._own:
            root = root * signal.debias(root.new_ones(()), self.betas[1]).sqrt()
        elif self.mode == "ema":
            root = root / root_mean_square(root, MATRIX)
        root = root.clamp_min(math.sqrt(torch.finfo(root.dtype).tiny)) + self.eps
        u = o.div_(root) if in_place else o / root
        return u if not self._own else u.clamp_(-LIMIT, LIMIT) if in_place else u.clamp(-LIMIT, LIMIT)

    @property
    def rates_as(self) -> str:
        if self.mode == "paper" or self.update_norm is None:
            return self.label
        return Muon(scale=self.scale).rates_as

    @property
    def forgets_scale(self) -> bool:
        return self.mode != "paper"

    def _factor(self, like: Tensor) -> float | Tensor:
        """Return c of a matrix like this."""
        return Muon(scale=self.scale).factor(*like.shape[-2:]) if self.mode != "paper" else 1.0

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        every = period * self.period
        seen = "l2 to O²" if self._own else "l2 to g²"
        clocks = {"momentum": ("matrix", "dot", every), "rms": ("vector", seen, every)}
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


def _divisor(u: Tensor) -> Tensor:
    """Return the norm of u; 1 for zeros, which have no direction, nor the derivative of one."""
    norm = _norm(u)
    return torch.where(norm > math.sqrt(torch.finfo(u.dtype).tiny), norm, 1.0)
