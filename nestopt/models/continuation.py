"""A text gone on with, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Read = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""A model on tokens `[B, n]` and a state: logits `[B, n, vocab]`, and the state after them."""


def go_on(
    read: Read, prompt: Tensor, length: int, choose: Callable[[Tensor], Tensor], state: Any
) -> tuple[Tensor, Any]:
    """Add `length` tokens to `prompt` `[B, n]`, each chosen from the logits `[B, vocab]` after the one before it.

    A -1 that is chosen (no token could be drawn) is read as token 0. The last token is not read.

    Returns:
        `[B, n + length]`, and the state after all but the last.

    Raises:
        ValueError: for a `length` below 0.
    """
    if length < 0:
        raise ValueError(f"generate: length={length} is not allowed; give a whole number, 0 or more")
    tokens, seen = [prompt.long()], prompt
    for _ in range(length):
        logits, state = read(seen, state)
        tokens.append(choose(logits[:, -1])[:, None])
        seen = tokens[-1].clamp_min(0)
    return torch.cat(tokens, dim=1), state
