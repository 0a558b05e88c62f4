"""Titans beside attention: a memory that is a context of attention, a gate of it, or a layer before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nestopt.core.memories import Window
from nestopt.core.packing import Packing
from nestopt.core.pending import PENDING, RowChunks
from nestopt.core.precision import Precision, check_precision
from nestopt.core.token_batch import check_mask
from nestopt.core.token_state import Rows as Chosen
from nestopt.core.token_state import as_mask, fitted, numbers, reset_rows, shapes_of
from nestopt.core.tree import State, leaves
from nestopt.levels.deep.architectures import TitansBlock
from nestopt.levels.presets import WindowAttention
from nestopt.nn.conv import CausalConv
from nestopt.nn.options import check_options, projection
from nestopt.nn.rotary import rotary
from nestopt.nn.rows import Rows
from nestopt.nn.sequence_memory import SequenceMemory


class PersistentAttention(nn.Module):
    """Softmax attention to tokens that are given, and to learned ones that stand before all.

    Args:
        dim: width of the tokens.
        heads: of the attention; they divide `dim`.
        size: of the window.
        persistent: how many are learned. They have no position.
        rope: base of the rotary embedding of the others' positions.
    """

    def __init__(self, dim: int, heads: int, size: int, persistent: int, rope: float) -> None:
        super().__init__()
        self.level, self.heads, self.dim_head = WindowAttention(memory=Window(size)), heads, dim // heads
        self.size, self.rope = size, rope
        self.query, self.key, self.value, self.out = (projection(dim, dim) for _ in range(4))
        self.persistent = nn.Parameter(torch.randn(persistent, dim))

    def init_state(self, batch: int) -> State:
        """Return the window before the first token: no pairs `[B, H, size, 2 D]`, and a count of 0 `[B]`."""
        weight = self.query.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return {
            "pairs": weight.new_zeros(batch, self.heads, self.size, 2 * self.dim_head, dtype=dtype),
            "count": torch.zeros(batch, dtype=torch.int64, device=weight.device),
        }

    def pairs(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return keys and values `[B, H, n, 2 D]` of tokens `[B, n, dim]` at positions `[B, n]`."""
        k, v = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.key, self.value))
        return torch.cat([self._turned(k, positions), v], dim=-1).transpose(1, 2)

    def answer(self, x: Tensor, positions: Tensor, pairs: Tensor, allowed: Tensor) -> Tensor:
        """Attend from tokens `[B, T, dim]` to the pairs `[B, H, n, 2 D]` that are `allowed` `[B, T, n]`."""
        q = self.query(x).unflatten(-1, (self.heads, -1))
        own = (part(self.persistent).unflatten(-1, (self.heads, -1)).transpose(0, 1) for part in (self.key, self.value))
        first_k, first_v = own
        k, v = pairs.to(x.dtype).split(self.dim_head, dim=-1)
        ahead = q.transpose(1, 2) @ first_k.mT
        scores = self._turned(q, positions).transpose(1, 2) @ k.mT
        scores = torch.cat([ahead, scores.masked_fill(~allowed[:, None], -math.inf)], dim=-1)
        shares = (scores / math.sqrt(self.dim_head)).softmax(-1)
        of_first, of_pairs = shares.split([first_k.shape[1], k.shape[2]], dim=-1)
        return self.out((of_first @ first_v + of_pairs @ v).transpose(1, 2).flatten(2))

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotary(x, positions, self.rope) if self.rope else x

    def forward(self, x: Tensor, state: State, mask: Tensor | None, learn: bool) -> tuple[Tensor, State]:
        """Run tokens `[B, T, dim]`, at the front of their rows where there is a `mask`, each seeing the last `size`."""
        ys = []
        for first in range(0, x.shape[1], self.size):
            part = slice(first, first + self.size)
            y, state = self._window(x[:, part], state, None if mask is None else mask[:, part], learn)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    def _window(self, x: Tensor, state: State, mask: Tensor | None, learn: bool) -> tuple[Tensor, State]:
        """Run at most `size` tokens."""
        count, length = state["count"], x.shape[1]
        new = torch.arange(length, device=x.device)
        held = torch.arange(self.size, device=x.device)
        before = held >= self.size - count[:, None]  # which places of the window are taken
        if not learn:
            allowed = (before & (held > 0))[:, None].expand(-1, length, -1)
            return self.answer(x, count[:, None].expand(-1, length), state["pairs"], allowed), state
        positions = count[:, None] + new
        live = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask
        pairs = torch.cat([state["pairs"].to(x.dtype), self.pairs(x, positions)], dim=2)
        seen = [before[:, None] & (held > new[:, None]), live[:, None] & (new <= new[:, None])]
        y = self.answer(x, positions, pairs, torch.cat([one.expand(len(x), length, -1) for one in seen], dim=-1))
        taken = live.sum(1)
        last = (taken[:, None] + held)[:, None, :, None].expand(-1, self.heads, -1, 2 * self.dim_head)
        kept = pairs.gather(2, last).to(state["pairs"].dtype)
        return y, {"pairs": kept, "count": count + taken}


