"""An average of gradients that is right from its first step."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.mixing import mixed
from nestopt.core.part import Gate, Number
from nestopt.core.signal import Signal
from nestopt.core.tree import State


class Average(Level):
    r"""An exponential moving average of gradients, corrected for its start (Kingma & Ba 2015).

    $$m \leftarrow \beta m + (1-\beta)\,g, \qquad u = \frac{m}{1-\beta^t}$$

    t counts the level's own writes: on a clock (`period`) it is corrected for as many as there were. Without the
    correction it is `momentum(beta, dampening=beta)`; under `second_moment` it is Adam, and beside a slow one AdEMAMix.
    Convention: an average; the first direction is the first gradient.

    Args:
        beta: decay β in [0, 1). Default 0.9.
        bias_correction: divide by 1 - β^t, with β as it is at that step. Default True.
    """

    momentum_field: ClassVar[str | None] = "beta"
    reads_param: ClassVar[bool] = False
    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    objectives: ClassVar[dict[str, str]] = {"exp_avg": "l2 to g"}

    beta: Number = 0.9
    bias_correction: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", 0.0, 1.0, closed="[)")

    @property
    def steady_gain(self) -> Number:
        return 1.0

    def init(self, param: Tensor) -> State:
        return {"exp_avg": torch.zeros_like(param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        m = mixed(state["exp_avg"], grad, 1 - self.beta)  # type: ignore[operator]
        return self._corrected(m, signal), {"exp_avg": m}

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        if isinstance(self.beta, Tensor | Gate):
            return super().step_(grad, state, signal)
        return self._corrected(state["exp_avg"].lerp_(grad, 1 - self.beta), signal)

    def _corrected(self, m: Tensor, signal: Signal) -> Tensor:
        return signal.debias(m, self.beta) if self.bias_correction else m  # type: ignore[arg-type]
