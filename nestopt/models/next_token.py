"""The loss of next tokens, or of targets that a task gives, and what a model is told of a text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestopt.core.device import by_contract, upload

NOT_COUNTED = -100
"""A target whose loss is not counted; of targets `[B, T, vocab]`, all of a position's."""


def check_tokens(tokens: Tensor, owner: str, dim: int | None = None) -> None:
    """Raise TypeError or ValueError unless tokens are integers `[batch, tokens]`, one or more of each.

    With `dim` they may also be embeddings, floating-point numbers `[batch, tokens, dim]`.
    """
    if dim is not None and tokens.ndim == 3 and tokens.is_floating_point():
        if tokens.shape[-1] != dim or tokens.numel() == 0:
            raise ValueError(
                f"{owner}: embeddings have the shape {list(tokens.shape)}; give [batch, tokens, {dim}], one or more of "
                "each"
            )
        return
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"{owner}: tokens are {tokens.dtype}; they must be integers")
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(
            f"{owner}: tokens have the shape {list(tokens.shape)}; give [batch, tokens], one or more of each"
        )


def check_starts(starts: Tensor, tokens: Tensor, owner: str) -> None:
    """Raise ValueError unless `starts` is a bool for each token."""
    if starts.dtype != torch.bool or starts.shape != tokens.shape[:2]:
        raise ValueError(
            f"{owner}: starts is {starts.dtype} {list(starts.shape)}; it must be bool {list(tokens.shape[:2])}: True "
            "where a document begins"
        )


def check_loss(tokens: Tensor, starts: Tensor | None, piece: int, reduction: str, told: bool = False) -> None:
    """Raise ValueError for arguments of `HopeLM.loss` that are not allowed; `told` is whether targets are given."""
    if not told and (tokens.ndim != 2 or tokens.shape[1] < 2):
        raise ValueError(
            f"HopeLM.loss: tokens have the shape {list(tokens.shape)}; give [batch, tokens], two tokens or more"
        )
    if piece < 1:
        raise ValueError(f"HopeLM.loss: piece={piece} is not allowed; give a whole number, 1 or more")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'HopeLM.loss: reduction={reduction!r} is not allowed; give "mean" or "sum"')
    if starts is not None:
        check_starts(starts, tokens, "HopeLM")


def checked_targets(targets: Tensor, tokens: Tensor, vocab: int, starts: Tensor | None) -> Tensor:
    """Return targets of each token as signed numbers: a class, or which of `vocab` are right.

    Raises:
        ValueError: for others, or for `starts`: an MLP that is taught by targets reads rows of one text.
    """
    shape, allowed = list(targets.shape), (list(tokens.shape[:2]), [*tokens.shape[:2], vocab])
    if shape not in allowed or (targets.ndim == 2 and targets.is_floating_point()):
        raise ValueError(
            f"HopeLM: targets are {targets.dtype} {shape}; give classes, integers {allowed[0]}, or 1 for each of the "
            f"vocabulary that is right and 0 for the others, {allowed[1]}"
        )
    if starts is not None:
        raise ValueError("HopeLM: targets and starts are given to mlps that learn from the loss; give rows of one text")
    return _signed(targets)


def _signed(targets: Tensor) -> Tensor:
    if targets.ndim == 2:
        return targets.long()
    return targets if targets.is_floating_point() else targets.to(torch.int8)


def embedded(embedding: nn.Embedding, tokens: Tensor, owner: str) -> Tensor:
    """Embed tokens, unless they are; those out of range are named on a CPU (an accelerator, not waited for, stops)."""
    if tokens.ndim == 3:
        return tokens[..., : embedding.embedding_dim].to(embedding.weight.dtype)
    if torch.compiler.is_compiling():
        return embedding(tokens.long())
    try:
        return embedding(tokens.long())
    except IndexError:
        low, high = (int(end) for end in tokens.aminmax())
        raise ValueError(
            f"{owner}: tokens from {low} to {high} are given; they must be from 0 to {embedding.num_embeddings - 1}"
        ) from None


