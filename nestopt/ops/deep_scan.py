"""MLP memories over chunks of tokens: what `nestopt.ops.deep_memory` and the dispatcher run, in one layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from nestopt.core.tree import State
from nestopt.kernels import chunk_write, mlp
from nestopt.kernels.chunk_write import Fading
from nestopt.kernels.step_size import step_sizes
from nestopt.ops.shapes import check_choice, check_whole

Read = Literal["after", "before", "chunk"]

Now = tuple[list[Tensor], list[Tensor] | None]
"""The weights and their momenta `[B, H, out, in]`, W1 first; None where there is no momentum."""

Notes = list[dict[str, Tensor]]
"""What the memory did, chunk by chunk."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `nestopt.ops.deep_memory` that are no tensors, checked."""

    form: mlp.Form
    delta: float
    objective: str
    step: str
    bound: float
    read: Read
    chunk: int
    checkpoint: int

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, ("l2", "dot"))
        check_choice("step", self.step, ("normalized", "raw"))
        check_choice("read", self.read, ("after", "before", "chunk"))
        check_choice("activation", self.form.activation, tuple(mlp.ACTIVATIONS))
        check_whole("chunk", self.chunk, 1)
        check_whole("checkpoint", self.checkpoint, 0)
        if not 0 < self.bound < 2:
            raise ValueError(f"bound={self.bound!r} is not allowed; give a number above 0 and below 2")
        if not 0 <= self.delta < math.inf:
            raise ValueError(f"delta={self.delta!r} is not allowed; give a finite number, 0 or more")


def scan_chunks(
    now: Now,
    q: Tensor,
    pending: Mapping[str, Tensor] | None,
    fresh: Mapping[str, Tensor],
    settings: Settings,
    stats: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Now, State]:
    """Run over `fresh` tokens after `pending` ones, which stand at the beginning of a chunk.

    Args:
        now: the memory as that chunk found it.
        q: `[B, H, T, D_k]`, of the fresh tokens.
        pending: as `fresh`, fewer than a chunk; None is none.
        fresh: `"k"` `[B, H, T, D_k]`, `"v"` `[B, H, T, D_v]`, and `[B, H, T]`: `"live"`, bool, `"lr"`, and where there
            are any `"decay"` and `"momentum"`. Of tokens that are not live all are 0, but decay and momentum 1.
        settings: of the memory.
        stats: filled as `nestopt.ops.deep_memory` says.

    Returns:
        y `[B, H, T, D_v]`, the memory at the start of the chunk that is not over, and that chunk's tokens.
    """
    done = 0 if pending is None else pending["k"].shape[2]
    held = dict(fresh)
    if pending is not None and done:
        held = {name: torch.cat([pending[name], x], dim=2) for name, x in fresh.items()}
    length = done + q.shape[2]
    whole = length - length % settings.chunk
    asked, chunks = _asked(q, done, settings), _chunks(held, whole, settings.chunk)
    notes: Notes | None = None if stats is None else []
    ys, group = [], settings.checkpoint or max(len(chunks), 1)
    through = _recomputed if settings.checkpoint and torch.is_grad_enabled() else _through
    for first in range(0, len(chunks), group):
        part = slice(first, min(first + group, len(chunks)))  # `asked` may have one more: of the chunk that is not over
        y, now = through(now, asked[part], chunks[part], settings, notes)
        ys.append(y)
    rest = {name: x[:, :, whole:] for name, x in held.items()}
    if length > whole:
        ys.append(_read_open(now, asked[len(chunks)], rest, settings))
    if stats is not None and notes is not None:
        stats.update(_stacked(notes, q))
    y = torch.cat(ys, dim=2) if len(ys) > 1 else ys[0]
    return (y if settings.read == "chunk" or not done else y[:, :, done:]), now, rest


