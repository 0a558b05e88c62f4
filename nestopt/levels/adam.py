"""Adam: two memories of gradients in parallel, one of g and one of g² (NL eq. 101-105)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.part import FieldError, Number
from nestopt.core.signal import Signal
from nestopt.core.tree import State


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

    batched: ClassVar[bool] = True
    objectives: ClassVar[dict[str, str]] = {"exp_avg": "l2 to g", "exp_avg_sq": "l2 to g²", "max_exp_avg_sq": "max"}
    follows: ClassVar[dict[str, str]] = {"max_exp_avg_sq": "exp_avg_sq"}

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

    def init(self, param: Tensor) -> State:
        state = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        if self.amsgrad:
            state["max_exp_avg_sq"] = torch.zeros_like(param)
        return state

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        (beta1, beta2), t = self.betas, signal.count(grad)
        m = torch.lerp(state["exp_avg"], grad, 1 - beta1)
        h = (state["exp_avg_sq"] * beta2).addcmul(grad, grad, value=1 - beta2)
        new = {"exp_avg": m, "exp_avg_sq": h}
        if self.amsgrad:
            h = new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], h)
        # the root of an exact 0 has no gradient, and a level must be differentiable
        root = h.clamp_min(torch.finfo(h.dtype).tiny).sqrt()
        if self.bias_correction:
            root, m = root / (1 - beta2**t) ** 0.5, m / (1 - beta1**t)
        return m / (root + self.eps), new

    def descend(self, param: Tensor, grad: Tensor, state: State, signal: Signal, lr: float) -> None:
        """`step` in place, in the order of operations of `torch.optim.Adam`: the same numbers to the bit."""
        (beta1, beta2), t = self.betas, int(signal.step)
        m, h = state["exp_avg"].lerp_(grad, 1 - beta1), state["exp_avg_sq"].mul_(beta2)
        h.addcmul_(grad, grad, value=1 - beta2)
        if self.amsgrad:
            h = torch.maximum(state["max_exp_avg_sq"], h, out=state["max_exp_avg_sq"])
        root = h.sqrt()
        if self.bias_correction:
            root, lr = root.div_((1 - beta2**t) ** 0.5), lr / (1 - beta1**t)
        param.addcdiv_(m, root.add_(self.eps), value=-lr)


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
        if isinstance(self.weight_decay, int | float) and self.weight_decay == 0:
            return direction, state
        if signal.param is None:
            raise ValueError(
                "adamw: weight decay needs the parameter, and a level that is itself the memory (on tokens) has none; "
                "use adam"
            )
        return direction + self.weight_decay * signal.param, state  # type: ignore[operator]

    def descend(self, param: Tensor, grad: Tensor, state: State, signal: Signal, lr: float) -> None:
        """`step` in place, in the order of operations of `torch.optim.AdamW`."""
        param.mul_(1 - lr * self.weight_decay)  # type: ignore[operator]
        super().descend(param, grad, state, signal, lr)
