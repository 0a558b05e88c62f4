"""MLP memories over chunks of tokens: what `nestopt.ops.deep_memory` and the dispatcher run, in one layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nestopt.core.pending import RowChunks
from nestopt.core.precision import current, product, products_in
from nestopt.core.tree import State
from nestopt.kernels.products import GateProducts
from nestopt.levels.deep import layerwise, token_wise
from nestopt.levels.deep.mlp import (
    ACTIVATIONS,
    Chunk,
    ChunkGates,
    Linearised,
    Settings,
    Weights,
    errors,
    finish,
    linearise,
    read,
    read_and_linearise,
    sensitivities,
)
from nestopt.levels.deep.step_size import bounded, step_sizes
from nestopt.levels.deep.weight import BlockWeight

T = TypeVar("T")

WeightState = tuple[list[Tensor], list[Tensor] | None]
"""The weights and their momenta `[B, H, out, in]`, W1 first; None where there is no momentum."""


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
    if token_wise.takes(*now, settings):
        y, weight = token_wise.scan(now[0][0], q, fresh, settings)
        return y, ([weight], None), {name: x[:, :, :0] for name, x in fresh.items()}
    done = 0 if pending is None else pending["k"].shape[2]
    every = concat_tokens(pending, fresh)
    length = done + q.shape[2]
    whole = length - length % settings.chunk
    asked, blocks = _asked(q, done, settings), _blocks(every, whole, settings)
    ys: list[Tensor] = []
    again = settings.checkpoint > 0 and torch.is_grad_enabled()
    each = max(settings.checkpoint // max(BLOCK // settings.chunk, 1), 1) if settings.checkpoint else len(blocks) or 1
    answered = 0
    for first in range(0, len(blocks), each):
        part = blocks[first : first + each]
        count = sum(map(len, part))
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


def scan_rows(
    now: WeightState,
    q: Tensor,
    pending: Mapping[str, Tensor] | None,
    fresh: Mapping[str, Tensor],
    settings: Settings,
    mask: Tensor | None,
) -> tuple[Tensor, WeightState, State]:
    """Do as `scan_chunks` with rows that may be at places of their own in a chunk, and have padding (`mask`)."""
    rows = RowChunks.of(pending, mask, q, settings.chunk)
    if rows is None:
        return scan_chunks(now, q, pending, fresh, settings)
    every, asked = idle(rows.joined(pending, fresh)), rows.joined(None, {"q": q})["q"]
    y, now, rest = scan_chunks(now, asked, None, every, settings)
    return rows.back(y), now, rows.kept(rest)


def idle(tokens: Mapping[str, Tensor]) -> State:
    """Return tokens with gates that write nothing and fade nothing where they are not live."""
    none = {"lr": 0.0, "decay": 1.0, "momentum": 1.0}
    return {name: torch.where(tokens["live"], x, none[name]) if name in none else x for name, x in tokens.items()}


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


Block = list[Chunk]
"""Chunks after which new weights are made."""

BLOCK = 64
"""Tokens of a block of short chunks: that of chunks of 64, whose cost is that of their matrix products."""


def _blocks(held: Mapping[str, Tensor], whole: int, settings: Settings) -> list[Block]:
    """Return all whole chunks, in blocks. What their gates come to is computed for all blocks at once."""
    size = settings.chunk * max(BLOCK // settings.chunk, 1)
    even = whole - whole % size
    blocks = _even_blocks({name: _part(x, 0, even) for name, x in held.items()}, size, settings) if even else []
    if even < whole:
        blocks += _even_blocks({name: _part(x, even, whole) for name, x in held.items()}, whole - even, settings)
    return blocks


def _even_blocks(held: Mapping[str, Tensor], size: int, settings: Settings) -> list[Block]:
    """Return tokens in blocks of `size`, a multiple of the chunk, or less than one."""
    blocks, chunk = {name: x.unflatten(2, (-1, size)) for name, x in held.items()}, min(settings.chunk, size)
    count = blocks["k"].shape[2]
    tokens = (*(blocks[name] for name in ("k", "v", "lr")), damping(blocks, settings))
    columns = [[block.split(chunk, dim=2) for block in x.unbind(2)] for x in tokens]
    outer, inner = both_gates(blocks, settings, lambda gates: _in_chunks(gates, count, size, settings))
    found: list[Block] = [[] for _ in range(count)]
    for block, *parts, own, others in zip(found, *columns, outer, inner, strict=True):
        for k, v, lr, damped, *gates in zip(*parts, own, others, strict=True):
            block.append(Chunk(k, v, lr, damped, *gates))
    return found


def _in_chunks(gates: GateProducts, count: int, size: int, settings: Settings) -> list[list[ChunkGates]]:
    """Return, of each of `count` blocks of `size` tokens, what `gates` come to in its chunks."""
    chunk = min(settings.chunk, size)
    asked = settings.delta or settings.step == "layerwise" or settings.read == "before"
    earlier = gates.before().unbind(2, count) if asked else [None] * count
    found = []
    for at, then in zip(gates.unbind(2, count), earlier, strict=True):
        block = []
        for first in range(0, size, chunk):
            end = first + chunk
            now = at.rows(first, end) if settings.read == "after" else None
            before = None if then is None else then.rows(first, end)
            last = now if now is not None and chunk == 1 else at.rows(end - 1, end)  # of one token they are the same
            block.append(ChunkGates(now, before, last))
        found.append(block)
    return found


def both_gates(held: Mapping[str, Tensor], settings: Settings, cut: Callable[[GateProducts], T]) -> tuple[T, T]:
    """Return what the gates of tokens `[.., n]` come to for W1 and for the other weights, `cut` into chunks."""
    momentum = held.get("momentum")
    added = held["live"]
    if momentum is not None and settings.step == "layerwise":
        added = 1 - momentum  # θ is 1 where it is not live
    outer = cut(GateProducts.of(held.get("decay"), momentum, added))
    same = settings.forget == "all" or "decay" not in held
    return outer, outer if same else cut(GateProducts.of(None, momentum, added))


def damping(held: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """α (1 - θ), or, of the layerwise step, α: by what it is shortened."""
    share = held["decay"] if "decay" in held else torch.ones_like(held["lr"])
    return share * (1 - held["momentum"]) if "momentum" in held and settings.step != "layerwise" else share


def _through(
    now: WeightState, asked: Sequence[Tensor], blocks: Sequence[Block], settings: Settings
) -> tuple[Tensor, WeightState]:
    """Return the answers of these blocks, and the memory after them."""
    answers, queries = [], iter(asked)
    for block in blocks:
        weights = block_weights(now)
        for i, tokens in enumerate(block):
            if i:
                for j, weight in enumerate(weights):
                    weight.close(block[i - 1].gates(j).last)
            answers.append(step(weights, next(queries), tokens, settings))
        now = weights_after(weights, block[-1])
    return torch.cat(answers, dim=2) if len(answers) > 1 else answers[0], now


def block_weights(now: WeightState) -> list[BlockWeight]:
    """Return the weights of a memory at the start of a block of chunks."""
    multiply = product()
    momenta: Sequence[Tensor | None] = now[1] or [None] * len(now[0])
    return [BlockWeight(weight, momentum, multiply) for weight, momentum in zip(now[0], momenta, strict=True)]


def weights_after(weights: Sequence[BlockWeight], last: Chunk) -> WeightState:
    """Return the memory after its block, whose `last` chunk this is."""
    ends = [weight.end(last.gates(i).last) for i, weight in enumerate(weights)]
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


def _read_open(now: WeightState, q: Tensor, tokens: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Read within a chunk that is not over."""
    weights = block_weights(now)
    if settings.read == "chunk":
        return read(weights, q, settings.form)
    ((chunk,),) = _even_blocks(tokens, q.shape[2], settings)
    return step(weights, q, chunk, settings)