def _asked(q: Tensor, done: int, settings: Settings) -> list[Tensor]:
    """The queries of each chunk, the first of which began `done` tokens ago."""
    chunk = settings.chunk
    if settings.read != "chunk":  # reads are taken with the chunk's writes: those that were answered before ask nothing
        return list(torch.nn.functional.pad(q, (0, 0, done, 0)).split(chunk, dim=2))
    first = min(chunk - done, q.shape[2])
    later = q[:, :, first:]
    return [q[:, :, :first], *(later.split(chunk, dim=2) if later.shape[2] else ())]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The tokens of a chunk `[B, H, C, ..]` and what their gates come to."""

    k: Tensor
    v: Tensor
    live: Tensor
    lr: Tensor
    damping: Tensor
    fading: Fading


def _chunks(held: Mapping[str, Tensor], whole: int, chunk: int) -> list[Chunk]:
    """All whole chunks. What their gates come to is computed for all at once."""
    if not whole:
        return []
    blocks = {name: x[:, :, :whole].unflatten(2, (-1, chunk)) for name, x in held.items()}
    fadings = Fading.of(blocks.get("decay"), blocks.get("momentum"), blocks["live"]).unbind(2, whole // chunk)
    columns = [blocks[name].unbind(2) for name in ("k", "v", "live", "lr")]
    return [
        Chunk(k, v, live, lr, damping, fading)
        for k, v, live, lr, damping, fading in zip(*columns, _damping(blocks).unbind(2), fadings, strict=True)
    ]


def _damping(held: Mapping[str, Tensor]) -> Tensor:
    """α (1 - θ): by what the normalised step is shortened."""
    share = held["decay"] if "decay" in held else torch.ones_like(held["lr"])
    return share * (1 - held["momentum"]) if "momentum" in held else share


def _through(
    now: Now, asked: Sequence[Tensor], chunks: Sequence[Chunk], settings: Settings, notes: Notes | None
) -> tuple[Tensor, Now]:
    """The answers of these chunks, and the memory after them."""
    answers = []
    for q, tokens in zip(asked, chunks, strict=True):
        y, now = _step(now, q, tokens, settings, notes)
        answers.append(y)
    return torch.cat(answers, dim=2) if len(answers) > 1 else answers[0], now


def _recomputed(
    now: Now, asked: Sequence[Tensor], chunks: Sequence[Chunk], settings: Settings, notes: Notes | None
) -> tuple[Tensor, Now]:
    """`_through`, run again in the backward pass instead of keeping what it computed."""
    has_momentum = now[1] is not None
    noted: Notes | None = None if notes is None else []

    def run(*flat: Tensor) -> tuple[Tensor, ...]:
        y, after = _through(_joined(flat, has_momentum), asked, chunks, settings, noted)
        return y, *_flat(after)

    y, *flat = recomputed(run, *_flat(now), use_reentrant=False, preserve_rng_state=False)
    if notes is not None and noted is not None:
        notes.extend(noted)  # now: the second run takes notes, too
    return y, _joined(flat, has_momentum)


def _flat(now: Now) -> list[Tensor]:
    return [*now[0], *(now[1] or ())]


def _joined(flat: Sequence[Tensor], has_momentum: bool) -> Now:
    if not has_momentum:
        return list(flat), None
    half = len(flat) // 2
    return list(flat[:half]), list(flat[half:])


def _step(now: Now, q: Tensor, tokens: Chunk, settings: Settings, notes: Notes | None) -> tuple[Tensor, Now]:
    """Read and write one whole chunk."""
    if settings.read == "chunk":
        y, used = mlp.read(now[0], q, settings.form)
        writes, (weights, momenta) = _writes((used, now[1]), tokens, settings, notes)
    else:
        writes, now = _writes(now, tokens, settings, notes)
        y, (weights, momenta) = _answers(now, q, writes, tokens.fading, settings)
    after, left = [], []
    for i, written in enumerate(writes):
        weight, momentum = chunk_write.advance(
            weights[i], None if momenta is None else momenta[i], written, tokens.fading
        )
        after.append(weight)
        left += [] if momentum is None else [momentum]
    return y, (after, left or None)


def _read_open(now: Now, q: Tensor, held: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Read within a chunk that is not over."""
    if settings.read == "chunk":
        return mlp.read(now[0], q, settings.form)[0]
    fading = Fading.of(held.get("decay"), held.get("momentum"), held["live"])
    tokens = Chunk(held["k"], held["v"], held["live"], held["lr"], _damping(held), fading)
    writes, now = _writes(now, tokens, settings, None)
    return _answers(now, q, writes, fading, settings)[0]


