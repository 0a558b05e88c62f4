"""Any level's memory on tokens read and not written, by the kernels where its state is one of theirs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nestopt.core.associative import AssociativeMemory
from nestopt.core.gates import gates_of
from nestopt.core.level import Level
from nestopt.core.recall import answers, recalled
from nestopt.core.token_batch import tokens
from nestopt.core.token_reference import PENDING, every_gate
from nestopt.core.tree import State
from nestopt.levels.attention.softmax import softmax_read
from nestopt.levels.deep.form import deep_after
from nestopt.levels.forms import fast_form
from nestopt.levels.self_modifying.form import self_recalled
from nestopt.levels.self_modifying.level import SelfModifying


def recall(
    level: Level, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], state: State, mask: Tensor | None
) -> Tensor:
    """What `level` answers to q `[B, T, H, D_k]` as `state` holds it, `[B, T, H, D_v]` in the dtype of v.

    See `nestopt.core.recall.recalled`. Of k, v and `gates` it is only looked whether they are finite: where they are
    not, the answer is NaN, as when they are written.
    """
    given = tokens(q, k, v, mask, *(gate.transpose(1, 2) for gate in gates.values()))
    form, asked = fast_form(level), given.q.transpose(1, 2)
    if form == "self_modifying":
        assert isinstance(level, SelfModifying)
        return given.answer(self_recalled(level, given, state))
    if form == "attention":
        assert isinstance(level, AssociativeMemory)
        return given.answer(_of_pairs(level.features(given.q), state["level"]["memory"]))
    every = every_gate(level, gates, given.v.transpose(1, 2))
    live, known = given.live.transpose(1, 2), gates_of(level)
    every = {path: torch.where(live, gate, known[path].init) for path, gate in every.items()}
    if form == "deep_memory":
        assert isinstance(level, AssociativeMemory)
        begun = PENDING in state and state[PENDING]["k"].shape[2] > 0 and level.read != "chunk"
        theta = deep_after(level, state) if begun else state["level"]["memory"]
        y = answers(level, asked, theta, every)
    else:
        y = recalled(level, asked, v.shape[-1], state, every)
    return given.answer(y.transpose(1, 2))


def _of_pairs(q: Tensor, pairs: Mapping[str, Tensor]) -> Tensor:
    """Attention of q `[B, H, T, D_k]` to the pairs kept; zeros where there are none."""
    keys, values = (pairs[name].to(q.dtype) for name in ("keys", "values"))
    if not keys.shape[2]:
        return values.new_zeros(*q.shape[:3], values.shape[-1])
    if "mask" not in pairs:
        return softmax_read(q, keys, values)
    some = pairs["mask"].any(-1)[:, None, None, None]
    seen = pairs["mask"][:, None, None] | ~some  # lest a token see nothing
    return torch.where(some, softmax_read(q, keys, values, attn_mask=seen), 0.0)
