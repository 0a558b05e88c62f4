"""nestopt's layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nestopt
from benchmarks import layer_flops as flops
from benchmarks.layer_blocks import ATTENTION
from benchmarks.layer_flops import Flops
from benchmarks.layer_peers import SELF_MODIFYING, TITANS_SETTLED
from benchmarks.layer_rows import Layer, Row, tokens
from benchmarks.layer_size import Size
from nestopt import levels
from nestopt.core.memories import Mlp, Window
from nestopt.core.tree import State

WINDOW = 256  # pairs that window attention keeps
OP = "nestopt six self-modifying writes, the op"
MEMORIES = 6  # of the paper's self-modifying layer: keys, values, queries, step sizes, decays, and the memory itself

Make = Callable[[Size], nestopt.Level]


def rows() -> list[Row]:
    titans, narrow = flops.mlp_memory(4, heads=1), flops.mlp_memory(4)
    matrix, delta = flops.matrix_memory(), flops.matrix_memory(delta=True)
    write = flops.mlp_memory(1, heads=1, delta=True)
    return [
        _row("titans, one head", _titans, titans, heads=1, chunked=True, peer=TITANS_SETTLED),
        _row("titans, one head, checkpoint=2", _titans, titans, heads=1, chunked=True, checkpoint=2),
        _row("titans, four heads", _titans, narrow, chunked=True),
        _row("ttt, four heads", _ttt, narrow, chunked=True),
        _row("deltanet", lambda _: levels.deltanet(), delta),
        _row("gated_deltanet", lambda _: levels.gated_deltanet(), delta),
        _row("gated_linear", lambda _: levels.gated_linear(), matrix),
        _row("retnet", lambda _: levels.retnet(), matrix),
        _row("linear_attention", lambda _: levels.linear_attention(), matrix),
        _row("attention", lambda _: levels.attention(), flops.attended, peer=ATTENTION),
        _row("window_attention", _window, lambda size: flops.attended(size, WINDOW)),
        _row("self-modifying write, one head", _self_modifying, write, heads=1, chunked=True, peer=SELF_MODIFYING),
        Row(OP, _op, lambda size: MEMORIES * write(size), chunked=True, peer=SELF_MODIFYING),
    ]


# -- levels ----------------------------------------------------------------------------------------------------------


def _hidden(size: Size, ratio: int) -> int:
    """`ratio` times a head's width."""
    return ratio * size.dim // size.heads


def _titans(size: Size) -> nestopt.Level:
    """d → 4d → d a head, as titans-pytorch's; tokens read the memory as their chunk found it, and write to it there."""
    return levels.titans(memory=Mlp(hidden=_hidden(size, 4)), chunk=size.chunk, read="chunk")


def _ttt(size: Size) -> nestopt.Level:
    """d → 4d → d a head; tokens read after their own write, as in the paper."""
    return levels.ttt(memory=Mlp(hidden=_hidden(size, 4)), chunk=size.chunk)


def _window(size: Size) -> nestopt.Level:
    return levels.window_attention(memory=Window(size=WINDOW))


def _self_modifying(size: Size) -> nestopt.Level:
    """One memory of those that nested-learning's layer writes: D → D → D with gelu, and the rank-one decay."""
    memory = Mlp(hidden=_hidden(size, 1), activation="gelu")
    rule = levels.dgd(levels.momentum(nestopt.Gate(0.5)))
    return levels.titans(memory=memory, rule=rule, chunk=size.chunk, read="chunk")


# -- layers ----------------------------------------------------------------------------------------------------------


def _row(
    name: str,
    make: Make,
    memory: Flops,
    heads: int | None = None,
    chunked: bool = False,
    peer: str = "",
    checkpoint: int = 0,
) -> Row:
    """The level `make` gives as a layer; its own projections, of q, k, v and the answer, are in the floor."""

    def at(size: Size) -> Size:
        return size if heads is None else dataclasses.replace(size, heads=heads)

    def build(size: Size) -> Layer:
        return _layer(make(at(size)), at(size), checkpoint)

    needed = flops.plus(flops.projections(4), memory)
    return Row(f"nestopt {name}", build, lambda size: needed(at(size)), chunked, peer)


def _layer(made: nestopt.Level, size: Size, checkpoint: int = 0) -> Layer:
    module = nestopt.nn.SequenceMemory(made, dim=size.dim, heads=size.heads, checkpoint=checkpoint)

    def jump(batch: int, position: int) -> State:
        return _at(module.init_state(batch), position)

    def stream(x: Tensor, state: State | None) -> tuple[Tensor, State]:
        if x.shape[1] > 1 or state is None:
            return module(x, state)
        y, state = module.step(x[:, 0], state)
        return y[:, None], state

    grows = isinstance(getattr(made, "memory", None), Window) and made.memory.size is None
    return Layer(module, lambda x: module(x)[0], [tokens(size)], stream=stream, jump=jump if grows else None)


def _at(state: State, position: int) -> State:
    """A state whose growing parts, those with a dimension of 0, hold `position` random vectors: time does not depend
    on which."""
    found: State = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            found[key] = _at(value, position)
        elif key == "step":
            found[key] = torch.full_like(value, position)
        else:
            found[key] = torch.randn([position if side == 0 else side for side in value.shape])
    return found


def _op(size: Size) -> Layer:
    """Six memories D → D → D with gelu, decay, momentum and the rank-one decay, as six heads: no projections.

    Matched to nested-learning's layer at its defaults: width and hidden units of its memories, activation, residual, a
    step size and a decay for every token, chunks. Ours writes more: there the memories of η and α answer with one
    number, that for queries is a fixed matrix, W1 has no rank-one decay, and there is no momentum.
    """
    shape = (size.batch, size.tokens, MEMORIES)
    q, k, v = (torch.randn(*shape, size.dim) for _ in range(3))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    lr, decay, momentum = (low + (high - low) * torch.rand(shape) for low, high in ((0, 0.2), (0.99, 1), (0.4, 0.6)))
    weights = nn.ParameterList(torch.randn(2, MEMORIES, size.dim, size.dim).mul(size.dim**-0.5).unbind())

    def read(q: Tensor, k: Tensor, v: Tensor, lr: Tensor, decay: Tensor, momentum: Tensor) -> Tensor:
        gates = {"lr": lr, "decay": decay, "momentum": momentum}
        options = {"delta": 1.0, "read": "chunk", "chunk": size.chunk, "activation": "gelu"}
        return nestopt.ops.deep_memory(q, k, v, weights=tuple(weights), **gates, **options)[0]

    return Layer(weights, read, [q, k, v, lr, decay, momentum])
