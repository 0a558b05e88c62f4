"""The gates of a level as a layer has them: a learned number per token and head, or a constant."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
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
        dim_head: width of a head's keys, by which gates may have several numbers (`Gate.width`).

    Attributes:
        learned: gates with their initial values in the layer, by dotted path.
        idle: the level's own initial values of all gates, in its order.

    Raises:
        ValueError: for a path that is no gate of the level, or a value out of the gate's range.
    """

    def __init__(self, level: Level, start: Start, heads: int, dim_head: int) -> None:
        gates = gates_of(level)
        widths = {path: gate.width(dim_head) for path, gate in gates.items()}
        self._wide = {path for path, width in widths.items() if width is not None}
        self._rows = {path: 1 if width is None else width for path, width in widths.items()}
        self.idle = {path: gate.init for path, gate in gates.items()}
        self.learned = {} if start is False else _begun(level, gates, start or {})
        self._constants = {
            path: gate.values(heads) if isinstance(gate, Heads) else [gate.init] * heads
            for path, gate in gates.items()
            if path not in self.learned
        }
        self._unit = all((gate.low, gate.high) == (0.0, 1.0) for gate in self.learned.values())

    def projection(self, dim: int, heads: int) -> nn.Linear | None:
        """Logits of the learned gates, `[rows · heads]`; whatever the token, every gate is at its initial value.

        A gate has a row for each of its numbers.
        """
        if not self.learned:
            return None
        biases = [gate.bias for path, gate in self.learned.items() for _ in range(self._rows[path])]
        linear = nn.Linear(dim, len(biases) * heads)
        nn.init.zeros_(linear.weight)
        with torch.no_grad():
            linear.bias.copy_(torch.tensor(biases).repeat_interleave(heads))
        return linear

    def stacked(self, logits: Tensor) -> Tensor:
        """Return the learned gates `[.., rows, heads]` from their logits `[.., rows · heads]`; float32 at least.

        Shorter floats can't tell 0.99 from 0.992, and a share that is kept acts many times.
        """
        shares = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        rows = [self._rows[path] for path in self.learned]
        shares = shares.unflatten(-1, (sum(rows), -1))
        if self._unit:
            return shares
        pairs = zip(self.learned.values(), shares.split(rows, -2), strict=True)
        return torch.cat([gate.low + (gate.high - gate.low) * share for gate, share in pairs], dim=-2)

    def by_path(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the learned gates by dotted path, `[.., heads]` each, or with its width `[.., heads, width]`."""
        return self.parted(self.stacked(logits), self.learned)

    def parted(self, gates: Tensor, paths: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return gates `[.., rows, heads]` of these paths (by default all) by dotted path, as `by_path` has them."""
        paths = list(self.idle if paths is None else paths)
        if not self._wide:
            return dict(zip(paths, gates.unbind(-2), strict=True))
        parts = zip(paths, gates.split([self._rows[path] for path in paths], -2), strict=True)
        return {path: part.mT if path in self._wide else part[..., 0, :] for path, part in parts}

    def every(self, logits: Tensor | None, h: Tensor, heads: int) -> Tensor:
        """Return all gates of the level at h `[B, dim]`, constants too, in the order of `idle`: `[B, rows, heads]`."""
        if logits is not None and not self._constants:
            return self.stacked(logits)
        learned: dict[str, Tensor] = {}
        if logits is not None:
            sizes = [self._rows[path] for path in self.learned]
            learned = dict(zip(self.learned, self.stacked(logits).split(sizes, -2), strict=True))
        found = h.new_empty(len(h), 0, heads, dtype=torch.promote_types(h.dtype, torch.float32))
        rows = [
            learned[path]
            if path in learned
            else constants(self._constants[path], found).expand(len(h), self._rows[path], -1)
            for path in self.idle
        ]
        return torch.cat([found, *rows], dim=1)

    def idle_like(self, like: Tensor) -> Tensor:
        """Return `idle` as `[rows, 1]`, where and of the dtype that `like` is."""
        return constants([value for path, value in self.idle.items() for _ in range(self._rows[path])], like)[:, None]


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
        learned[path] = copy.copy(gate)
        learned[path].init = float(value)
    return learned