def _writes(now: Now, tokens: Chunk, settings: Settings, notes: Notes | None) -> tuple[list[chunk_write.Write], Now]:
    """What the chunk writes to each weight; and the memory, to be used from there on (`nestopt.kernels.weights`)."""
    at, weights = mlp.linearise(now[0], tokens.k, settings.form)
    wrong = at.y - tokens.v if settings.objective == "l2" else -tokens.v
    errors, weights = mlp.errors(weights, at, wrong, settings.form)
    lr, weights = _rates(weights, at, tokens, settings)
    if notes is not None:
        notes.append(_note(weights, at, tokens, lr))
    strength = settings.delta * lr if settings.delta else None
    writes, momenta = [], []
    for i, error in enumerate(errors):
        momentum = None if now[1] is None else now[1][i]
        written, momentum = chunk_write.write(
            momentum, at.inputs[i], lr[..., None] * error, strength, at.outputs[i], tokens.fading
        )
        writes.append(written)
        momenta += [] if momentum is None else [momentum]
    return writes, (weights, momenta or None)


def _rates(weights: list[Tensor], at: mlp.Linearised, tokens: Chunk, settings: Settings) -> tuple[Tensor, list[Tensor]]:
    """η `[B, H, C]`; and the weights, to be used from there on."""
    if settings.step == "raw":
        return tokens.lr, weights
    sensitivities, weights = mlp.sensitivities(weights, at, settings.form)
    lr = step_sizes(
        tokens.lr,
        tokens.damping,
        at.inputs,
        sensitivities,
        delta=settings.delta,
        bound=settings.bound,
        read=settings.read,
        chunk=settings.chunk,
    )
    return lr, weights


def _answers(
    now: Now, q: Tensor, writes: Sequence[chunk_write.Write], fading: Fading, settings: Settings
) -> tuple[Tensor, Now]:
    """The read of each token with the weights as they are by then; and the memory, to be used from there on."""
    activation: Callable[[Tensor], Tensor] = mlp.ACTIVATIONS[settings.form.activation][0]
    x, weights = q, list(now[0])
    momenta: list[Tensor | None] = [None] * len(writes) if now[1] is None else list(now[1])
    for i in range(len(writes) - 1, -1, -1):
        x, weights[i], momenta[i] = chunk_write.read_within(weights[i], momenta[i], x, writes[i], fading, settings.read)
        if i:
            x = activation(x)
    kept = [momentum for momentum in momenta if momentum is not None]
    return mlp.finish(x, q, settings.form), (weights, kept or None)


def _note(weights: Sequence[Tensor], at: mlp.Linearised, tokens: Chunk, lr: Tensor) -> dict[str, Tensor]:
    count = tokens.live.sum(-1).clamp_min(1)
    wrong = (at.y.detach() - tokens.v.detach()).square().mean(-1) * tokens.live
    return {
        "surprise": (wrong.sum(-1) / count).sqrt(),
        "step": lr.detach().sum(-1) / count,
        "weights": torch.stack([w.detach().square().sum((-2, -1)) for w in weights]).sum(0).sqrt(),
    }


def _stacked(notes: Notes, q: Tensor) -> dict[str, Tensor]:
    """Notes `[B, H]` as `[B, H, chunks]`."""
    if not notes:
        return {name: q.new_empty(*q.shape[:2], 0) for name in ("surprise", "step", "weights")}
    return {name: torch.stack([note[name] for note in notes], dim=-1) for name in notes[0]}
