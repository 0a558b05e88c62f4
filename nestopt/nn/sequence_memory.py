"""Any level as a layer on tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestopt.core.device import no_autocast
from nestopt.core.level import Level
from nestopt.core.packing import Packing
from nestopt.core.precision import Precision, check_precision, check_products, products_in
from nestopt.core.token_batch import TokenBatch, check_mask, for_queries, shared_by
from nestopt.core.token_choice import make_form
from nestopt.core.token_form import FormSetting, TokenForm
from nestopt.core.token_state import Rows as Chosen
from nestopt.core.token_state import as_mask, fitted, numbers, shapes_of
from nestopt.core.tree import State
from nestopt.kernels.unit import unit
from nestopt.nn.call import STORE, Call
from nestopt.nn.conv import CausalConv
from nestopt.nn.gating import Gates, Start
from nestopt.nn.head_norm import HeadNorm
from nestopt.nn.options import check_input, check_options, projection
from nestopt.nn.pieces import lengths
from nestopt.nn.rotary import rotary
from nestopt.nn.rows import Rows
from nestopt.nn.stats import Stats


class SequenceMemory(nn.Module):
    r"""A level that remembers tokens: from each token a query, a key, a value and the level's gates, per head.

    $$h = x + \mathrm{conv}(x), \quad (q, k, v) = (W_q h, W_k h, W_v h), \quad g = \mathrm{low} + (\mathrm{high} -
      \mathrm{low})\,\sigma(w\cdot h + b), \quad y = W_o\,\mathrm{norm}(\mathrm{level}(q, k, v; g))$$

    Each sequence and head has its own memory, in the state that goes in and comes out: to run a sequence whole or in
    pieces is the same. What the level starts from (`Level.learned_start`) is a parameter per head. The state is nested
    dicts of tensors, `[batch, ...]` each; `nestopt.nn` has what is done with them (`detach`, `clone`, `to`, `index`,
    `cat`). Which form runs the level, and why, `explain` says.

    Args:
        level: any level but `cms`, which is a `CMS`.
        dim: width of the tokens.
        heads: memories side by side.
        kv_heads: keys and values side by side, a divisor of `heads`: heads / kv_heads queries in a row share each of
            them, so that their projections are so much smaller. Attention keeps one pair for all that share it
            (grouped-query attention); any other level has a memory for each query, with gates of its own. Default:
            `heads`.
        dim_head: width of a head's queries, keys and values. Default dim / heads.
        conv: tokens seen by the causal depthwise convolution of the input (NL sec. 8.3); 0 is none.
        rope: base of the rotary embedding of positions in queries and keys; 0 is none. Default: 1000 for attention,
            whose pairs have no order of their own unless they fade, and none for all else.
        qk_norm: L2-normalise queries and keys. Default: as the level asks (`level.qk_norm`).
        v_norm: L2-normalise values. Default: as the level asks (`level.v_norm`; `oja` does).
        gates: where gates start, by dotted path, instead of at the level's own values; or False: all stay at the
            level's values, and none is learned. Constants per head (`Heads`) are never learned.
        out_norm: normalise each head's read to a root mean square of 1, times a learned scale. Default: for all but
            attention, whose read is a mean of values and so is as large as one.
        gate_output: multiply the read by silu(W_g h).
        checkpoint: of deep memories: recompute in the backward pass all but every so many chunks' weights; 0 keeps all.
        precision: of the products of its memory, `"float32"`, `"tf32"` or `"bfloat16"`; states and sums are float32
            whatever it is (`nestopt.core.precision`). It may be changed at any time: it is an attribute, and no part of
            a state.
        form: name of the form that is to run the level (`nestopt.core.token_choice`). Default: of those that take the
            level as it is configured, on the device that the layer is on, the one with the highest priority.

    Raises:
        TypeError: if `level` is none, or is a `cms`.
        ValueError: for a number out of range, a `dim` that `heads` does not divide, `gates` that the level has not,
            a `precision` of another name, or a `form` that does not take the level; as it is called, for a precision
            that the device lacks.
    """

    def __init__(
        self,
        level: Level,
        dim: int,
        heads: int = 4,
        *,
        kv_heads: int | None = None,
        dim_head: int | None = None,
        conv: int = 4,
        rope: float | None = None,
        qk_norm: bool | None = None,
        v_norm: bool | None = None,
        gates: Start = None,
        out_norm: bool | None = None,
        gate_output: bool = False,
        checkpoint: int = 0,
        precision: Precision = "float32",
        form: str | None = None,
    ) -> None:
        super().__init__()
        check_options(level, dim, heads, kv_heads, dim_head, conv, rope, checkpoint)
        check_precision(precision, "SequenceMemory")
        self.level, self.dim, self.heads, self.checkpoint = level, dim, heads, checkpoint
        self.precision: Precision = precision
        self.kv_heads = kv_heads or heads
        self.dim_head = dim // heads if dim_head is None else dim_head
        self.qk_norm = getattr(level, "qk_norm", False) if qk_norm is None else qk_norm
        self.v_norm = getattr(level, "v_norm", False) if v_norm is None else v_norm
        # a memory that keeps its pairs has no order of its own, and answers with means of values
        self.rope = (
            (1000.0 if level.appends and not getattr(level, "fades_pairs", False) else 0.0) if rope is None else rope
        )
        inner = heads * self.dim_head
        self.conv = CausalConv(dim, conv) if conv else None
        shared = self.kv_heads * self.dim_head
        self.query, self.key, self.value = (projection(dim, width) for width in (inner, shared, shared))
        self.out = projection(inner, dim)
        out_norm = not level.appends if out_norm is None else out_norm
        # its eps is far above float32's: before the first write a read is exactly 0
        self.norm = HeadNorm(self.dim_head, eps=1e-5) if out_norm else None
        self.output_gate = projection(dim, inner) if gate_output else None
        self.level_gates = Gates(level, gates, heads, self.dim_head)
        self.gates = self.level_gates.projection(dim, heads)
        starts = [level.learned_start(self.dim_head, self.dim_head) for _ in range(heads)]
        self._start_names = {name.replace(".", "-"): name for name in starts[0]}  # a parameter's name has no dots
        self.start = nn.ParameterDict(
            {key: nn.Parameter(torch.stack([one[name] for one in starts])) for key, name in self._start_names.items()}
        )
        self._form_name = form
        self._choose_form()
        self._shapes = shapes_of(self.init_state(1))
        if level.appends and not self.form.takes_padding:
            del self._shapes["memory"]["level"]["memory"]["mask"]

    def _choose_form(self) -> None:
        setting = FormSetting(
            self.query.weight.device, self.state_dtype, self.checkpoint, sharing=self.heads // self.kv_heads
        )
        self.form: TokenForm = make_form(self.level, setting, self._form_name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SequenceMemory:
        """Choose the form anew where the layer has moved to, or in its new dtype."""
        super()._apply(fn, recurse)
        self._choose_form()
        return self

    def explain(self) -> str:
        """Say which form runs the level, and why no form of a higher priority does."""
        return "\n".join(self.form.explain())

    # -- states --------------------------------------------------------------------------------------------------------

    @property
    def state_dtype(self) -> torch.dtype:
        """In which memories are: float32, or float64 where the layer is."""
        return torch.promote_types(self.query.weight.dtype, torch.float32)

    def init_state(self, batch: int) -> State:
        """Return the state of `batch` sequences before their first token: nested dicts of tensors, `[batch, ...]` each.

        Float32 at least, whatever the layer's dtype. The learned start is in it with its graph.
        """
        like = self.query.weight.new_empty(0, dtype=self.state_dtype)
        heads = self.kv_heads if self.form.shares else self.heads
        memory = self.form.init(batch, heads, self.dim_head, self.dim_head, like, self._learned())
        return {"memory": memory} if self.conv is None else {"conv": self.conv.init_state(batch), "memory": memory}

    def _learned(self) -> dict[str, Tensor]:
        """Return the learned start, `[H, ..]` each, by the level's names."""
        return {name: self.start[key].to(self.state_dtype) for key, name in self._start_names.items()}

    def reset(self, state: Mapping[str, Any], rows: Chosen) -> State:
        """Return `state` with the sequences `rows` begun anew, at the learned start, and all others as they are.

        Args:
            state: of this layer.
            rows: their numbers (a list or an integer tensor), or a bool for each sequence of the batch.

        Raises:
            ValueError: for rows that the batch has not, a state of another layer, or a level whose memory grows and
                can't leave pairs out (attention that reads `"before"` its write).
        """
        if not self.form.takes_padding:
            raise ValueError(
                f"reset: the memory of {self.level.label} with read={getattr(self.level, 'read', None)!r} keeps every "
                "pair, and can't forget those of some sequences; begin them in a state of their own"
            )
        batch = _batch_of(state)
        now = fitted(state, self._shapes, batch, "SequenceMemory.reset", dtype=self.state_dtype)
        given = numbers(rows, batch, now["memory"]["step"].device, "SequenceMemory.reset")
        begun, anew = self.init_state(batch), as_mask(given, batch)
        new: State = {"memory": self.form.reset(now["memory"], begun["memory"], anew)}
        if self.conv is not None:
            new["conv"] = torch.where(anew[:, None, None], begun["conv"], now["conv"])
        return new

    # -- tokens --------------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        state: Mapping[str, Any] | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Any = None,
        learn: bool = True,
        queries: Tensor | None = None,
        values: Tensor | None = None,
        store_mask: Tensor | None = None,
        return_stats: bool = False,
        validate: bool = False,
    ) -> tuple[Tensor, State] | tuple[Tensor, State, Stats]:
        """Run tokens `[B, T, dim]`, T >= 1: y `[B, T, dim]` and the state after the last token.

        Wherever the padding is, each sequence gives what its tokens give alone, and goes on as it does: it has its own
        place in a chunk.

        Args:
            x: tokens.
            state: from a former call, to go on with its sequences; None begins new ones.
            mask: `[B, T]`, True for tokens, False for padding, which is answered with 0.
            cu_seqlens: for sequences that lie end to end in one row, x `[1, N, dim]`: where each begins, and the end,
                rising from 0 to N. Each is run as if alone; states have a batch of their number. On another device than
                the CPU it is waited for.
            learn: False reads only: each token is answered from the memory that `state` holds, as if it came next, and
                in the state only the convolution moves on. Attention then sees the pairs of the state, none of this
                call; where there are none the answer is of zeros.
            queries, values: `[B, T, dim]`, of which queries or values are made in the place of x, without the
                convolution; keys and gates are made of x.
            store_mask: `[B, T]`, False for tokens that only read: they are answered from the memory as it is by then,
                take their place in a chunk, and are not written. Not for attention, which keeps every pair.
            return_stats: give what it did, too.
            validate: check that all numbers are finite, at the cost of waiting for the device.

        Returns:
            y, the state, and with `return_stats` a dict of what was seen, without a graph, one number for each piece of
            tokens (a chunk of the level, or 64 tokens where it has none): `"memory_norm"` `[B, H, pieces]`, the norm of
            the memory as the piece found it; `"surprise"` `[B, H, pieces]`, for associative memories that learn, the
            root mean square of that memory's errors M(φ(k)) - v over the piece; and `"gates"`, for each learned gate
            the quantiles 0, ¼, ½, ¾, 1 over batch and tokens, `[5, H, pieces]`.

        Raises:
            ValueError: x, a mask, `cu_seqlens`, a stream or a state does not fit, or there is no token.
        """
        check_input(x, self.dim)
        how = {"learn": learn, "precision": self.precision, "validate": validate}
        streams = {"queries": queries, "values": values, STORE: store_mask}
        stats: Stats = {}
        packed = None
        attend = Call(self.form, how, streams, stats if return_stats else None)
        x = attend.joined(x)
        if cu_seqlens is not None:
            if mask is not None:
                raise ValueError("SequenceMemory: cu_seqlens and mask are both given; give one of them")
            packed = Packing.of(cu_seqlens, x, "SequenceMemory")
            mask, x = packed.mask, packed.unpack(x)
        now = self._begun(state, x)
        if mask is None:
            y, new = self._through_all(x, now, attend, learn, whole=return_stats)
        else:
            y, new = self._through_padded(x, now, attend, mask, learn)
        y = y if packed is None else packed.pack(y)
        return (y, new, stats) if return_stats else (y, new)

    def step(self, x_t: Tensor, state: Mapping[str, Any] | None = None, *, learn: bool = True) -> tuple[Tensor, State]:
        """One token of each sequence, `[B, dim]`, to y `[B, dim]` and the state after it: what `forward` gives, sooner.

        The time of a token does not depend on how many came before, but for attention to all pairs. With
        `learn=False` the memory is read and not written, as in `forward`.

        Raises:
            ValueError: as `forward`.
        """
        if x_t.ndim != 2 or x_t.shape[-1] != self.dim:
            raise ValueError(
                f"SequenceMemory.step: x_t has the shape {list(x_t.shape)}; it must be [batch, dim={self.dim}]"
            )
        now, h = self._begun(state, x_t), x_t
        new: State = {}
        if self.conv is not None:
            seen, new["conv"] = self.conv(x_t[:, None], now["conv"])
            h = seen[:, 0]
        tokens, gates = self._token(h, now["memory"])
        with no_autocast(h.device), products_in(self.precision):
            if learn:
                y, new["memory"] = self.form.run(tokens, gates, now["memory"], step=True)
            else:
                y, new["memory"] = self.form.read(tokens, gates, now["memory"]), now["memory"]
        return self._read_out(tokens.answer(y)[:, 0], h), new

    # -- how -----------------------------------------------------------------------------------------------------------

    def _token(self, h: Tensor, memory: State) -> tuple[TokenBatch, dict[str, Tensor]]:
        """Return what the form is shown of one token h `[B, dim]`, after the convolution: few and small kernels."""
        made = torch.stack([self._heads_of(part(h), spread=True) for part in (self.query, self.key, self.value)], dim=1)
        dtype = self.form.setting.dtype
        gates = self.level_gates.every(None if self.gates is None else self.gates(h), h, self.heads)
        # of numbers that are not all finite the sum is not, either
        active = ((made.sum((1, 3), dtype=gates.dtype) + gates.sum(1)) * 0 == 0)[..., None]
        shared = self.kv_heads if self.form.shares else self.heads
        active = for_queries(shared_by(active, shared), self.heads)
        made = torch.where(active[:, None], made, 0)[:, :, :, None]
        q, k, v = made.unbind(1)
        if self.qk_norm:
            # as F.normalize, of both at once
            qk = made[:, :2]
            q, k = (qk / torch.linalg.vector_norm(qk, dim=-1, keepdim=True).clamp_min(1e-12)).unbind(1)
        if self.v_norm:
            v = F.normalize(v, dim=-1)
        if self.rope:
            position = memory["step"][:, :1]
            q, k = (rotary(x.transpose(1, 2), position, self.rope).transpose(1, 2) for x in (q, k))
        if self.form.widens and dtype != made.dtype:
            q, k, v = (x.to(dtype) for x in (q, k, v))
        if shared != self.heads:
            k, v = (x[:, :: self.heads // shared] for x in (k, v))
        gates = torch.where(active.mT, gates, self.level_gates.idle_like(gates))
        tokens = TokenBatch(q, k, v, active, active, None, dtype, made.dtype)
        return tokens, {path: gate.unsqueeze(2) for path, gate in self.level_gates.parted(gates).items()}

    def _heads_of(self, x: Tensor, spread: bool) -> Tensor:
        """Return `[.., heads · dim_head]` as `[.., heads, dim_head]`; of fewer heads, if `spread`, as of all."""
        x = x.unflatten(-1, (-1, self.dim_head))
        return for_queries(x, self.heads, -2) if spread else x

    def _begun(self, state: Mapping[str, Any] | None, x: Tensor) -> State:
        """Return `state`, checked, or that of new sequences."""
        check_products(self.precision, x.device, self.form.setting.dtype, "SequenceMemory")
        if state is None:
            return self.init_state(x.shape[0])
        now = fitted(state, self._shapes, x.shape[0], "SequenceMemory", dtype=self.form.setting.dtype, device=x.device)
        if not self.form.has_constants:
            return now
        return {**now, "memory": self.form.with_learned(now["memory"], self._learned())}

    def _through_all(self, x: Tensor, state: State, attend: Call, learn: bool, whole: bool) -> tuple[Tensor, State]:
        """Run tokens `[B, T, dim]` without padding, in pieces unless they are to be taken as a `whole`."""
        recomputes = self.checkpoint and torch.is_grad_enabled()
        cut = [x.shape[1]] if whole or recomputes else lengths(self.form, x, state["memory"])
        if len(cut) == 1:
            return self._through(x, state, attend, learn=learn)
        ys = []
        for piece in x.split(cut, dim=1):
            y, state = self._through(piece, state, attend, learn=learn)
            ys.append(y)
        return torch.cat(ys, dim=1), state

    def _through(
        self, x: Tensor, state: State, attend: Call, rows: Rows | None = None, learn: bool = True
    ) -> tuple[Tensor, State]:
        """Run tokens `[B, T, dim]`, those of `rows` at the front, through the whole layer."""
        new: State = {}
        x, other = attend.parted(x, self.dim)
        if self.conv is not None:
            x, new["conv"] = self.conv(x, state["conv"], None if rows is None else rows.count)
        made = self.query(other.get("queries", x)), self.key(x), self.value(other.get("values", x))
        q, k, v = (self._heads_of(one, not self.form.shares) for one in made)
        if self.qk_norm:
            q, k = unit(q), unit(k)
        if self.v_norm:
            v = unit(v)
        if self.rope:
            seen = state["memory"]["step"][:, :1]  # of every head the same
            # what is only read comes next, all of it
            positions = seen + torch.arange(x.shape[1], device=x.device) if learn else seen.expand(-1, x.shape[1])
            q, k = rotary(q, positions, self.rope), rotary(k, positions, self.rope)
        gates = self.gates_at(x)
        mask = None if rows is None else rows.front
        y, new["memory"] = attend(q, k, v, gates, state["memory"], mask=mask, store=other.get(STORE))
        return self._read_out(y, x), new

    def _read_out(self, y: Tensor, h: Tensor) -> Tensor:
        """Return what the level answered to h `[.., dim]`, `[.., H, D]`, as the layer's output."""
        if self.norm is not None:
            y = self.norm(y.to(self.norm.weight.dtype))  # under autocast the read may be shorter than the scale
        y = y.flatten(-2)
        if self.output_gate is not None:
            y = y * F.silu(self.output_gate(h))
        return self.out(y)

    def _through_padded(
        self, x: Tensor, state: State, attend: Call, mask: Tensor, learn: bool = True
    ) -> tuple[Tensor, State]:
        check_mask(mask, x.shape[0], x.shape[1])
        if learn:
            self.form.refuse_padding("SequenceMemory: mask is not")
        rows = Rows.of(mask)
        y, new = self._through(rows.moved(x), state, attend, rows, learn)
        return rows.back(y), new

    def gates_at(self, h: Tensor) -> dict[str, Tensor]:
        """Return the learned gates at h `[.., dim]` (after the convolution), `[.., heads]` each, by dotted path."""
        return {} if self.gates is None else self.level_gates.by_path(self.gates(h))

    def extra_repr(self) -> str:
        precision = "" if self.precision == "float32" else f", precision={self.precision}"
        heads = f"{self.heads}" if self.kv_heads == self.heads else f"{self.heads}, kv_heads={self.kv_heads}"
        return f"{self.level}, dim={self.dim}, heads={heads}, dim_head={self.dim_head}{precision}"


def _batch_of(state: Mapping[str, Any]) -> int:
    memory = state.get("memory") if isinstance(state, Mapping) else None
    step = memory.get("step") if isinstance(memory, Mapping) else None
    return step.shape[0] if isinstance(step, Tensor) and step.ndim else 0
