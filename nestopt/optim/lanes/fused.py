"""Levels that are, all by themselves, what a fused kernel of torch computes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from nestopt.core.associative import Gd
from nestopt.core.level import Level
from nestopt.core.part import Number
from nestopt.levels.gradient import fused
from nestopt.levels.gradient.adam import Adam, AdamW
from nestopt.levels.gradient.momentum import Momentum
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
        if runs(level, rates):
            descend(level, self.params, grads, self._leaves, rates, step)
        else:
            super().move(level, grads, rates, step)


def runs(level: Level, rates: Rates) -> bool:
    """Whether the numbers of a level that `has_kernel`, and of its group, are such as the kernel takes."""
    if isinstance(level, Adam):
        decays = _decays(level, rates)
        return len(decays) < 2 and not any(isinstance(decay, Tensor) for decay in decays)
    numbers = (level.beta, level.dampening) if isinstance(level, Momentum) else ()
    return not rates.decay and not any(isinstance(number, Tensor) for number in numbers)


def descend(
    level: Level,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    memories: Mapping[str, Sequence[Tensor]],
    rates: Rates,
    step: int | Sequence[Tensor],
) -> None:
    """Step all `params` at once in place, by the fused kernel of `level`.

    Args:
        level: one that `has_kernel`, and `runs`.
        params, grads: of one device and dtype; parameters and memories contiguous.
        memories: by key of the state, of each parameter.
        rates: of their group.
        step: their count, or, for Adam, that of each as a float32 tensor beside it.
    """
    grads = [grad if grad.is_contiguous() else grad.contiguous() for grad in grads]
    if isinstance(level, Adam):
        decays = _decays(level, rates)
        fused.adam(
            params,
            grads,
            memories["exp_avg"],
            memories["exp_avg_sq"],
            memories["max_exp_avg_sq"] if level.amsgrad else [],
            step if level.bias_correction else math.inf,
            lr=rates.lr,
            betas=level.betas,
            eps=level.eps,
            weight_decay=decays[0] if decays else 0.0,  # type: ignore[arg-type]
            decoupled=not rates.coupled,
            maximize=rates.maximize,
        )
        return
    assert isinstance(level, Gd | Momentum)
    level = Momentum(0.0) if isinstance(level, Gd) else level
    fused.sgd(
        params,
        grads,
        memories.get("momentum", []),
        lr=rates.lr,
        momentum=level.beta,  # type: ignore[arg-type]
        dampening=level.dampening,  # type: ignore[arg-type]
        nesterov=level.nesterov,
        weight_decay=rates.coupled,
        maximize=rates.maximize,
        first=level.undamped_start and step == 1,
    )


def _decays(level: Adam, rates: Rates) -> list[Number]:
    """Every weight decay that is not 0, of the level and of its group."""
    own = level.weight_decay if isinstance(level, AdamW) else 0.0
    return [decay for decay in (own, rates.decay, rates.coupled) if isinstance(decay, Tensor) or decay]
