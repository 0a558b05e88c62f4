"""Follow the regularized leader: the weights that suit all gradients so far best (NL eq. 3)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.part import PARAM
from nestopt.core.scale import square_limit
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.levels.gradient.within import param_of


class Ftrl(Level):
    r"""Go to where all gradients so far, and a regulariser, would have the weights (NL eq. 3).

    $$W_{t+1} = \arg\min_W \sum_{s\le t}\langle g_s, W\rangle + R_t(W) + \lambda_1\lVert W\rVert_1
      + \tfrac{\lambda_2}{2}\lVert W\rVert^2, \qquad u = (W_t - W_{t+1})/\eta$$

    `regularizer="start"` is the equation's: $R = \frac{1}{2\eta}\lVert W - W_0\rVert^2$ around the first weights, which
    without λ is gradient descent as long as η stays. `"proximal"` (McMahan et al. 2013) stays near every earlier
    W_s, $R_t = \frac{1}{2\eta}\sum_s\langle\sqrt{n_s} - \sqrt{n_{s-1}}, (W - W_s)^2\rangle + \frac{\beta}{2\eta}
    \lVert W\rVert^2$ with $n_t = \sum g_s^2$: without λ and β it is AdaGrad.

    Convention: the weights arrive where the equation says, whatever the learning rate η; those that λ1 sets to 0 are so
    up to rounding. Leave the optimizer's weight decay at 0, as λ2 is it. Entries of g beyond ±2⁵⁰ count as that.

    Args:
        regularizer: `"proximal"` (default) or `"start"`.
        l1, l2: λ1 and λ2, 0 or more. Default 0.
        beta: β >= 0, for `"proximal"`. Default 0.

    Raises:
        FieldError: a number out of range.
        ValueError: where there is no parameter, as on tokens, or no learning rate, as within another level.
    """

    requires: ClassVar[frozenset[str]] = frozenset({PARAM})
    positive: ClassVar[frozenset[str]] = frozenset({"square_sum"})
    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    objectives: ClassVar[dict[str, str]] = {
        "gradient_sum": "dot",
        "square_sum": "l2 to g²",
        "start": "the first weights",
    }

    regularizer: Literal["proximal", "start"] = "proximal"
    l1: float = 0.0
    l2: float = 0.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("regularizer", ("proximal", "start"))
        for key in ("l1", "l2", "beta"):
            self.check(key, 0.0)

    @property
    def forgets_scale(self) -> bool:
        return self.regularizer == "proximal" and not self.l1 and not self.beta

    def init(self, param: Tensor) -> State:
        kept = {"square_sum": torch.zeros_like(param)} if self.regularizer == "proximal" else {"start": param.clone()}
        return {"gradient_sum": torch.zeros_like(param), **kept}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        param = param_of(self, signal, "where it goes")
        if signal.lr is None:
            raise ValueError(f"{self.label} needs the learning rate, which a level within another is not told")
        lr = torch.as_tensor(signal.lr).to(param) if isinstance(signal.lr, Tensor) else signal.lr
        grad = grad.clamp(-square_limit(grad), square_limit(grad))
        if self.regularizer == "start":
            total = state["gradient_sum"] + grad
            new, seen, curvature = {"gradient_sum": total, "start": state["start"]}, lr * total - state["start"], 1.0
        else:
            squares = state["square_sum"].addcmul(grad, grad)
            before, now = (n.clamp_min(torch.finfo(n.dtype).tiny).sqrt() for n in (state["square_sum"], squares))
            # the sum of eq. 3's terms times the learning rate, so that one of 0 needs no division
            total = state["gradient_sum"] + lr * grad - (now - before) * param
            new, seen, curvature = {"gradient_sum": total, "square_sum": squares}, total, self.beta + now
        leader = -seen.sign() * (seen.abs() - lr * self.l1).clamp_min(0) / (curvature + lr * self.l2)
        moved = param - leader
        safe = torch.where(lr > 0, lr, 1.0) if isinstance(lr, Tensor) else lr or 1.0
        return moved / safe, new
