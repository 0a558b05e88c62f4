"""Omega: a memory whose every step learns the last few tokens together."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad as gradient_of
from torch.func import vmap

from nestopt.core.associative import AssociativeMemory
from nestopt.core.memories import Matrix, Memory, Theta
from nestopt.core.objectives import L2, Objective
from nestopt.core.part import FieldError, Gate, Number
from nestopt.core.retentions import Decay, Retention
from nestopt.core.signal import Signal
from nestopt.core.tree import State


class Omega(AssociativeMemory):
    r"""The omega rule (NL eq. 68, after Atlas): one step on the gradient of the last c tokens together.

    $$M_t = \alpha_t M_{t-1} - \eta_t \sum_{i=t-c+1}^{t} w^{t-i}\, \nabla\ell(M_{t-1}(k_i), v_i), \qquad
      y_t = M_t(q_t)$$

    On gradients, where pairs come together, it is the memory without a window. Layers L2-normalise queries and keys for
    it. With unit keys a matrix memory is stable for η Σ w^i <= 2.

    Args:
        window: c, 1 or more. Default 4; 1 is `deltanet` with a decay.
        weight: w in [0, 1], of a token by its age. Default 1.

    Other arguments: `associative_memory`, but `chunk` and `write`; `memory=mlp` makes it deep; `lr` is η, a gate in
    (0, ½) that starts at ¼, and the retention's `keep` α, a gate that starts at 0.97.
    """

    qk_norm: ClassVar[bool] = True

    memory: Memory = dataclasses.field(default_factory=Matrix)
    objective: Objective = dataclasses.field(default_factory=L2)
    retention: Retention = dataclasses.field(default_factory=lambda: Decay(Gate(0.97)))
    lr: Number = Gate(0.25, 0.0, 0.5)
    window: int = 4
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("window", 1)
        self.check("weight", 0.0, 1.0)
        for key, default in (("chunk", 1), ("write", "token"), ("fade", "with"), ("normalized", False)):
            if (value := getattr(self, key)) != default:
                raise FieldError(self.label, key, value, "is not allowed with a window; leave it out")

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        wide = self.features.dim(dim_k)
        pairs = {
            "keys": like.new_zeros(self.window - 1, wide),
            "values": like.new_zeros(self.window - 1, dim_v),
            # how much each counts: nothing before the first token
            "counts": like.new_zeros(self.window - 1),
        }
        return {**super().init_tokens(dim_k, dim_v, like, learned), "window": pairs}

    def token_step(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        q, k = self.features(q), self.features(k)
        before, pairs = state["memory"], state["window"]
        keys, values = torch.cat([pairs["keys"], k[None]]), torch.cat([pairs["values"], v[None]])
        counts = torch.cat([pairs["counts"], torch.ones_like(k[:1])])
        age = torch.arange(self.window - 1, -1, -1, device=k.device)
        lr = self.lr
        assert not isinstance(lr, Gate)  # as in every level that runs, it is a number by now
        rate = lr * counts * self.weight**age
        old = {key: value for key, value in state.items() if key != "window"}
        new = self.written(old, self._sum(before, keys, values, rate), signal, self.shown(before, keys, rate))
        kept = {"keys": keys[1:], "values": values[1:], "counts": counts[1:]}
        return self._answer(new["memory"] if self.read == "after" else before, q), {**new, "window": kept}

    def _sum(self, theta: Theta, keys: Tensor, values: Tensor, rate: Tensor) -> Theta:
        def loss(theta: Theta) -> Tensor:
            return (rate * vmap(lambda k, v: self.objective.loss(self.memory, theta, k, v))(keys, values)).sum()

        return gradient_of(loss)(theta)
