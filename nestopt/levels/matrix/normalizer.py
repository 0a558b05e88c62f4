"""Linear attention divided by what its keys come to: the memory has a row more, of the value 1 with every key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.precision import matmul
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_form import Accepted, Refused
from nestopt.core.tree import State
from nestopt.levels.closed_form import featured, refusal, refusal_of_writes
from nestopt.levels.matrix.form import LinearAttentionForm, _in_chunks
from nestopt.levels.presets import LinearAttention, divided


class NormalizedLinearForm(LinearAttentionForm):
    """Linear attention whose answers are means of values: it sums values with a 1 behind each, and divides by that."""

    levels: ClassVar[tuple[type[Level], ...]] = (LinearAttention,)

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, LinearAttention)
        if not level.normalizer:
            return Refused("normalizer=False", other_kind=True)
        why = refusal(level, LinearAttention) or refusal_of_writes(level) or _in_chunks(level)
        return Refused(why) if why else Accepted("linear attention with its normaliser, parallel within chunks")

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        y, after = super().forward(_with_ones(tokens), gates, state)
        return divided(y), after

    def step(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        y, after = super().step(_with_ones(tokens), gates, state)
        return divided(y), after

    def read(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> Tensor:
        assert isinstance(self.level, LinearAttention)
        q = featured(self.level.features, tokens).q
        return divided(matmul(q, state["level"]["memory"]["m"].mT))


def _with_ones(tokens: TokenBatch) -> TokenBatch:
    """Return the tokens with a 1 behind each value, 0 where a token is not active."""
    ones = tokens.active[..., None].to(tokens.v.dtype)
    return dataclasses.replace(tokens, v=torch.cat([tokens.v, ones], dim=-1))