def write_open(now: WeightState, tokens: Mapping[str, Tensor], settings: Settings) -> WeightState:
    """Return the memory after `tokens` of a chunk that need not be over."""
    ((chunk,),) = _even_blocks(tokens, tokens["k"].shape[2], settings)
    weights = block_weights(now)
    write(weights, linearise(weights, chunk.k, settings.form), chunk.v, chunk, settings)
    return weights_after(weights, chunk)


# -- one chunk: no weight is copied for a token ------------------------------------------------------------------------


def step(weights: Weights, q: Tensor, tokens: Chunk, settings: Settings) -> Tensor:
    """Read and write one chunk: `[B, H, C, D_v]`."""
    if settings.read == "chunk":
        asked = torch.cat([q, tokens.v], dim=-2) if settings.own_values else q
        y, at = read_and_linearise(weights, asked, tokens.k, settings.form)
        v = tokens.v
        if settings.own_values:
            y, v = y.split([q.shape[-2], v.shape[-2]], dim=-2)
            if settings.step != "raw":
                v = bounded(v, tokens.v)
        write(weights, at, v, tokens, settings)
        return y
    write(weights, linearise(weights, tokens.k, settings.form), tokens.v, tokens, settings)
    # each token reads the weights as they are by then
    x = q
    for i in range(len(weights) - 1, -1, -1):
        gates = tokens.gates(i).before if settings.read == "before" else tokens.gates(i).now
        assert gates is not None
        x = weights[i].read(x, gates)
        if i:
            x = ACTIVATIONS[settings.form.activation][0](x)
    return finish(x, q, settings.form)


def write(weights: Weights, at: Linearised, v: Tensor, tokens: Chunk, settings: Settings) -> None:
    """Write values v `[B, H, C, D_v]` under the keys of `tokens`, that the memory was linearised at."""
    if settings.step == "layerwise":
        layerwise.write(weights, at, v, tokens, settings)
        return
    found, lr = errors(weights, at, settings.error(at.y, v), settings.form), tokens.lr
    near: Sequence[Tensor | None] = [None] * len(weights)
    if settings.step == "normalized" or settings.delta:
        near = [weights[0].product(a, a.mT) for a in at.inputs]
    if settings.step == "normalized":
        lr = step_sizes(
            lr,
            tokens.damping,
            [product for product in near if product is not None],
            sensitivities(weights, at, settings.form),
            delta=settings.delta,
            bound=settings.bound,
            read=settings.read,
            chunk=settings.chunk,
        )
    strength = settings.delta * lr if settings.delta else None
    for i, (weight, error, products) in enumerate(zip(weights, found, near, strict=True)):
        weight.write(lr[..., None] * error, strength, products, tokens.gates(i).before)
