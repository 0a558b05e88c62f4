r"""A language model's own next-token loss as the teach signal of its continuum memories (NL eq. 71).

With h_t the residual stream after the last block and $\ell_t$ the loss of the next token, $\delta_t = \partial\ell_t/
\partial h_t$ is handed to every block's continuum as the error at its output: what later blocks would make of a change
is taken for the identity, which the residual stream is to first order. In the last block δ is the exact gradient.

A position's loss is known when the next token comes. So the gradient of position t is added, and what it completes is
written, before token t + 1 is read: the state carries one position that is not yet observed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nestopt.core.device import numbers_in, remember
from nestopt.core.precision import matmul
from nestopt.core.tree import State
from nestopt.levels.continuum.clock import Phases
from nestopt.nn.cms import CMS

Segment = Callable[[Tensor, State, Tensor | None], tuple[Tensor, list[Tensor], State]]
"""Runs all blocks on some tokens, none of which crosses a write: the residual stream `[B, n, dim]`, each continuum's
input `[B, n, dim]`, and the state."""


class Read(NamedTuple):
    """What the rows of a batch have read, as the host knows it.

    Attributes:
        phases: the different numbers of tokens, with the one that is carried.
        carried: whether every row has one.
    """

    phases: Phases
    carried: bool

    @staticmethod
    def of(step: Tensor, carried: State) -> Read:
        """Of rows whose continua have learned from `step` tokens `[B]`, with what is `carried` under `TAUGHT`."""
        live = carried["live"]
        if not live.shape[1]:
            return Read(numbers_in(step), False)
        count = numbers_in(live)
        if len(count) == 1:
            return Read([phase + count[0] for phase in numbers_in(step)], count[0] == 1)
        return Read(numbers_in(step + live.sum(1)), False)


TAUGHT = "taught"
"""Key of a model's state: the position whose next token has not come."""


def nothing_carried(count: int, batch: int, dim: int, like: Tensor) -> State:
    """What is carried before the first token: no position, of `count` continua."""
    none = like.new_zeros(batch, 0, dim)
    live = torch.zeros(batch, 0, dtype=torch.bool, device=like.device)
    return {"inputs": {f"block_{i}": none for i in range(count)}, "hidden": none, "live": live}


