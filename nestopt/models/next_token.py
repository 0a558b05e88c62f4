"""The loss of next tokens, and what a model is told of a text."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestopt.core.device import upload

NOT_COUNTED = -100
"""A target whose loss is not counted."""


def check_tokens(tokens: Tensor, owner: str) -> None:
    """Raise TypeError or ValueError unless tokens are integers `[batch, tokens]`, one or more of each."""
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"{owner}: tokens are {tokens.dtype}; they must be integers")
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(
            f"{owner}: tokens have the shape {list(tokens.shape)}; give [batch, tokens], one or more of each"
        )


def check_starts(starts: Tensor, tokens: Tensor, owner: str) -> None:
    """Raise ValueError unless `starts` is a bool for each token."""
    if starts.dtype != torch.bool or starts.shape != tokens.shape:
        raise ValueError(
            f"{owner}: starts is {starts.dtype} {list(starts.shape)}; it must be bool {list(tokens.shape)}: True where "
            "a document begins"
        )


def check_loss(tokens: Tensor, starts: Tensor | None, piece: int, reduction: str) -> None:
    """Raise ValueError for arguments of `HopeLM.loss` that are not allowed."""
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"HopeLM.loss: tokens have the shape {list(tokens.shape)}; give [batch, tokens], two tokens or more"
        )
    if piece < 1:
        raise ValueError(f"HopeLM.loss: piece={piece} is not allowed; give a whole number, 1 or more")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'HopeLM.loss: reduction={reduction!r} is not allowed; give "mean" or "sum"')
    if starts is not None:
        check_starts(starts, tokens, "HopeLM")


def embedded(embedding: nn.Embedding, tokens: Tensor, owner: str) -> Tensor:
    """Embed tokens; those that are out of range are named on a CPU (an accelerator, which is not waited for, stops)."""
    if torch.compiler.is_compiling():
        return embedding(tokens.long())
    try:
        return embedding(tokens.long())
    except IndexError:
        low, high = (int(end) for end in tokens.aminmax())
        raise ValueError(
            f"{owner}: tokens from {low} to {high} are given; they must be from 0 to {embedding.num_embeddings - 1}"
        ) from None


def next_tokens(tokens: Tensor, mask: Tensor | None, starts: Tensor | None) -> Tensor:
    """Return the token after each of `[B, T + 1]` but the last; `NOT_COUNTED` by padding and where a text begins."""
    targets = tokens[:, 1:].long()
    if starts is not None:
        targets = torch.where(upload(starts[:, 1:], targets.device), NOT_COUNTED, targets)
    if mask is not None:
        targets = torch.where(mask[:, 1:] & mask[:, :-1], targets, NOT_COUNTED)
    return targets


def summed_loss(logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, piece: int) -> Tensor:
    """Sum the losses of `targets` `[B, T]` that count, of logits made, and made again, for `piece` positions at a
    time.
    """

    def loss(x: Tensor, y: Tensor) -> Tensor:
        found = logits(x)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        return F.cross_entropy(found.flatten(0, 1), y.flatten(), ignore_index=NOT_COUNTED, reduction="sum")

    pairs = list(zip(hidden.split(piece, dim=1), targets.split(piece, dim=1), strict=True))
    if len(pairs) == 1 or not torch.is_grad_enabled():
        return torch.stack([loss(x, y) for x, y in pairs]).sum()
    return torch.stack([checkpoint(loss, x, y, use_reentrant=False) for x, y in pairs]).sum()
