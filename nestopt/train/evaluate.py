"""Held-out bits per byte."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestopt.config import Config
from nestopt.models import HopeLM
from nestopt.nn.hope import Learn
from nestopt.train.data.source import HeldOut, counted_answers
from nestopt.train.errors import extra

with extra("train"):
    from tqdm import tqdm


def measured(
    model: HopeLM,
    held_out: HeldOut,
    config: Config,
    *,
    learn: Learn = True,
    rank: int = 0,
    world: int = 1,
    total: Callable[[Tensor], Tensor] = lambda x: x,
    quiet: bool = True,
) -> float:
    """Return the mean bits that `model` needs for each byte of held-out text, read as `train.eval_streams` says.

    Of a task, for each answer, none of which it is told: MLPs that learn from the loss learn nothing.

    Args:
        model: on any device.
        held_out: the text.
        config: of its run.
        learn: what writes its memories, as for `HopeLM.forward`.
        rank, world, total, quiet: as of `bits_per_byte`.
    """
    data, settings = config.data, config.train
    text = held_out.tokens.to(next(model.parameters()).device)
    shared: dict[str, Any] = {"learn": learn, "rank": rank, "world": world, "total": total, "quiet": quiet}
    if held_out.answers is not None:
        bits = answers_bits(model, held_out, batch=4 * data.batch, **{**shared, "learn": learn and "mixer"})
    elif held_out.starts is not None:
        rows = max(1, data.batch // (world * settings.accumulate))
        bits = documents_bits(model, text, held_out.starts, window=data.window, batch=rows, **shared)
    elif settings.eval_streams:
        bits = stream_bits_per_byte(model, text, streams=settings.eval_streams, piece=data.window, **shared)
    else:
        bits = bits_per_byte(model, text, window=data.window, batch=4 * data.batch, **shared)
    return bits / held_out.bytes_per_token


@contextlib.contextmanager
def _measured(model: nn.Module, text: Tensor, unit: str) -> Iterator[Tensor]:
    """Have `model` evaluate within this, without gradients; gives a sum to count nats in, on the text's device."""
    if len(text) < 2:
        raise ValueError(f"held-out text of {len(text)} {unit} can't be measured; give two or more")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield torch.zeros((), dtype=torch.float64, device=text.device)
    finally:
        model.train(training)


