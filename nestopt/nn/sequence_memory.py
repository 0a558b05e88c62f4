"""Any level as a layer on tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestopt.core.associative import AssociativeMemory
from nestopt.core.gates import gates_of
from nestopt.core.level import Level
from nestopt.core.memories import Window
from nestopt.core.tokens import begin
from nestopt.core.tree import State
from nestopt.levels.cms import Cms
from nestopt.nn.conv import CausalConv
from nestopt.nn.rotary import rotary
from nestopt.nn.state import fitted, shapes_of
from nestopt.ops import run


class SequenceMemory(nn.Module):
    r"""A level that remembers tokens: from each token a query, a key, a value and the level's gates, per head.

    $$h = x + \mathrm{conv}(x), \quad (q, k, v) = (W_q h, W_k h, W_v h), \quad g = \mathrm{low} + (\mathrm{high} -
      \mathrm{low})\,\sigma(w\cdot h + b), \quad y = W_o\,\mathrm{norm}(\mathrm{level}(q, k, v; g))$$

    Each sequence and head has its own memory, in the state that goes in and comes out: to run a sequence whole or in
    pieces is the same. What the level starts from (`Level.learned_start`) is a parameter per head.

    Args:
        level: any level but `cms`, which is a `CMS`.
        dim: width of the tokens.
        heads: memories side by side.
        dim_head: width of a head's queries, keys and values. Default dim / heads.
        conv: tokens seen by the causal depthwise convolution of the input (NL sec. 8.3); 0 is none.
        rope: base of the rotary embedding of positions in queries and keys; 0 is none. Default: 1000 for attention,
            whose pairs have no order of their own, and none for all else.
        qk_norm: L2-normalise queries and keys. Default: as the level asks (`level.qk_norm`).
        out_norm: normalise each head's read to a root mean square of 1, times a learned scale. Default: for all but
            attention, whose read is a mean of values and so is as large as one.
        gate_output: multiply the read by silu(W_g h).

    Raises:
        TypeError: if `level` is none, or is a `cms`.
        ValueError: for a number out of range, or a `dim` that `heads` does not divide.
    """

    def __init__(
        self,
        level: Level,
        dim: int,
        heads: int = 4,
        *,
        dim_head: int | None = None,
        conv: int = 4,
        rope: float | None = None,
        qk_norm: bool | None = None,
        out_norm: bool | None = None,
        gate_output: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(level, Level) or isinstance(level, Cms):
            raise TypeError(
                f"SequenceMemory: level={level!r} is not allowed; give a level (for a cms use nestopt.nn.CMS)"
            )
        for name, value, least in (("dim", dim, 1), ("heads", heads, 1), ("dim_head", dim_head, 1), ("conv", conv, 0)):
            if value is not None and value < least:
                raise ValueError(f"SequenceMemory: {name}={value} is not allowed; give a whole number, {least} or more")
        if rope is not None and rope != 0 and not 1 < rope < math.inf:
            raise ValueError(f"SequenceMemory: rope={rope} is not allowed; give 0 for none, or a number above 1")
        if dim_head is None and dim % heads:
            raise ValueError(
                f"SequenceMemory: heads={heads} does not divide dim={dim}; give dim_head, or other numbers"
            )
        self.level, self.dim, self.heads = level, dim, heads
        self.dim_head = dim // heads if dim_head is None else dim_head
        self.qk_norm = getattr(level, "qk_norm", False) if qk_norm is None else qk_norm
        attends = isinstance(level, AssociativeMemory) and isinstance(level.memory, Window)
        self.rope = (1000.0 if attends else 0.0) if rope is None else rope
        inner = heads * self.dim_head
        self.conv = CausalConv(dim, conv) if conv else None
        self.query, self.key, self.value = (_projection(dim, inner) for _ in range(3))
        self.out = _projection(inner, dim)
        out_norm = not attends if out_norm is None else out_norm
        # its eps is far above float32's: before the first write a read is exactly 0
        self.norm = nn.RMSNorm(self.dim_head, eps=1e-5) if out_norm else None
        self.output_gate = _projection(dim, inner) if gate_output else None
        self._gates = gates_of(level)
        self.gates = _gate_projection(dim, heads, [gate.bias for gate in self._gates.values()]) if self._gates else None
        starts = [level.learned_start(self.dim_head, self.dim_head) for _ in range(heads)]
        self._start_names = {name.replace(".", "-"): name for name in starts[0]}  # a parameter's name has no dots
        self.start = nn.ParameterDict(
            {key: nn.Parameter(torch.stack([one[name] for one in starts])) for key, name in self._start_names.items()}
        )
        self._shapes = shapes_of(self.init_state(1))

    def init_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first token: nested dicts of tensors, `[batch, ...]` each."""
        like = self.query.weight.new_empty(batch, 0, self.heads, self.dim_head)
        memory = begin(self.level, like, like, self._learned())
        return {"memory": memory} if self.conv is None else {"conv": self.conv.init_state(batch), "memory": memory}

    def forward(self, x: Tensor, state: Mapping[str, Any] | None = None) -> tuple[Tensor, State]:
        """Tokens `[B, T, dim]`, T >= 1, to y `[B, T, dim]` and the state after the last token.

        Raises:
            ValueError: for another width of x, no tokens, or a state of another batch size or another layer.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(
                f"SequenceMemory: x has the shape {list(x.shape)}; it must be [batch, tokens, dim={self.dim}]"
            )
        if x.shape[1] == 0:
            raise ValueError(
                f"SequenceMemory: x has the shape {list(x.shape)}: there is no token in it; give one or more"
            )
        batch = x.shape[0]
        state = self.init_state(batch) if state is None else fitted(state, self._shapes, batch, "SequenceMemory")
        new: State = {}
        if self.conv is not None:
            x, new["conv"] = self.conv(x, state["conv"])
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.query, self.key, self.value))
        if self.qk_norm:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.rope:
            seen = state["memory"]["step"][:, :1]  # of every head the same
            positions = seen + torch.arange(x.shape[1], device=x.device)
            q, k = rotary(q, positions, self.rope), rotary(k, positions, self.rope)
        y, new["memory"] = run(self.level, q, k, v, gates=self._gate_values(x), state=state["memory"])
        if self.norm is not None:
            y = self.norm(y.to(self.norm.weight.dtype))  # under autocast the read may be shorter than the scale
        y = y.flatten(-2)
        if self.output_gate is not None:
            y = y * F.silu(self.output_gate(x))
        return self.out(y), new

    def _learned(self) -> dict[str, Tensor]:
        return {name: self.start[key] for key, name in self._start_names.items()}

    def _gate_values(self, x: Tensor) -> dict[str, Tensor]:
        """The level's gates by dotted path, `[B, T, heads]` each."""
        if self.gates is None:
            return {}
        logits = self.gates(x).unflatten(-1, (len(self._gates), self.heads)).unbind(-2)
        return {
            path: gate.low + (gate.high - gate.low) * logit.sigmoid()
            for (path, gate), logit in zip(self._gates.items(), logits, strict=True)
        }

    def extra_repr(self) -> str:
        return f"{self.level}, dim={self.dim}, heads={self.heads}, dim_head={self.dim_head}"


def _projection(into: int, out: int) -> nn.Linear:
    """Weights N(0, 1/into), so that the output has the size of the input."""
    linear = nn.Linear(into, out, bias=False)
    nn.init.normal_(linear.weight, std=into**-0.5)
    return linear


def _gate_projection(dim: int, heads: int, biases: list[float]) -> nn.Linear:
    """Logits of all gates, `[gates · heads]`; whatever the token, every gate is at its initial value at first."""
    linear = nn.Linear(dim, len(biases) * heads)
    nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.bias.copy_(torch.tensor(biases).repeat_interleave(heads))
    return linear
