"""The gates of a level as a layer has them: a learned number per token and head, or a constant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from nestopt.core.device import constants
from nestopt.core.gates import gates_of
from nestopt.core.level import Level
from nestopt.core.part import Gate, Heads, nearest

Start = Mapping[str, float] | Literal[False] | None
"""Where gates start, by dotted path; False: none is learned."""


class Gates:
    """The gates of a level in a layer of so many heads.

    Args:
        level: whose gates.
        start: overrides initial values; False leaves all gates at them. Constants per head (`Heads`) are never learned.
        heads: of the layer.

    Attributes:
        learned: gates with their initial values in the layer, by dotted path.
        idle: the level's own initial values of all gates, in its order.

    Raises:
        ValueError: for a path that is no gate of the level, or a value out of the gate's range.
    """

    def __init__(self, level: Level, start: Start, heads: int) -> None:
        gates = gates_of(level)
        self.idle = {path: gate.init for path, gate in gates.items()}
        self.learned = {} if start is False else _begun(level, gates, start or {})
        self._constants = {
            path: gate.values(heads) if isinstance(gate, Heads) else [gate.init] * heads
            for path, gate in gates.items()
            if path not in self.learned
        }
        self._unit = all((gate.low, gate.high) == (0.0, 1.0) for gate in self.learned.values())

    def projection(self, dim: int, heads: int) -> nn.Linear | None:
        """Logits of the learned gates, `[gates · heads]`; whatever the token, every gate is at its initial value."""
        if not self.learned:
            return None
        linear = nn.Linear(dim, len(self.learned) * heads)
        nn.init.zeros_(linear.weight)
        with torch.no_grad():
            linear.bias.copy_(torch.tensor([gate.bias for gate in self.learned.values()]).repeat_interleave(heads))
        return linear

    def stacked(self, logits: Tensor) -> Tensor:
        """Return the learned gates `[.., gates, heads]` from their logits `[.., gates · heads]`; float32 at least.

        Shorter floats can't tell 0.99 from 0.992, and a share that is kept acts many times.
        """
        shares = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        shares = shares.unflatten(-1, (len(self.learned), -1))
        if self._unit:
            return shares
        pairs = zip(self.learned.values(), shares.unbind(-2), strict=True)
        return torch.stack([gate.low + (gate.high - gate.low) * share for gate, share in pairs], dim=-2)

    def by_path(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the learned gates by dotted path, `[.., heads]` each."""
        return dict(zip(self.learned, self.stacked(logits).unbind(-2), strict=True))

    def every(self, logits: Tensor | None, h: Tensor, heads: int) -> Tensor:
        """Return all gates of the level at h `[B, dim]`, constants too, in the order of `idle`: `[B, gates, heads]`."""
        if logits is not None and not self._constants:
            return self.stacked(logits)
        learned = {} if logits is None else self.by_path(logits)
        found = h.new_empty(len(h), 0, heads, dtype=torch.promote_types(h.dtype, torch.float32))
        rows = [
            learned[path] if path in learned else constants(self._constants[path], found).expand(len(h), -1)
            for path in self.idle
        ]
        return torch.cat([found, *(row[:, None] for row in rows)], dim=1)

    def idle_like(self, like: Tensor) -> Tensor:
        """Return `idle` as `[gates, 1]`, where and of the dtype that `like` is."""
        return constants(list(self.idle.values()), like)[:, None]


def _begun(level: Level, gates: Mapping[str, Gate], start: Mapping[str, float]) -> dict[str, Gate]:
    learned = {path: gate for path, gate in gates.items() if not isinstance(gate, Heads)}
    names = ", ".join(learned) or "none"
    for path, value in start.items():
        if path not in learned:
            why = "is a constant per head." if path in gates else f"is no gate of it.{nearest(path, learned)}"
            raise ValueError(f"SequenceMemory: gates has {path!r}, which {why} {level.label} learns: {names}")
        gate = learned[path]
        if isinstance(value, bool) or not isinstance(value, int | float) or not gate.low < value < gate.high:
            raise ValueError(
                f"SequenceMemory: gates[{path!r}]={value!r} is not allowed; give a number strictly between {gate.low} "
                f"and {gate.high}"
            )
        learned[path] = Gate(value, gate.low, gate.high)
    return learned