def _dealt(
    windows: Sequence[int], full: int, batch: int, rank: int, world: int, quiet: bool
) -> Iterator[tuple[list[int], bool]]:
    """Yield groups of a process's windows, and whether each counts; of those from `full` on, each is alone.

    Every process has as many: where weights are cut up, all must call the model together.
    """
    groups = [list(windows[i : min(i + batch, full)]) for i in range(0, full, batch)] + [[s] for s in windows[full:]]
    for i in _bar(range(-(-len(groups) // world)), quiet):
        place = rank + i * world
        yield groups[place if place < len(groups) else 0], place < len(groups)


def _bar(calls: range, quiet: bool) -> Iterator[int]:
    yield from tqdm(calls, desc="measuring", leave=False, disable=quiet, dynamic_ncols=True)


def bits_per_byte(
    model: nn.Module,
    text: Tensor,
    *,
    window: int,
    batch: int,
    learn: Learn = True,
    rank: int = 0,
    world: int = 1,
    total: Callable[[Tensor], Tensor] = lambda x: x,
    quiet: bool = True,
) -> float:
    """Return the mean bits that `model` needs for each byte of `text` but the first.

    The text is read in windows of `window` bytes that overlap by a quarter: each byte is predicted from at least a
    quarter of a window before it (but at the start), and counted once.

    Args:
        model: tokens `[B, T]` and `learn` to (logits `[B, T, V]`, state).
        text: `[N]` bytes, on the model's device.
        window: bytes per window.
        batch: windows at a time.
        learn: what writes the model's memories, as for `HopeLM.forward`.
        rank, world: which of the windows are this process's.
        total: sums a tensor over processes.
        quiet: no progress bar.

    Raises:
        ValueError: a text of fewer than two bytes.
    """
    known = window // 4  # what a window reads again, and does not score again
    starts = range(0, max(1, len(text) - 1 - known), window - known)
    full = sum(start + window + 1 <= len(text) for start in starts)
    with _measured(model, text, "bytes") as nats:
        for group, counts in _dealt(starts, full, batch, rank, world, quiet):
            pieces = torch.stack([text[s : s + window + 1] for s in group]).long()
            logits, _ = model(pieces[:, :-1], learn=learn)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), pieces[:, 1:].flatten(), reduction="none")
            for start, row in zip(group, loss.view(len(group), -1), strict=True):
                nats += row[(0 if start == 0 else known) :].sum(dtype=torch.float64) * counts
    return float(total(nats)) / (len(text) - 1) / math.log(2)


def answers_bits(
    model: HopeLM,
    held_out: HeldOut,
    *,
    batch: int,
    learn: Learn = "mixer",
    rank: int = 0,
    world: int = 1,
    total: Callable[[Tensor], Tensor] = lambda x: x,
    quiet: bool = True,
) -> float:
    """Return the mean bits that `model` needs for each answer of a task's examples, `batch` of them at a time.

    Other arguments are as of `bits_per_byte`.
    """
    tokens, answers, mask = held_out.tokens, held_out.answers, held_out.mask
    assert answers is not None
    device = next(model.parameters()).device
    with _measured(model, tokens.to(device), "examples") as nats:
        for group, counts in _dealt(range(len(tokens)), len(tokens), batch, rank, world, quiet):
            own = [None if given is None else given[group].to(device) for given in (tokens, answers, mask)]
            assert own[0] is not None
            loss, _ = model.loss(own[0], targets=own[1], mask=own[2], learn=learn, reduction="sum")
            nats += loss * counts
    return float(total(nats)) / counted_answers(answers, mask) / math.log(2)


def documents_bits(
    model: HopeLM,
    tokens: Tensor,
    starts: Tensor,
    *,
    window: int,
    batch: int,
    learn: Learn = True,
    rank: int = 0,
    world: int = 1,
    total: Callable[[Tensor], Tensor] = lambda x: x,
    quiet: bool = True,
) -> float:
    """Return the mean bits that `model` needs for each token of documents but their first, in windows of their own.

    Args:
        model: its state begins anew with each window, and in it with each document.
        tokens: `[N]`, documents end to end, on the model's device.
        starts: `[N]` bool, where each begins, on the CPU.
        window: tokens per window; of the last one, what is left.
        batch: windows at a time.
        learn, rank, world, total, quiet: as of `bits_per_byte`.

    Raises:
        ValueError: fewer than two tokens.
    """
    firsts = range(0, len(tokens) - 1, window)
    with _measured(model, tokens, "tokens") as nats:
        for group, counts in _dealt(firsts, (len(tokens) - 1) // window, batch, rank, world, quiet):
            parts = [slice(first, first + window + 1) for first in group]
            rows = torch.stack([tokens[part] for part in parts]).long()
            begun = torch.stack([starts[part] for part in parts])
            loss, _ = model.loss(rows, starts=begun, learn=learn, reduction="sum")
            nats += loss * counts
    counted = len(tokens) - 1 - int(starts[1:].sum())
    return float(total(nats)) / max(1, counted) / math.log(2)


def stream_bits_per_byte(
    model: nn.Module,
    text: Tensor,
    *,
    streams: int,
    piece: int,
    learn: Learn = True,
    rank: int = 0,
    world: int = 1,
    total: Callable[[Tensor], Tensor] = lambda x: x,
    quiet: bool = True,
) -> float:
    """Return the mean bits that `model` needs for each byte of `text` but the first, read with its state throughout.

    The text is cut into `streams` stretches of one length, side by side in a batch: each byte is predicted from all of
    its stretch before it, and counted once. Memory does not grow with the text, if the model's state does not.

    Args:
        model: a `nestopt.models.HopeLM`.
        text: `[N]` bytes, on the model's device.
        streams: how many stretches, at most one for each byte to predict.
        piece: bytes of each stretch per call.
        learn: what writes the model's memories, as for `HopeLM.forward`.
        rank, world: which of the stretches are this process's.
        total: sums a tensor over processes.
        quiet: no progress bar.

    Raises:
        ValueError: a text of fewer than two bytes.
    """
    with _measured(model, text, "bytes") as nats:
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
        state = None
        for first in _bar(range(0, length, piece), quiet):
            part = slice(first, first + piece)
            logits, state = model(inputs[:, part], state, learn=learn)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets[:, part].flatten(), reduction="none")
            nats += (loss * counted[:, part].flatten()).sum(dtype=torch.float64)
    return float(total(nats)) / wanted / math.log(2)
