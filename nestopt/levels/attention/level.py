"""Forgetting attention: softmax attention whose pairs fade."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.device import number_like
from nestopt.core.memories import FADED, Theta
from nestopt.core.part import FieldError, Gate
from nestopt.core.retentions import Decay, Keep, Retention
from nestopt.core.tree import State
from nestopt.kernels.products import logarithm
from nestopt.levels.presets import Attention


class ForgettingAttention(Attention):
    r"""Forgetting attention (FoX, Lin et al. 2025): softmax attention whose pairs fade by shares that the data choose.

    $$y_t = \sum_{s \le t} \mathrm{softmax}_s\Big(\frac{k_s^\top q_t}{\sqrt{D_k}} +
      \sum_{s < r \le t} \log \alpha_r\Big)\, v_s$$

    α is the retention's `keep`, a gate per token and head that starts at 0.99; below the least normal number of its
    dtype it counts as that. Layers give it no rotary positions. `memory=window(size=c)` keeps the last c pairs only,
    which it needs on gradients. Other arguments: `associative_memory`.
    """

    fades_pairs: ClassVar[bool] = True

    retention: Retention = dataclasses.field(default_factory=lambda: Decay(Gate(0.99)))

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.retention) not in (Keep, Decay):
            raise FieldError(self.label, "retention", self.retention, "is not allowed; give keep or decay")

    def init(self, param: Tensor) -> State:
        return self._with_faded(super().init(param))

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        return self._with_faded(super().init_tokens(dim_k, dim_v, like, learned))

    def _with_faded(self, state: State) -> State:
        return {**state, "memory": {**state["memory"], FADED: state["memory"]["keys"].new_zeros(0)}}

    def appended(self, theta: Theta, k: Tensor, v: Tensor) -> Theta | None:
        pairs = self.memory.append(theta, k, v)
        assert pairs is not None
        keep = getattr(self.retention, "keep", 1.0)
        faded = theta[FADED] + logarithm(number_like(keep, theta[FADED]))
        return {**pairs, FADED: torch.cat([faded, faded.new_zeros(1)])[-pairs["keys"].shape[0] :]}
