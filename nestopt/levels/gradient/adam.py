"""Adam: two memories of gradients in parallel, one of g and one of g² (NL eq. 101-105)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.mixing import mixed, plus_square
from nestopt.core.part import FieldError, Gate, Number
from nestopt.core.signal import Signal
from nestopt.core.tree import State, store
from nestopt.levels.gradient import fused
from nestopt.levels.gradient.fused import Memories, Numbers, Tensors
from nestopt.levels.gradient.scratch import scratch_like
from nestopt.levels.gradient.within import param_of


class Adam(Level):
    r"""Adam (Kingma & Ba 2015).

    $$m \leftarrow \beta_1 m + (1-\beta_1) g,\quad h \leftarrow \beta_2 h + (1-\beta_2) g^2,\quad
      u = \frac{m/(1-\beta_1^t)}{\sqrt{h/(1-\beta_2^t)} + \epsilon}$$

    Convention: averages; the direction has entries of size about 1, so learning rates are per entry.

    Args:
        betas: β1 and β2 in [0, 1). Default (0.9, 0.999).
        eps: ε > 0, added to the root. Default 1e-8.
        bias_correction: divide by 1 - β^t. Default True.
        amsgrad: use the largest h so far. Default False.
    """

    positive: ClassVar[frozenset[str]] = frozenset({"exp_avg_sq", "max_exp_avg_sq"})
    momentum_field: ClassVar[str | None] = "betas"
    reads_param: ClassVar[bool] = False
    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    objectives: ClassVar[dict[str, str]] = {"exp_avg": "l2 to g", "exp_avg_sq": "l2 to g²", "max_exp_avg_sq": "max"}
    depends_on: ClassVar[dict[str, str]] = {"max_exp_avg_sq": "exp_avg_sq"}

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    bias_correction: bool = True
    amsgrad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas = tuple(self.betas)  # type: ignore[assignment]
        for i, beta in enumerate(self.betas):
            if not 0 <= beta < 1:
                raise FieldError(self.label, f"betas[{i}]", beta, "is not allowed; give a number in [0, 1)")
        if len(self.betas) != 2:
            raise FieldError(self.label, "betas", self.betas, "is not allowed; give two numbers")
        self.check("eps", 0.0)

    @property
    def rates_as(self) -> str:
        return "adam"

    def init(self, param: Tensor) -> State:
        state = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        if self.amsgrad:
            state["max_exp_avg_sq"] = torch.zeros_like(param)
        return state

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        beta1, beta2 = self.betas
        m = mixed(state["exp_avg"], grad, 1 - beta1)
        h = plus_square(state["exp_avg_sq"] * beta2, grad, 1 - beta2)
        new = {"exp_avg": m, "exp_avg_sq": h}
        if self.amsgrad:
            h = new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], h)
        if self.bias_correction:
            m, h = signal.debias(m, beta1), signal.debias(h, beta2)
        # the root of an exact 0 has no gradient, and a level must be differentiable
        return m / (h.clamp_min(torch.finfo(h.dtype).tiny).sqrt() + self.eps), new

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        if fused.available(grad) and fused.reads(grad, state.values()):
            # the kernel steps a parameter: one of zeros, at a rate of -1, arrives at the direction, whatever its decay
            direction, memories = scratch_like(grad).zero_(), {key: [leaf] for key, leaf in state.items()}
            if _step(self, [direction], [grad], memories, int(signal.step), Numbers(-1.0)):
                return direction
        plain, new = Adam.step(self, grad, state, signal)
        return store(state, new, plain)

    def average_(self, average: Tensor, keep: float, take: float, grad: Tensor, state: State, signal: Signal) -> bool:
        if take <= 0 or not (fused.available(grad) and fused.reads(grad, [average, *state.values()])):
            return False
        # to the kernel the average is a parameter, at a rate of -take and with a decay that leaves `keep` of it
        memories, numbers = {key: [leaf] for key, leaf in state.items()}, Numbers(-take, (1 - keep) / -take)
        return _step(self, [average], [grad], memories, int(signal.step), numbers)


class AdamW(Adam):
    r"""Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    $$u = u_{\mathrm{Adam}} + \lambda W$$

    The decay is part of the direction, so it is scaled by the learning rate. Inside a memory it makes the memory fade.

    Args:
        weight_decay: λ >= 0. Default 0.01. The other arguments are those of `adam`.
    """

    weight_decay: Number = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("weight_decay", 0.0)

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        direction, state = super().step(grad, state, signal)
        return self._decayed(direction, signal), state

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        return self._decayed(super().step_(grad, state, signal), signal)

    def _decayed(self, direction: Tensor, signal: Signal) -> Tensor:
        if isinstance(self.weight_decay, int | float) and self.weight_decay == 0:
            return direction
        param = param_of(self, signal, "weight decay", "use adam")
        return direction + self.weight_decay * param  # type: ignore[operator]


def _step(
    level: Adam, params: Tensors, grads: Tensors, memories: Memories, step: int | Tensors, numbers: Numbers
) -> bool:
    """Step Adam or AdamW by torch's kernel, as `fused.Kernel`s do."""
    lr, decay, coupled, maximize = numbers
    own: Number = level.weight_decay if isinstance(level, AdamW) else 0.0
    # the kernel adds its decay to the gradient or takes it off the parameter, and has no answer to 0 / (0 + 0)
    if level.eps == 0 or isinstance(own, Tensor | Gate) or isinstance(decay, Tensor) or (coupled and own + decay):
        return False
    if isinstance(step, int):
        step = [torch.full((), step, dtype=torch.float32, device=params[0].device)] * len(params)
    if not level.bias_correction:
        step = [torch.full_like(count, math.inf) for count in step]
    kernel = torch._fused_adam_ if coupled else torch._fused_adamw_
    kernel(  # type: ignore[call-overload]
        params,
        grads,
        memories["exp_avg"],
        memories["exp_avg_sq"],
        memories["max_exp_avg_sq"] if level.amsgrad else [],
        step,
        lr=lr,
        beta1=level.betas[0],
        beta2=level.betas[1],
        weight_decay=coupled or own + decay,
        eps=level.eps,
        amsgrad=level.amsgrad,
        maximize=maximize,
    )
    return True


fused.KERNELS |= {Adam: _step, AdamW: _step}