class TitansMixer(nn.Module):
    """A long-term memory and attention, as a `mac`, `mag` or `mal` puts them together: what mixes tokens in a block.

    Each sequence has its own memory and window, in the state that goes in and comes out: whole or in pieces, padded or
    not, a sequence gives the same.

    Args:
        block: which of the three, with its memory, window or segment, and persistent tokens.
        dim: width of the tokens.
        heads: of the memory and of the attention; they divide `dim`.
        conv: tokens seen by the causal convolution of the input; 0 is none.
        rope: base of the rotary embedding of positions within attention; 0 is none.
        precision: of the memory's products, as of a `SequenceMemory`.
        options: other arguments of the memory's `SequenceMemory`.

    Attributes:
        memory: the long-term memory, a `SequenceMemory`.
        attention: what attends.
    """

    def __init__(
        self,
        block: TitansBlock,
        dim: int,
        heads: int = 4,
        *,
        conv: int = 4,
        rope: float = 1000.0,
        precision: Precision = "float32",
        **options: Any,
    ) -> None:
        super().__init__()
        check_options(block.memory, dim, heads, None, None, conv, rope, 0)
        self.block, self.level, self.dim = block, block.memory, dim
        self.conv = CausalConv(dim, conv) if conv else None
        self.memory = SequenceMemory(block.memory, dim, heads, conv=0, precision=precision, **options)
        self.attention = PersistentAttention(dim, heads, block.size, block.persistent, rope)
        # what is multiplied is normalised, each with scales of its own (sec. 4.2)
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-5) for _ in range(2)) if block.way != "mal" else None
        self._shapes = shapes_of(self.init_state(1))

    @property
    def precision(self) -> Precision:
        return self.memory.precision

    @precision.setter
    def precision(self, precision: Precision) -> None:
        check_precision(precision, "TitansMixer")
        self.memory.precision = precision

    # -- states --------------------------------------------------------------------------------------------------------

    def init_state(self, batch: int) -> State:
        """Return the state of `batch` sequences before their first token: nested dicts of tensors, `[batch, ...]` each.

        A `mac` keeps the tokens of a segment that is not over as `"pending"`, and the memory as the segment found it.
        """
        state: State = {"memory": self.memory.init_state(batch)}
        if self.conv is not None:
            state["conv"] = self.conv.init_state(batch)
        if self.block.way != "mac":
            return {**state, "attention": self.attention.init_state(batch)}
        none = self.attention.query.weight.new_zeros(batch, 1, 0, self.dim)
        return {**state, PENDING: {"k": none, "live": torch.zeros_like(none[..., 0], dtype=torch.bool)}}

    def reset(self, state: Mapping[str, Any], rows: Chosen) -> State:
        """Return `state` with the sequences `rows` (numbers, or a bool each) begun anew, and all others as they are."""
        first = next(leaf for _, leaf in leaves(state))
        now = fitted(state, self._shapes, len(first), "TitansMixer.reset", dtype=self.memory.state_dtype)
        anew = as_mask(numbers(rows, len(first), first.device, "TitansMixer.reset"), len(first))
        return reset_rows(now, self.init_state(len(first)), anew)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        state: Mapping[str, Any] | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Any = None,
        learn: bool = True,
    ) -> tuple[Tensor, State]:
        """Run tokens `[B, T, dim]`, T >= 1: y `[B, T, dim]` and the state after the last.

        Args:
            x: tokens.
            state: from a former call; None begins new sequences.
            mask: `[B, T]`, True for tokens, False for padding, wherever it is, which is answered with 0.
            cu_seqlens: for sequences that lie end to end in one row, as of a `SequenceMemory`.
            learn: False reads only: each token is answered as if it came next, and of the state only the convolution
                moves on. Attention sees the tokens of the state, none of this call.

        Raises:
            ValueError: for another width of x, no tokens, a mask or a state that does not fit.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim or not x.shape[1]:
            raise ValueError(
                f"TitansMixer: x has the shape {list(x.shape)}; it must be [batch, tokens, dim={self.dim}], tokens >= 1"
            )
        packed = None
        if cu_seqlens is not None:
            if mask is not None:
                raise ValueError("TitansMixer: cu_seqlens and mask are both given; give one of them")
            packed = Packing.of(cu_seqlens, x, "TitansMixer")
            mask, x = packed.mask, packed.unpack(x)
        now = self.init_state(len(x)) if state is None else self._fitted(state, x)
        rows = None
        if mask is not None:
            check_mask(mask, *x.shape[:2])
            rows = Rows.of(mask)
            x, mask = rows.moved(x), rows.front
        new: State = {}
        if self.conv is not None:
            x, new["conv"] = self.conv(x, now["conv"], None if rows is None else rows.count)
        run = {"mac": self._context, "mag": self._gate, "mal": self._layer}[self.block.way]
        y, after = run(x, now, mask, learn)
        y = y if rows is None else rows.back(y)
        return (y if packed is None else packed.pack(y)), {**after, **new}

    def step(self, x_t: Tensor, state: Mapping[str, Any] | None = None, *, learn: bool = True) -> tuple[Tensor, State]:
        """One token of each sequence, `[B, dim]`, to y `[B, dim]` and the state after it: what `forward` gives."""
        y, new = self(x_t[:, None], state, learn=learn)
        return y[:, 0], new

    def _fitted(self, state: Mapping[str, Any], x: Tensor) -> State:
        return fitted(state, self._shapes, len(x), "TitansMixer", dtype=self.memory.state_dtype, device=x.device)

    def _gate(self, x: Tensor, state: State, mask: Tensor | None, learn: bool) -> tuple[Tensor, State]:
        y, attention = self.attention(x, state["attention"], mask, learn)
        read, memory = self.memory(x, state["memory"], mask=mask, learn=learn)
        return self._times(y, read), {"attention": attention, "memory": memory}

    def _layer(self, x: Tensor, state: State, mask: Tensor | None, learn: bool) -> tuple[Tensor, State]:
        y, memory = self.memory(x, state["memory"], mask=mask, learn=learn)
        y, attention = self.attention(y, state["attention"], mask, learn)
        return y, {"attention": attention, "memory": memory}

    def _times(self, y: Tensor, read: Tensor) -> Tensor:
        assert self.norms is not None
        return self.norms[0](y) * self.norms[1](read).sigmoid()

    # -- memory as context ---------------------------------------------------------------------------------------------

    def _context(self, x: Tensor, state: State, mask: Tensor | None, learn: bool) -> tuple[Tensor, State]:
        """Go from segment to segment, the first of which began with the pending tokens."""
        pending, size, memory = state[PENDING], self.block.size, state["memory"]
        if not learn:
            return self._only_read(x, pending, memory), state
        live = torch.ones_like(x[:, None, :, 0], dtype=torch.bool) if mask is None else mask[:, None]
        fresh = {"k": x[:, None], "live": live}
        rows = RowChunks.of(pending, mask, fresh["k"], size)
        if rows is not None:
            held = rows.joined(pending, fresh)
        else:
            held = {name: torch.cat([pending[name].to(part), part], dim=2) for name, part in fresh.items()}
        xs, length = held["k"][:, 0], held["k"].shape[2]
        whole = length - length % size if rows is None else rows.whole
        ys, padded = [], rows is not None or mask is not None
        for first in range(0, length, size):
            part = slice(first, min(first + size, length))
            y, after = self._segment(xs[:, part], held["live"][:, 0, part] if padded else None, memory)
            ys.append(y)
            if part.stop <= whole:
                memory = after
        y, rest = torch.cat(ys, dim=1), {name: part[:, :, whole:] for name, part in held.items()}
        if rows is not None:
            return rows.back(y[:, None])[:, 0], {"memory": memory, PENDING: rows.kept(rest)}
        return y[:, length - x.shape[1] :], {"memory": memory, PENDING: rest}

    def _segment(self, x: Tensor, live: Tensor | None, memory: State) -> tuple[Tensor, State]:
        """Run a segment `[B, n, dim]` from its start, or as much of it as there is; `live` `[B, n]` are tokens."""
        batch, length = x.shape[:2]
        place = torch.arange(length, device=x.device)
        before = (place <= place[:, None]).expand(batch, -1, -1)
        before = before if live is None else before & live[:, None]
        positions = place.expand(batch, -1)
        pairs = self._pairs(x, positions, memory)
        y = self.attention.answer(x, positions, pairs, torch.cat([before, before], dim=-1))
        read, memory = self.memory(y, memory, mask=live)
        return self._times(y, read), memory

    def _pairs(self, x: Tensor, positions: Tensor, memory: State) -> Tensor:
        """Return keys and values of what the memory knows of tokens x, and of these."""
        known, _ = self.memory(x, memory, learn=False)
        return torch.cat([self.attention.pairs(one, positions) for one in (known, x)], dim=2)

    def _only_read(self, x: Tensor, pending: State, memory: State) -> Tensor:
        """Answer tokens `[B, T, dim]` as if each came next in the segment."""
        before, live = pending["k"][:, 0].to(x.dtype), pending["live"][:, 0]
        place = torch.arange(before.shape[1], device=x.device).expand(len(x), -1)
        next_place = live.sum(1, keepdim=True).expand(-1, x.shape[1])
        allowed = torch.cat([live, live], dim=-1)[:, None].expand(-1, x.shape[1], -1)
        pairs = self._pairs(before, place, memory) if before.shape[1] else self.attention.pairs(before, place)
        y = self.attention.answer(x, next_place, pairs, allowed[..., : pairs.shape[2]])
        after = self._segment(before, live, memory)[1] if before.shape[1] else memory
        return self._times(y, self.memory(y, after, learn=False)[0])
