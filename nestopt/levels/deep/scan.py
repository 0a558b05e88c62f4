"""MLP memories over chunks of tokens: what `nestopt.ops.deep_memory` and the dispatcher run, in one layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nestopt.core.precision import current, matmul, products_in
from nestopt.core.token_batch import check_choice, check_whole
from nestopt.core.tree import State
from nestopt.levels.deep import mlp
from nestopt.levels.deep.block_weight import BlockWeight
from nestopt.levels.deep.gate_products import GateProducts
from nestopt.levels.deep.own_values import bounded
from nestopt.levels.deep.step_size import step_sizes

Read = Literal["after", "before", "chunk"]

WeightState = tuple[list[Tensor], list[Tensor] | None]
"""The weights and their momenta `[B, H, out, in]`, W1 first; None where there is no momentum."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `nestopt.ops.deep_memory` that are no tensors, checked."""

    form: mlp.Form
    delta: float
    error: Callable[[Tensor, Tensor], Tensor | None]
    """The gradient of the objective with respect to the read, from read and value."""
    step: str
    bound: float
    read: Read
    chunk: int
    checkpoint: int
    own_values: bool = False
    """Of a memory that is read as its `"chunk"` found it: what is written under a key is M(v), the memory's own."""

    def __post_init__(self) -> None:
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
    now: WeightState,
    q: Tensor,
    pending: Mapping[str, Tensor] | None,
    fresh: Mapping[str, Tensor],
    settings: Settings,
) -> tuple[Tensor, WeightState, State]:
    """Run over `fresh` tokens after `pending` ones, which stand at the beginning of a chunk.

    Args:
        now: the memory as that chunk found it.
        q: `[B, H, T, D_k]`, of the fresh tokens.
        pending: as `fresh`, fewer than a chunk; None is none.
        fresh: `"k"` `[B, H, T, D_k]`, `"v"` `[B, H, T, D_v]`, and `[B, H, T]`: `"live"`, bool, `"lr"`, and where there
            are any `"decay"` and `"momentum"`. Of tokens that are not live all are 0, but decay and momentum 1.
        settings: of the memory.

    Returns:
        y `[B, H, T, D_v]`, the memory at the start of the chunk that is not over, and that chunk's tokens.
    """
    done = 0 if pending is None else pending["k"].shape[2]
    every = concat_tokens(pending, fresh)
    length = done + q.shape[2]
    whole = length - length % settings.chunk
    asked, blocks = _asked(q, done, settings), _blocks(every, whole, settings.chunk)
    ys: list[Tensor] = []
    again = settings.checkpoint > 0 and torch.is_grad_enabled()
    each = max(settings.checkpoint // max(BLOCK // settings.chunk, 1), 1) if settings.checkpoint else len(blocks) or 1
    answered = 0
    for first in range(0, len(blocks), each):
        part = blocks[first : first + each]
        count = sum(len(block.chunks) for block in part)
        queries = asked[answered : answered + count]
        if again:

            def run(
                now: WeightState, queries: Sequence[Tensor] = queries, part: Sequence[Block] = part
            ) -> tuple[list[Tensor], WeightState]:
                y, now = _through(now, queries, part, settings)
                return [y], now

            (y,), now = recomputed(run, now)
        else:
            y, now = _through(now, queries, part, settings)
        answered += count
        ys.append(y)
    rest = {name: x[:, :, whole:] for name, x in every.items()}
    if length > whole:
        ys.append(_read_open(now, asked[answered], rest, settings))
    y = torch.cat(ys, dim=2) if len(ys) > 1 else ys[0]
    return (y if settings.read == "chunk" or not done else y[:, :, done:]), now, rest


def concat_tokens(pending: Mapping[str, Tensor] | None, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `pending` tokens, if there are any, and `fresh` ones after them."""
    if pending is None or not pending["k"].shape[2]:
        return dict(fresh)
    return {name: torch.cat([pending[name], x], dim=2) for name, x in fresh.items()}


def _asked(q: Tensor, done: int, settings: Settings) -> list[Tensor]:
    """Return the queries of each chunk, the first of which began `done` tokens ago."""
    chunk = settings.chunk
    if settings.read != "chunk":  # reads are taken with the chunk's writes: those that were answered before ask nothing
        return list(torch.nn.functional.pad(q, (0, 0, done, 0)).split(chunk, dim=2))
    if not done:
        return list(q.split(chunk, dim=2))
    first = min(chunk - done, q.shape[2])
    later = _part(q, first, q.shape[2])
    return [_part(q, 0, first), *(later.split(chunk, dim=2) if later.shape[2] else ())]


def _part(x: Tensor, first: int, last: int) -> Tensor:
    """Return tokens first + 1 … last of `[B, H, T, ..]`; if these are all x itself, whose gradient needs no zeros."""
    return x if first == 0 and last == x.shape[2] else x[:, :, first:last]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The tokens of a chunk `[B, H, C, ..]`."""

    k: Tensor
    v: Tensor
    live: Tensor
    lr: Tensor
    damping: Tensor


@dataclasses.dataclass(frozen=True)
class Block:
    """Chunks after which new weights are made."""

    chunks: list[Chunk]
    fading: GateProducts


BLOCK = 64
"""Tokens of a block of short chunks: that of chunks of 64, whose cost is that of their matrix products."""


def _blocks(held: Mapping[str, Tensor], whole: int, chunk: int) -> list[Block]:
    """Return all whole chunks, in blocks. What their gates come to is computed for all blocks at once."""
    size = chunk * max(BLOCK // chunk, 1)
    even = whole - whole % size
    blocks = _even_blocks({name: _part(x, 0, even) for name, x in held.items()}, size, chunk) if even else []
    if even < whole:
        blocks += _even_blocks({name: _part(x, even, whole) for name, x in held.items()}, whole - even, chunk)
    return blocks


def _even_blocks(held: Mapping[str, Tensor], size: int, chunk: int) -> list[Block]:
    blocks = {name: x.unflatten(2, (-1, size)) for name, x in held.items()}
    fadings = GateProducts.of(blocks.get("decay"), blocks.get("momentum"), blocks["live"])
    tokens = (*(blocks[name] for name in ("k", "v", "live", "lr")), damping(blocks))
    columns = [[block.split(chunk, dim=2) for block in x.unbind(2)] for x in tokens]
    return [
        Block([Chunk(*parts) for parts in zip(*rows, strict=True)], fading)
        for *rows, fading in zip(*columns, fadings.unbind(2, len(columns[0])), strict=True)
    ]


def damping(held: Mapping[str, Tensor]) -> Tensor:
    """α (1 - θ): by what the normalised step is shortened."""
    share = held["decay"] if "decay" in held else torch.ones_like(held["lr"])
    return share * (1 - held["momentum"]) if "momentum" in held else share


def _through(
    now: WeightState, asked: Sequence[Tensor], blocks: Sequence[Block], settings: Settings
) -> tuple[Tensor, WeightState]:
    """Return the answers of these blocks, and the memory after them."""
    answers, queries = [], iter(asked)
    for block in blocks:
        weights = block_weights(now, block.fading)
        for i, tokens in enumerate(block.chunks):
            if i:
                for weight in weights:
                    weight.close()
            answers.append(step(weights, next(queries), tokens, settings))
        now = weights_after(weights)
    return torch.cat(answers, dim=2) if len(answers) > 1 else answers[0], now


def block_weights(now: WeightState, fading: GateProducts) -> list[BlockWeight]:
    """Return the weights of a memory in a block of tokens."""
    momenta = [None] * len(now[0]) if now[1] is None else now[1]
    return [BlockWeight(weight, momentum, fading) for weight, momentum in zip(now[0], momenta, strict=True)]


def weights_after(weights: Sequence[BlockWeight]) -> WeightState:
    """Return the memory after its block."""
    ends = [weight.end() for weight in weights]
    momenta = [momentum for _, momentum in ends if momentum is not None]
    return [weight for weight, _ in ends], momenta or None


def recomputed(
    run: Callable[[WeightState], tuple[list[Tensor], WeightState]], now: WeightState
) -> tuple[list[Tensor], WeightState]:
    """Call `run(now)`, and again in the backward pass, instead of keeping what it computed."""
    has_momentum, precision = now[1] is not None, current()  # the backward pass may be on another thread
    counts: list[int] = []

    def flat_run(*flat: Tensor) -> tuple[Tensor, ...]:
        with products_in(precision):
            found, after = run(_joined(flat, has_momentum))
        counts.append(len(found))
        return *found, *_flat(after)

    flat = checkpoint(flat_run, *_flat(now), use_reentrant=False, preserve_rng_state=False)
    return list(flat[: counts[0]]), _joined(flat[counts[0] :], has_momentum)


def _flat(now: WeightState) -> list[Tensor]:
    return [*now[0], *(now[1] or ())]


def _joined(flat: Sequence[Tensor], has_momentum: bool) -> WeightState:
    if not has_momentum:
        return list(flat), None
    half = len(flat) // 2
    return list(flat[:half]), list(flat[half:])


def step(weights: Sequence[BlockWeight], q: Tensor, tokens: Chunk, settings: Settings) -> Tensor:
    """Read and write one chunk."""
    if settings.own_values:
        asked = torch.cat([q, tokens.v], dim=-2)
        answers, at = mlp.read_and_linearise(weights, asked, tokens.k, settings.form)
        y, own = answers.split([q.shape[-2], tokens.v.shape[-2]], dim=-2)
        if settings.step == "normalized":
            own = bounded(own, tokens.v)
        _write(weights, at, dataclasses.replace(tokens, v=own), settings)
        return y
    if settings.read == "chunk":
        y, at = mlp.read_and_linearise(weights, q, tokens.k, settings.form)
        _write(weights, at, tokens, settings)
        return y
    _write(weights, mlp.linearise(weights, tokens.k, settings.form), tokens, settings)
    return _answers(weights, q, settings)


def _read_open(now: WeightState, q: Tensor, tokens: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Read within a chunk that is not over."""
    if settings.read == "chunk":
        return mlp.read(block_weights(now, GateProducts()), q, settings.form)
    (block,) = _even_blocks(tokens, q.shape[2], q.shape[2])
    weights = block_weights(now, block.fading)
    return step(weights, q, block.chunks[0], settings)


def write_open(now: WeightState, tokens: Mapping[str, Tensor], settings: Settings) -> WeightState:
    """Return the memory after `tokens` of a chunk that need not be over."""
    size = tokens["k"].shape[2]
    (block,) = _even_blocks(tokens, size, size)
    weights, chunk = block_weights(now, block.fading), block.chunks[0]
    _write(weights, mlp.linearise(weights, chunk.k, settings.form), chunk, settings)
    return weights_after(weights)


def _write(weights: Sequence[BlockWeight], at: mlp.Linearised, tokens: Chunk, settings: Settings) -> None:
    """Write the keys that the memory was linearised at."""
    wrong = settings.error(at.y, tokens.v)
    assert wrong is not None
    errors = mlp.errors(weights, at, wrong, settings.form)
    lr = tokens.lr
    near: Sequence[Tensor | None] = [None] * len(weights)
    if settings.step == "normalized" or settings.delta:
        near = [matmul(a, a.mT) for a in at.inputs]
    if settings.step == "normalized":
        lr = step_sizes(
            lr,
            tokens.damping,
            [product for product in near if product is not None],
            mlp.sensitivities(weights, at, settings.form),
            delta=settings.delta,
            bound=settings.bound,
            read=settings.read,
            chunk=settings.chunk,
        )
    strength = settings.delta * lr if settings.delta else None
    for weight, error, products in zip(weights, errors, near, strict=True):
        weight.write(lr[..., None] * error, strength, products)


def _answers(weights: Sequence[BlockWeight], q: Tensor, settings: Settings) -> Tensor:
    """Return the read of each token of the chunk that was written last with the weights as they are by then."""
    activation: Callable[[Tensor], Tensor] = mlp.ACTIVATIONS[settings.form.activation][0]
    x = q
    for i in range(len(weights) - 1, -1, -1):
        x = weights[i].read(x, settings.read)
        if i:
            x = activation(x)
    return mlp.finish(x, q, settings.form)
