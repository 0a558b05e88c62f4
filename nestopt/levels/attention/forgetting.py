"""Forgetting attention on tokens: torch's softmax attention with what is left of each pair as a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.memories import FADED
from nestopt.core.padding import from_places, places, to_places
from nestopt.core.retentions import Decay
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_form import Accepted, Refused
from nestopt.core.tree import State
from nestopt.kernels.products import logarithm
from nestopt.levels.attention.form import AttentionForm
from nestopt.levels.attention.level import ForgettingAttention
from nestopt.levels.attention.softmax import checked, softmax_read
from nestopt.levels.closed_form import featured, refusal

BLOCK = 128
"""Queries that are answered at once: their bias is a number for each of them and each pair that they may see."""


class ForgettingAttentionForm(AttentionForm):
    """Attend to pairs that fade, all or those of a window. What is left of each is kept for every query's head."""

    levels: ClassVar[tuple[type[Level], ...]] = (ForgettingAttention,)
    level: ForgettingAttention

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, ForgettingAttention)
        why = refusal(level, ForgettingAttention)
        if not why and level.read != "after":
            why = f"read={level.read!r}: a token would not see itself"
        return Refused(why) if why else Accepted("softmax attention by torch's kernels, with a bias")

    def init(
        self, batch: int, heads: int, dim_k: int, dim_v: int, like: Tensor, learned: Mapping[str, Tensor]
    ) -> State:
        state = super().init(batch, heads, dim_k, dim_v, like, learned)
        state["level"]["memory"][FADED] = like.new_zeros(batch, heads * self.setting.sharing, 0)
        return state

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        x, retention = featured(self.level.features, tokens), self.level.retention
        past = state["level"]["memory"]
        keep = past[FADED].new_ones(1)
        if isinstance(retention, Decay):
            keep = self.number(retention.keep, "retention.keep", gates, past[FADED])
        y, pairs = attend_faded(x, logarithm(x.gate(keep, 1.0)), past, self.window)
        return y, {"step": state["step"] + tokens.length, "level": {**state["level"], "memory": pairs}}


def attend_faded(
    tokens: TokenBatch, log_keep: Tensor, state: Mapping[str, Tensor], window: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Answer tokens `[B, H, T, D_v]`, and keep their pairs.

    Args:
        tokens: q `[B, H, T, D_k]`, and k, v of as many or fewer heads.
        log_keep: log α `[B, H, T]`, 0 where a token is not written.
        state: the pairs so far as `nestopt.ops.attention` has them, and `"faded"` `[B, H, n]`, the logarithm of what is
            left of each: $\sum_{s<r} \log \alpha_r$.
        window: how many pairs are kept; None keeps all.

    Returns:
        y, and the pairs after the last token.
    """
    faded, mask = state[FADED], tokens.mask
    past = checked({name: x for name, x in state.items() if name != FADED}, tokens.k, tokens.v)
    assert past is not None
    k, v = (torch.cat([past[name].to(new.dtype), new], 2) for name, new in (("keys", tokens.k), ("values", tokens.v)))
    left = torch.cat([faded, torch.zeros_like(log_keep)], dim=2)
    if mask is None and "mask" not in past:
        y, faded = _in_blocks(tokens.q, k, v, log_keep, left, None, window)
        return y, _last({"keys": k, "values": v, FADED: faded}, window)
    live = torch.ones_like(tokens.active[:, 0]) if mask is None else mask
    flags = past.get("mask", torch.ones_like(faded[:, 0], dtype=torch.bool))
    seen = torch.cat([flags, live], dim=1)
    # padding goes before all tokens, and changes nothing there
    here, place = places(live)[:, None], places(seen)
    q, k, v = to_places(tokens.q, here), to_places(k, place[:, None]), to_places(v, place[:, None])
    log_keep, left = to_places(log_keep[..., None], here)[..., 0], to_places(left[..., None], place[:, None])[..., 0]
    seen = torch.zeros_like(seen).scatter(1, place, seen)
    y, faded = _in_blocks(q, k, v, log_keep, left, seen, window)
    y = torch.where(live[:, None, :, None], from_places(y, here), 0.0)
    return y, _last({"keys": k, "values": v, FADED: faded, "mask": seen}, window)


def _in_blocks(
    q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor, left: Tensor, seen: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Answers to q `[B, H, T, D]`, the last T tokens of k, v, and what is left of each pair in the end `[B, H, n + T]`.

    `left` is that of each pair as it stands among these, before the tokens fade it. Within a block sums of logarithms
    are differences; what a block leaves of all before it is only added to, so that nothing cancels over more tokens.
    """
    length, past = q.shape[2], k.shape[2] - q.shape[2]
    ys, faded = [], left[..., :past]
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        first = 0 if window is None else max(0, past + begin + 1 - window)
        since, own = log_keep[..., begin:end].cumsum(-1), left[..., past + begin : past + end]
        within = own - since
        bias = torch.cat([faded[..., first:], within], dim=-1)[:, :, None] + since[..., None]
        ago = torch.arange(past + begin, past + end, device=q.device)[:, None]
        ago = ago - torch.arange(first, past + end, device=q.device)
        allowed = ago >= 0 if window is None else (ago >= 0) & (ago < window)
        if seen is not None:
            allowed = (allowed & seen[:, None, None, first : past + end]) | (ago == 0)  # padding sees itself
        bias = bias.masked_fill(~allowed, -torch.inf).to(q.dtype)
        part = (x[:, :, first : past + end] for x in (k, v))
        ys.append(softmax_read(q[:, :, begin:end], *part, attn_mask=bias))
        faded = torch.cat([faded + since[..., -1:], within + since[..., -1:]], dim=-1)
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=2), faded


def _last(pairs: dict[str, Tensor], window: int | None) -> dict[str, Tensor]:
    """Return the last pairs of `attend_faded`'s state; those that padding has moved out are gone, too."""
    if window is None:
        return pairs
    return {name: x[:, -window:] if name == "mask" else x[:, :, -window:] for name, x in pairs.items()}
