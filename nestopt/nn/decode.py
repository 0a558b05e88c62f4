"""One more token of a memory, where that takes little: what `nestopt.ops.run` gives, without what only many need.

Deep memories that are read as their chunk found them write nothing until the chunk is over: the token is kept. Matrix
memories are written to by their recurrence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.associative import AssociativeMemory
from nestopt.core.device import no_autocast, number_like
from nestopt.core.level import Level
from nestopt.core.part import Gate, Number
from nestopt.core.precision import matmul, products_in
from nestopt.core.retentions import Decay
from nestopt.core.token_reference import PENDING
from nestopt.core.tree import State, leaves, nested
from nestopt.levels.deep.step_size import EPS
from nestopt.levels.forms import Rule, rule_of
from nestopt.nn.rotary import rotary
from nestopt.ops.dispatch import fast_form

if TYPE_CHECKING:
    from nestopt.nn.sequence_memory import SequenceMemory


def waits(level: Level) -> bool:
    """Whether a token within a chunk of `level` is read and kept, and that is all."""
    if fast_form(level) != "deep_memory" or level.span == 1:
        return False
    assert isinstance(level, AssociativeMemory)
    return level.read == "chunk"


def moves(level: Level) -> bool:
    """Whether every token of `level` is written to a matrix, which is all that is remembered."""
    if fast_form(level) not in ("linear_attention", "delta_rule") or not isinstance(level, AssociativeMemory):
        return False
    return rule_of(level.rule) == Rule()


class Token(NamedTuple):
    """What a layer makes of a token of each sequence.

    Attributes:
        q, k, v: `[B, H, D]`, 0 where it is not live.
        gates: all of the level's, `[B, gates, H]`, in the order of `Gates.idle`.
        live: `[B, H]`, whether all numbers are finite.
        given: the dtype of the answer.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Tensor
    live: Tensor
    given: torch.dtype


def shown(layer: SequenceMemory, h: Tensor, state: State) -> Token:
    """Of h `[B, dim]`, after the convolution; `state` is the level's."""
    given = torch.stack([layer.query(h), layer.key(h), layer.value(h)], dim=1).unflatten(-1, (layer.heads, -1))
    gates = layer.level_gates.every(None if layer.gates is None else layer.gates(h), h, layer.heads)
    # of numbers that are not all finite the sum is not, either
    live = (given.sum((1, 3), dtype=gates.dtype) + gates.sum(1)) * 0 == 0
    given = torch.where(live[:, None, :, None], given, 0)
    if layer.qk_norm:
        qk = given[:, :2]  # as F.normalize, without its detours
        q, k = (qk / torch.linalg.vector_norm(qk, dim=-1, keepdim=True).clamp_min(1e-12)).unbind(1)
        v = given[:, 2]
    else:
        q, k, v = given.unbind(1)
    if layer.v_norm:
        v = F.normalize(v, dim=-1)
    if layer.rope:
        position = state["step"][:, :1]
        q, k = (rotary(x[:, None], position, layer.rope)[:, 0] for x in (q, k))
    if given.dtype != gates.dtype:
        q, k, v = (x.to(gates.dtype) for x in (q, k, v))
    return Token(q, k, v, gates, live, given.dtype)


def keep(layer: SequenceMemory, h: Tensor, state: State) -> tuple[Tensor, State]:
    """What the level answers to a token that does not end its chunk, and its state.

    Args:
        layer: whose level `waits`.
        h: `[B, dim]`, after the convolution.
        state: of the level, with fewer than `span - 1` pending tokens.

    Returns:
        `[B, H, D]`, and the state with the token pending.
    """
    level, held = layer.level, state[PENDING]
    assert isinstance(level, AssociativeMemory)
    q, k, v, gates, live, given = shown(layer, h, state)
    with no_autocast(h.device), products_in(layer.precision):
        y = level.memory.read(state["level"]["memory"], level.features(q[:, :, None]))
        y = torch.where(live[..., None], y[:, :, 0], torch.nan).to(given)
        gates = torch.where(live[:, None], gates, layer.level_gates.idle_like(gates))
    old, new = dict(leaves(held["gates"])), gates[..., None].unbind(1)
    pending = {
        "k": torch.cat([held["k"], k[:, :, None]], dim=2),
        "v": torch.cat([held["v"], v[:, :, None]], dim=2),
        "live": torch.cat([held["live"], live[..., None]], dim=2),
        "gates": nested(
            {path: torch.cat([old[path], gate], dim=2) for path, gate in zip(layer.level_gates.idle, new, strict=True)}
        ),
    }
    return y, {"step": state["step"] + live, "level": state["level"], PENDING: pending}


def move(layer: SequenceMemory, h: Tensor, state: State) -> tuple[Tensor, State]:
    """What the level answers to a token, and its state; of a layer whose level `moves`. Else as `keep`."""
    level, before = layer.level, state["level"]["memory"]["m"]
    assert isinstance(level, AssociativeMemory)
    q, k, v, gates, live, given = shown(layer, h, state)
    at = dict(zip(layer.level_gates.idle, gates.unbind(1), strict=True))

    def number(value: Number, path: str) -> Tensor:
        return at[path] if isinstance(value, Gate) else number_like(value, gates)

    with no_autocast(h.device), products_in(layer.precision):
        q, k = level.features(q), level.features(k)
        rate, share, kept = number(level.lr, "lr"), None, before
        if level.step_size != 1.0:
            rate = rate * number(level.step_size, "step_size")
        if isinstance(level.retention, Decay):
            share = number(level.retention.keep, "retention.keep")
            kept = before * torch.where(live, share, 1.0)[..., None, None]
        if level.normalized:
            rate = level.bound * rate * (1.0 if share is None else share) / (EPS + k.square().sum(-1))
        if fast_form(level) == "delta_rule":
            v = v - matmul(kept if level.fade == "before" else before, k[..., None])[..., 0]
        v = torch.where(live, rate, 0.0)[..., None] * v
        after = torch.addcmul(kept, v[..., None], k[..., None, :])
        y = matmul(after if level.read == "after" else before, q[..., None])[..., 0]
        y = torch.where(live[..., None], y, torch.nan).to(given)
    return y, {"step": state["step"] + 1, "level": {**state["level"], "memory": {"m": after}}}