def teach_signal(hidden: Tensor, targets: Tensor, norm: nn.RMSNorm, head: nn.Linear) -> Tensor:
    r"""$\partial\ell_t/\partial h_t$ `[B, n, dim]` of the loss $\ell_t$ of `targets` `[B, n]`, in closed form.

    The logits are `head(norm(h))`; all is torch operations that can be differentiated again.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    h, weight, scale = hidden.to(dtype), head.weight.to(dtype), norm.weight.to(dtype)
    eps = torch.finfo(hidden.dtype).eps if norm.eps is None else norm.eps
    r = (h.square().mean(-1, keepdim=True) + eps).rsqrt()
    p = matmul(h * r * scale, weight.mT).softmax(-1)
    wrong = p.scatter_add(-1, targets[..., None], -torch.ones_like(p[..., :1]))
    g = matmul(wrong, weight) * scale
    return r * (g - h * r.square() * (g * h).mean(-1, keepdim=True))


def run_taught(
    tokens: Tensor,
    state: State,
    continua: Sequence[CMS],
    segment: Segment,
    signal: Callable[[Tensor, Tensor], Tensor],
    mask: Tensor | None,
    read: Read,
    ahead: int = 0,
) -> tuple[Tensor, State]:
    """Run a model segment by segment, each up to the next write of any of its continua.

    Args:
        tokens: `[B, T]`, padding at the end of rows only.
        state: of the whole model, with what is carried under `TAUGHT`.
        continua: those of the blocks, in order; block i's state is `state["block_i"]["mlp"]`.
        segment: runs the blocks.
        signal: from the residual stream and the next tokens, the teach signal.
        mask: `[B, T]`, True for tokens.
        read: what the rows have read before.
        ahead: tokens of the model's call that are not in this one, but come next.

    Returns:
        The residual stream after the last block `[B, T, dim]`, and the state.
    """
    state = dict(state)
    carried, found, length, first = state.pop(TAUGHT), [], tokens.shape[1], 0
    # rows that are at an end go on no more, so the first token of a call is there or the row has none
    live = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    phases = read.phases
    if carried["hidden"].shape[1]:
        came = carried["live"] & live[:, :1]
        delta = signal(carried["hidden"], torch.where(came, tokens[:, :1], 0))
        before = [phase - 1 for phase in phases]
        some = None if mask is None and read.carried else came
        state = _observed(state, continua, carried["inputs"], delta, some, before, length - 1 + ahead)
        carried = {**carried, "live": carried["live"] & ~came}
    while first < length:
        room = min(cms.until_write(phases) for _, cms in _taught(continua))
        last = min(first + room, length)
        part = None if mask is None else mask[:, first:last]
        hidden, inputs, state = segment(tokens[:, first:last], state, part)
        found.append(hidden)
        named = {f"block_{i}": x for i, x in enumerate(inputs)}
        known = min(last, length - 1) - first  # positions whose next token is in this call
        if known:
            after = live[:, first + 1 : first + 1 + known]
            delta = signal(hidden[:, :known], torch.where(after, tokens[:, first + 1 : first + 1 + known], 0))
            told = {key: x[:, :known] for key, x in named.items()}
            some = None if mask is None else after
            state = _observed(state, continua, told, delta, some, phases, length - 1 - first - known + ahead)
        carried = _carried(carried, named, hidden, live[:, first:last], live[:, first + 1 : last + 1], last == length)
        phases = [phase + last - first for phase in phases]
        first = last
    if mask is None:
        carried = {**carried, "live": remember(carried["live"], [1])}
    return torch.cat(found, dim=1), {**state, TAUGHT: carried}


def _taught(continua: Sequence[CMS]) -> list[tuple[int, CMS]]:
    """Those that learn from the model's loss, with the numbers of their blocks."""
    return [(i, cms) for i, cms in enumerate(continua) if cms.taught]


def _observed(
    state: State,
    continua: Sequence[CMS],
    inputs: Mapping[str, Tensor],
    delta: Tensor,
    live: Tensor | None,
    phases: Phases,
    ahead: int,
) -> State:
    """`state` after the continua were shown their error at positions that are `live` `[B, n]`; None: all are."""
    new = dict(state)
    for i, cms in _taught(continua):
        block = new[f"block_{i}"]
        mlp = cms.observe(inputs[f"block_{i}"], delta, block["mlp"], live, phases=phases, ahead=ahead)
        new[f"block_{i}"] = {**block, "mlp": mlp}
    return new


def _carried(
    before: State, inputs: Mapping[str, Tensor], hidden: Tensor, live: Tensor, after: Tensor, ends: bool
) -> State:
    """The last position of each row, if the token after it is not in this call; else what was carried before.

    Args:
        before: what was carried into this segment.
        inputs, hidden: of the segment, `[B, n, dim]`.
        live: `[B, n]`, its tokens.
        after: `[B, n]` or, at the end of the call, `[B, n - 1]`: whether the next place holds a token.
        ends: whether the call is over with this segment.
    """
    if ends:
        after = torch.cat([after, torch.zeros_like(live[:, :1])], dim=1)
    alone = live & ~after  # at most one in a row, for padding stands at the end
    place, has = alone.int().argmax(1), alone.any(1, keepdim=True)

    def choose(new: Tensor, old: Tensor) -> Tensor:
        picked = new.gather(1, place[:, None, None].expand(-1, 1, new.shape[-1]))
        return torch.where(has[..., None], picked, old if old.shape[1] else torch.zeros_like(picked))

    old = before["live"] if before["live"].shape[1] else torch.zeros_like(has)
    return {
        "inputs": {key: choose(x, before["inputs"][key]) for key, x in inputs.items()},
        "hidden": choose(hidden, before["hidden"]),
        "live": torch.where(has, True, old),
    }
