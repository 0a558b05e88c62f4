"""One more token of a memory that is read as its chunk found it: nothing is written until the chunk is over.

`nestopt.ops.run` gives the same; of a single token it spends most of its time on what only many need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.associative import AssociativeMemory
from nestopt.core.level import Level
from nestopt.core.tokens import PENDING
from nestopt.core.tree import State, leaves, nested
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


def keep(layer: SequenceMemory, h: Tensor, state: State) -> tuple[Tensor, State]:
    """What the level answers to a token that does not end its chunk, and its state.

    Args:
        layer: whose level `waits`.
        h: `[B, dim]`, after the convolution.
        state: of the level, with fewer than `span - 1` pending tokens.

    Returns:
        `[B, H, D]`, and the state with the token pending.
    """
    level = layer.level
    assert isinstance(level, AssociativeMemory)
    given = torch.stack([layer.query(h), layer.key(h), layer.value(h)], dim=1).unflatten(-1, (layer.heads, -1))
    gates = layer.level_gates.every(None if layer.gates is None else layer.gates(h), h, layer.heads)
    # of numbers that are not all finite the sum is not, either
    live = (given.sum((1, 3), dtype=gates.dtype) + gates.sum(1)) * 0 == 0
    given = torch.where(live[:, None, :, None], given, 0)
    q, k, v = given[:, 0, :, None], given[:, 1, :, None], given[:, 2, :, None]
    if layer.qk_norm:
        qk = given[:, :2, :, None]  # as F.normalize, without its detours
        q, k = (qk / torch.linalg.vector_norm(qk, dim=-1, keepdim=True).clamp_min(1e-12)).unbind(1)
    if layer.v_norm:
        v = F.normalize(v, dim=-1)
    if layer.rope:
        position = state["step"][:, :1]
        q, k = (rotary(x.transpose(1, 2), position, layer.rope).transpose(1, 2) for x in (q, k))
    held = state[PENDING]
    with torch.autocast(h.device.type, enabled=False):
        q, k, v = (x if x.dtype == gates.dtype else x.to(gates.dtype) for x in (q, k, v))
        y = level.memory.read(state["level"]["memory"], level.features(q))
        y = torch.where(live[..., None], y[:, :, 0], torch.nan).to(given.dtype)
        gates = torch.where(live[:, None], gates, layer.level_gates.idle_like(gates))
    old, new = dict(leaves(held["gates"])), gates[..., None].unbind(1)
    pending = {
        "k": torch.cat([held["k"], k], dim=2),
        "v": torch.cat([held["v"], v], dim=2),
        "live": torch.cat([held["live"], live[..., None]], dim=2),
        "gates": nested(
            {path: torch.cat([old[path], gate], dim=2) for path, gate in zip(layer.level_gates.idle, new, strict=True)}
        ),
    }
    return y, {"step": state["step"] + live, "level": state["level"], PENDING: pending}
