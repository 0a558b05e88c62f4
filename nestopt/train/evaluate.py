"""Held-out bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestopt.models import HopeLM


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    text: Tensor,
    *,
    window: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> float:
    """Return the mean bits that `model` needs for each byte of `text` but the first.

    The text is read in windows of `window` bytes that overlap by a quarter: each byte is predicted from at least a
    quarter of a window before it (but at the start), and counted once.

    Args:
        model: tokens `[B, T]` to (logits `[B, T, V]`, state).
        text: `[N]` bytes, on the model's device.
        window: bytes per window.
        batch: windows at a time.
        rank, world: which of the windows are this process's.
        total: sums a tensor over processes.

    Raises:
        ValueError: a text of fewer than two bytes.
    """
    if len(text) < 2:
        raise ValueError(f"held-out text of {len(text)} bytes can't be measured; give two or more")
    training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=text.device)
    known = window // 4  # what a window reads again, and does not score again
    starts = list(range(0, max(1, len(text) - 1 - known), window - known))
    full = [s for s in starts if s + window + 1 <= len(text)]
    groups = [full[i : i + batch] for i in range(0, len(full), batch)] + [[s] for s in starts if s not in set(full)]
    # every process makes as many calls: where weights are cut up, all must make them together
    mine = [*groups[rank::world], *groups[:1]][: -(-len(groups) // world)]
    for i, group in enumerate(mine):
        pieces = torch.stack([text[s : s + window + 1] for s in group]).long()
        logits, _ = model(pieces[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), pieces[:, 1:].flatten(), reduction="none")
        loss = loss.view(len(group), -1)
        if rank + i * world >= len(groups):
            continue
        for start, row in zip(group, loss, strict=True):
            nats += row[(0 if start == 0 else known) :].sum(dtype=torch.float64)
    model.train(training)
    return float(total(nats)) / (len(text) - 1) / math.log(2)


@torch.no_grad()
def documents_bits(
    model: HopeLM,
    tokens: Tensor,
    starts: Tensor,
    *,
    window: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> float:
    """Return the mean bits that `model` needs for each token of documents but their first, in windows of their own.

    Args:
        model: its state begins anew with each window, and in it with each document.
        tokens: `[N]`, documents end to end, on the model's device.
        starts: `[N]` bool, where each begins, on the CPU.
        window: tokens per window; of the last one, what is left.
        batch: windows at a time.
        rank, world, total: as of `bits_per_byte`.

    Raises:
        ValueError: fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"held-out text of {len(tokens)} tokens can't be measured; give two or more")
    training = model.training
    model.eval()
    firsts = list(range(0, len(tokens) - 1, window))
    full = [first for first in firsts if first + window < len(tokens)]
    groups = [full[i : i + batch] for i in range(0, len(full), batch)]
    groups += [firsts[-1:]] if len(full) < len(firsts) else []
    nats = torch.zeros((), dtype=torch.float64, device=tokens.device)
    mine = [*groups[rank::world], *groups[:1]][: -(-len(groups) // world)]  # as many calls in every process
    for i, group in enumerate(mine):
        parts = [slice(first, min(first + window + 1, len(tokens))) for first in group]
        rows = torch.stack([tokens[part] for part in parts]).long()
        begun = torch.stack([starts[part] for part in parts])
        loss, _ = model.loss(rows, starts=begun, reduction="sum")
        nats += loss * (rank + i * world < len(groups))
    model.train(training)
    counted = len(tokens) - 1 - int(starts[1:].sum())
    return float(total(nats)) / max(1, counted) / math.log(2)


@torch.no_grad()
def stream_bits_per_byte(
    model: nn.Module,
    text: Tensor,
    *,
    streams: int,
    piece: int,
    learn: bool = True,
    rank: int = 0,
    world: int = 1,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> float:
    """Return the mean bits that `model` needs for each byte of `text` but the first, read with its state throughout.

    The text is cut into `streams` stretches of one length, side by side in a batch: each byte is predicted from all of
    its stretch before it, and counted once. Memory does not grow with the text, if the model's state does not.

    Args:
        model: a `nestopt.models.HopeLM`.
        text: `[N]` bytes, on the model's device.
        streams: how many stretches, at most one for each byte to predict.
        piece: bytes of each stretch per call.
        learn: whether the memories are written.
        rank, world: which of the stretches are this process's.
        total: sums a tensor over processes.

    Raises:
        ValueError: a text of fewer than two bytes.
    """
    if len(text) < 2:
        raise ValueError(f"held-out text of {len(text)} bytes can't be measured; give two or more")
    training = model.training
    model.eval()
    wanted = len(text) - 1
    length = -(-wanted // min(streams, wanted))
    rows = -(-wanted // length)
    # the last stretch is filled up; what is read there comes after all that counts
    filled = F.pad(text.long(), (0, rows * length - wanted))
    counted = (torch.arange(rows * length, device=text.device) < wanted).view(rows, length)
    own = torch.arange(rows, device=text.device)[rank::world]
    if not len(own):  # it makes the others' calls: where weights are cut up, all must make them together
        own, counted = own.new_zeros(1), torch.zeros_like(counted)
    inputs, targets, counted = filled[:-1].view(rows, length)[own], filled[1:].view(rows, length)[own], counted[own]
    nats, state = torch.zeros((), dtype=torch.float64, device=text.device), None
    for first in range(0, length, piece):
        part = slice(first, first + piece)
        logits, state = model(inputs[:, part], state, learn=learn)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets[:, part].flatten(), reduction="none")
        nats += (loss * counted[:, part].flatten()).sum(dtype=torch.float64)
    model.train(training)
    return float(total(nats)) / wanted / math.log(2)
