"""Matrix memories of sums whose decay is one for each channel of the keys, beyond what parts say: HGRN2 and RWKV-6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nestopt.core.features import Identity
from nestopt.core.level import Level
from nestopt.core.memories import Matrix
from nestopt.core.part import FieldError, Gate, Heads, Number
from nestopt.core.retentions import Keep
from nestopt.core.signal import Signal
from nestopt.core.token_batch import TokenBatch
from nestopt.core.tree import State
from nestopt.levels.matrix.form import LinearAttentionForm
from nestopt.levels.presets import Gla, LinearAttention


class Hgrn2(LinearAttention):
    r"""HGRN2 (Qin et al. 2024): a matrix memory in which a channel takes in what it forgets.

    $$\alpha_t = \lambda + (1 - \lambda)\,\sigma(k_t), \qquad
      M_t = M_{t-1}\,\mathrm{Diag}(\alpha_t) + v_t (1 - \alpha_t)^\top, \qquad y_t = M_t q_t$$

    The key is the logit of the decay of its channel, so that there is no gate: every column of M is a mean of values.

    Args:
        lower: λ in [0, 1), the least that is kept. Default ½, ¾, 7/8, … by head, which remember longer and longer.

    Other arguments: `associative_memory`; memory, features, objective, retention, chunk, read and write stay at their
    defaults.
    """

    lower: Number = Heads(0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("lower", 0.0, 1.0, closed="[)")
        fixed = {"memory": Matrix(), "features": Identity(), "retention": Keep(), "chunk": 1, "read": "after"}
        for key, value in {**fixed, "write": "token", "normalized": False}.items():
            if getattr(self, key) != value:
                raise FieldError(self.label, key, getattr(self, key), "is not allowed: its keys say what is kept")

    def token_step(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        assert not isinstance(self.lower, Gate)  # as in every level that runs, it is a number by now
        forgotten = (1 - self.lower) * torch.sigmoid(-k)
        faded = {name: w * (1 - forgotten) for name, w in state["memory"].items()}
        return super().token_step(q, forgotten, v, {**state, "memory": faded}, signal)


class Rwkv6(Gla):
    r"""RWKV-6 (Peng et al. 2024): GLA that reads before it writes, with a weight of its own for the present token.

    $$y_t = \big(M_{t-1} + v_t (u\odot k_t)^\top\big)\, q_t, \qquad
      M_t = M_{t-1}\,\mathrm{Diag}(\alpha_t) + v_t k_t^\top$$

    The bonus u `[D_k]` is learned by layers, one for each head, and starts at 1. α as in `gla`; queries and keys are
    not normalised. Other arguments: `associative_memory`; `read` stays `"before"`.
    """

    qk_norm: ClassVar[bool] = False
    constant_keys: ClassVar[tuple[str, ...]] = ("bonus",)

    read: Literal["after", "before", "chunk"] = "before"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value in {"read": "before", "chunk": 1, "memory": Matrix()}.items():
            if getattr(self, key) != value:
                problem = f"is not allowed: its bonus is for {key}={value!r}; leave it out"
                raise FieldError(self.label, key, getattr(self, key), problem)

    def learned_start(self, dim_k: int, dim_v: int) -> dict[str, Tensor]:
        return {"bonus": torch.ones(self.features.dim(dim_k))}

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        state = super().init_tokens(dim_k, dim_v, like, {})
        return {**state, "bonus": learned.get("bonus", like.new_ones(self.features.dim(dim_k)))}

    def token_step(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        bonus = state["bonus"]
        y, new = super().token_step(q, k, v, {key: x for key, x in state.items() if key != "bonus"}, signal)
        own = (self.features(q) * bonus * self.features(k)).sum()
        return y + own * self.lr * self.step_size * v, {**new, "bonus": bonus}


class Hgrn2Form(LinearAttentionForm):
    """HGRN2: linear attention whose keys and decays are both of its keys."""

    levels: ClassVar[tuple[type[Level], ...]] = (Hgrn2,)
    own = Hgrn2
    level: Hgrn2

    def _as_sum(
        self, tokens: TokenBatch, gates: Mapping[str, Tensor], level: State
    ) -> tuple[TokenBatch, dict[str, Tensor], Tensor]:
        x, _, memory = super()._as_sum(tokens, gates, level)
        lower = self.number(self.level.lower, "lower", gates, x.k)[..., None]
        forgotten = (1 - lower) * torch.sigmoid(-x.k)
        return x.replace(k=forgotten), {"decay": 1 - forgotten}, memory


class Rwkv6Form(LinearAttentionForm):
    """RWKV-6: linear attention before the write, and the present pair by its bonus."""

    levels: ClassVar[tuple[type[Level], ...]] = (Rwkv6,)
    own = Rwkv6

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        y, new = super().forward(tokens, gates, state)
        return y + self._present(tokens, gates, state["level"]), new

    def step(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        y, new = super().step(tokens, gates, state)
        return y + self._present(tokens, gates, state["level"]), new

    def _present(self, tokens: TokenBatch, gates: Mapping[str, Tensor], level: State) -> Tensor:
        """Return what each token's own pair adds to its answer."""
        x, _, _ = self._as_sum(tokens, gates, level)
        return (x.q * level["bonus"][:, :, None] * x.k).sum(-1, keepdim=True) * x.v
