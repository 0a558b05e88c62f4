"""Reading a text of any length in pieces, at the memory of one piece and the state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.tree import State
from nestopt.models import HopeLM
from nestopt.nn.hope import Learn


@torch.no_grad()
def read(
    model: HopeLM, pieces: Iterable[Tensor], state: Mapping[str, Any] | None = None, *, learn: Learn = True
) -> State | None:
    """Return the state after reading `pieces` one after another, without predictions and without a graph.

    What is held at a time is one piece and the state. Where each piece ends changes nothing.

    Args:
        model: who reads.
        pieces: `[B, n]` tokens each, n >= 1; made as they are asked for, if they come from a generator.
        state: what was read before; None is nothing.
        learn: what writes its memories, as for `HopeLM.forward`.

    Returns:
        The state after the last piece; `state` itself if there is none.
    """
    now: Mapping[str, Any] | None = state
    for piece in pieces:
        _, now = model.hidden(piece, now, learn=learn)
    return None if now is None else dict(now)


@torch.no_grad()
def score(
    model: HopeLM,
    tokens: Tensor,
    state: Mapping[str, Any] | None = None,
    *,
    learn: Learn = True,
    piece: int = 128,
    tick: Callable[[int], object] = lambda n: None,
) -> tuple[Tensor, State]:
    """Return the bits that `model` needs for each token but the first of `[B, n]`, and the state after the last.

    Args:
        model: who reads.
        tokens: `[B, n]`, n >= 2.
        state: what was read before; None is nothing. The first token is not scored then either.
        learn: what writes its memories, as for `HopeLM.forward`.
        piece: tokens of each sequence per call, 1 or more.
        tick: called with the number of tokens of each piece, all sequences together, when it has been read.

    Returns:
        `[B, n - 1]` in float64, and the state.

    Raises:
        ValueError: for fewer than two tokens, or a piece of none.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"score: tokens have the shape {list(tokens.shape)}; give [batch, tokens], two tokens or more")
    if piece < 1:
        raise ValueError(f"score: piece={piece} is not allowed; give a whole number, 1 or more")
    now, found = state, []
    guess = None  # of the next piece's first token, from the last one of this
    for part in tokens.long().split(piece, dim=1):
        logits, now = model(part, now, learn=learn)
        guesses = logits[:, :-1] if guess is None else torch.cat([guess, logits[:, :-1]], dim=1)
        targets = part[:, 1:] if guess is None else part
        nats = F.cross_entropy(guesses.flatten(0, 1).double(), targets.flatten(), reduction="none")
        found.append(nats.view(targets.shape) / math.log(2))
        guess = logits[:, -1:]
        tick(part.numel())
    assert now is not None
    return torch.cat(found, dim=1), dict(now)