def numbered(embeddings: Tensor, mask: Tensor | None, embedding: nn.Embedding, owner: str) -> Tensor:
    """Return embeddings `[B, T, dim]` with the numbers of their tokens behind them, `[B, T, dim + 1]`.

    Raises:
        ValueError: one that the mask `[B, T]` does not call padding is no token's; waits for the device to know.
    """
    weight = embedding.weight.detach()
    found = []
    for piece in embeddings.detach().to(weight.dtype).split(1024, dim=1):
        near = (2 * piece @ weight.mT - weight.square().sum(-1)).argmax(-1)
        found.append(torch.where((weight[near] == piece).all(-1), near, -1))
    numbers = torch.cat(found, dim=1)
    numbers = numbers if mask is None else torch.where(mask, numbers, 0)
    with by_contract("embeddings") if numbers.device.type != "cpu" else nullcontext():
        strange = bool((numbers < 0).any())
    if strange:
        raise ValueError(
            f"{owner}: embeddings are given of which some are no token's, and mlps learn from next tokens; give those "
            'of tokens, or learn="mixer"'
        )
    return _with_numbers(embeddings, numbers)


def lifted(tokens: Tensor, embedding: nn.Embedding) -> Tensor:
    """Return what `numbered` does, of tokens `[B, T]`."""
    return _with_numbers(embedding(tokens), tokens)


def _with_numbers(embeddings: Tensor, numbers: Tensor) -> Tensor:
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))  # so that it holds a number exactly
    return torch.cat([wide, numbers[..., None].to(wide.dtype)], dim=-1)


def numbers_of(tokens: Tensor) -> Tensor:
    """Return the numbers `[B, T]` of tokens, given as such or as `numbered` gives them."""
    return tokens if tokens.ndim == 2 else tokens[..., -1].long()


def next_tokens(tokens: Tensor, mask: Tensor | None, starts: Tensor | None) -> Tensor:
    """Return the token after each of `[B, T + 1]` but the last; `NOT_COUNTED` by padding and where a text begins."""
    targets = tokens[:, 1:].long()
    if starts is not None:
        targets = torch.where(upload(starts[:, 1:], targets.device), NOT_COUNTED, targets)
    if mask is not None:
        targets = torch.where(mask[:, 1:] & mask[:, :-1], targets, NOT_COUNTED)
    return targets


def counted(targets: Tensor) -> Tensor:
    """Return `[B, T]`, True where the loss of a target counts."""
    return (targets if targets.ndim == 2 else targets[..., 0]) != NOT_COUNTED


def asked(
    tokens: Tensor, mask: Tensor | None, starts: Tensor | None, targets: Tensor | None, piece: int, reduction: str
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Return the tokens that `HopeLM.loss` reads, with their mask and starts, and the targets whose loss it counts."""
    check_loss(tokens, starts, piece, reduction, told=targets is not None)
    if targets is None:
        masked, begun = (None if given is None else given[:, :-1] for given in (mask, starts))
        return tokens[:, :-1], masked, begun, next_tokens(tokens, mask, starts)
    count = _signed(targets)
    if mask is not None and mask.shape == targets.shape[:2]:
        count = count.masked_fill(~(mask if count.ndim == 2 else mask[..., None]), NOT_COUNTED)
    return tokens, mask, starts, count


def summed_loss(logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, piece: int) -> Tensor:
    """Sum the losses of `targets` that count, of logits made, and made again, for `piece` positions at a time.

    Args:
        logits: from the stream `[B, n, dim]` to `[B, n, vocab]`.
        hidden: the stream `[B, T, dim]`.
        targets: classes `[B, T]`, by cross entropy; or `[B, T, vocab]`, each 0 or 1, by a yes or no to each.
        piece: positions.
    """

    def loss(x: Tensor, y: Tensor) -> Tensor:
        found = logits(x)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        if y.ndim == 2:
            return F.cross_entropy(found.flatten(0, 1), y.flatten(), ignore_index=NOT_COUNTED, reduction="sum")
        each = F.binary_cross_entropy_with_logits(found, y.clamp_min(0).to(found.dtype), reduction="none").sum(-1)
        return torch.where(counted(y), each, 0).sum()

    pairs = list(zip(hidden.split(piece, dim=1), targets.split(piece, dim=1), strict=True))
    if len(pairs) == 1 or not torch.is_grad_enabled():
        return torch.stack([loss(x, y) for x, y in pairs]).sum()
    return torch.stack([checkpoint(loss, x, y, use_reentrant=False) for x, y in pairs]).sum()


def wrong(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the derivative of each position's loss by its logits `[B, n, vocab]`; all targets count."""
    if targets.ndim == 2:
        p = logits.softmax(-1)
        return p.scatter_add(-1, targets.long()[..., None], -torch.ones_like(p[..., :1]))
    return logits.sigmoid() - targets.to(logits.dtype)
