"""Levels that are, all by themselves, what a fused kernel of torch computes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from nestopt.core.associative import Gd
from nestopt.core.level import Level
from nestopt.kernels import fused
from nestopt.levels.adam import Adam, AdamW
from nestopt.levels.momentum import Momentum
from nestopt.optim.lanes.lane import Rates
from nestopt.optim.lanes.pieces import PiecesLane


def has_kernel(level: Level, param: Tensor) -> bool:
    """Whether a fused kernel may be able to step `param`. The kernels take contiguous tensors for granted."""
    return (
        type(level) in (Gd, Momentum, Adam, AdamW)
        and level.period == 1
        and fused.available(param.device.type, param.dtype)
        and param.is_contiguous()
    )


class FusedLane(PiecesLane):
    """Members that one fused kernel steps. Where the numbers of level or group are not the kernel's, as pieces."""

    def intact(self) -> bool:
        return super().intact() and all(map(Tensor.is_contiguous, self.params))

    def move(self, level: Level, grads: Sequence[Tensor], rates: Rates, step: int) -> None:
        done = False
        if not all(map(Tensor.is_contiguous, grads)):
            grads = [grad.contiguous() for grad in grads]
        if isinstance(level, Adam):
            done = self._adam(level, grads, rates, step)
        elif isinstance(level, Gd | Momentum):
            done = self._sgd(level, grads, rates, step)
        if not done:
            super().move(level, grads, rates, step)

    def _adam(self, level: Adam, grads: Sequence[Tensor], rates: Rates, step: int) -> bool:
        own = level.weight_decay if isinstance(level, AdamW) else 0.0
        decays = [decay for decay in (own, rates.decay, rates.coupled) if isinstance(decay, Tensor) or decay]
        if len(decays) > 1 or any(isinstance(decay, Tensor) for decay in decays):
            return False
        fused.adam(
            self.params,
            grads,
            self._leaves["exp_avg"],
            self._leaves["exp_avg_sq"],
            self._leaves["max_exp_avg_sq"] if level.amsgrad else [],
            step if level.bias_correction else math.inf,
            lr=rates.lr,
            betas=level.betas,
            eps=level.eps,
            weight_decay=decays[0] if decays else 0.0,  # type: ignore[arg-type]
            decoupled=not rates.coupled,
            maximize=rates.maximize,
        )
        return True

    def _sgd(self, level: Gd | Momentum, grads: Sequence[Tensor], rates: Rates, step: int) -> bool:
        if isinstance(level, Gd):
            level = Momentum(0.0)
        numbers = (level.beta, level.dampening)
        if rates.decay or any(isinstance(number, Tensor) for number in numbers):
            return False
        fused.sgd(
            self.params,
            grads,
            self._leaves.get("momentum", []),
            lr=rates.lr,
            momentum=level.beta,  # type: ignore[arg-type]
            dampening=level.dampening,  # type: ignore[arg-type]
            nesterov=level.nesterov,
            weight_decay=rates.coupled,
            maximize=rates.maximize,
            first=level.undamped_start and step == 1,
        )
        return True
