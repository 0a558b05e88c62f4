"""nestopt's layers. All is looked up when a row is built: what this nestopt does not have is reported as such."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

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
from benchmarks.rows import Missing
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
        _row("titans, four heads", _titans, narrow, chunked=True),
        _row("ttt, four heads", _ttt, narrow, chunked=True),
        _row("deltanet", _named("deltanet"), delta),
        _row("gated_deltanet", _named("gated_deltanet"), delta),
        _row("gated_linear", _named("gated_linear"), matrix),
        _row("retnet", _named("retnet"), matrix),
        _row("linear_attention", _named("linear_attention"), matrix),
        _row("attention", _named("attention"), flops.attended, peer=ATTENTION),
        _row("window_attention", _window, lambda size: flops.attended(size, WINDOW)),
        _row("self-modifying write, one head", _self_modifying, write, heads=1, chunked=True, peer=SELF_MODIFYING),
        Row(OP, _op, lambda size: MEMORIES * write(size), chunked=True, peer=SELF_MODIFYING),
    ]


# -- levels ----------------------------------------------------------------------------------------------------------


def _level(name: str, **fields: Any) -> nestopt.Level:
    kind = getattr(nestopt.levels, name, None)
    if kind is None:
        raise Missing(f"not there: nestopt.levels.{name}")
    for field in fields:
        if field not in inspect.signature(kind).parameters:
            raise Missing(f"not there: nestopt.levels.{name}({field}=…)")
    return kind(**fields)


def _named(name: str) -> Make:
    return lambda size: _level(name)


def _hidden(size: Size, ratio: int) -> int:
    """`ratio` times a head's width."""
    return ratio * size.dim // size.heads


def _titans(size: Size) -> nestopt.Level:
    """d → 4d → d a head, as titans-pytorch's; tokens read the memory as their chunk found it, and write to it there."""
    return _level("titans", memory=Mlp(hidden=_hidden(size, 4)), chunk=size.chunk, read="chunk")


def _ttt(size: Size) -> nestopt.Level:
    """d → 4d → d a head; tokens read after their own write, as in the paper."""
    return _level("ttt", memory=Mlp(hidden=_hidden(size, 4)), chunk=size.chunk)


def _window(size: Size) -> nestopt.Level:
    return _level("window_attention", memory=Window(size=WINDOW))


def _self_modifying(size: Size) -> nestopt.Level:
    """One memory of those that nested-learning's layer writes: D → D → D with gelu, and the rank-one decay."""
    rule = _level("dgd", of=_level("momentum", beta=nestopt.Gate(0.5)))
    memory = Mlp(hidden=_hidden(size, 1), activation="gelu")
    made = _level("titans", memory=memory, rule=rule, chunk=size.chunk, read="chunk")
    try:
        nestopt.ops.run(made, *torch.zeros(3, 1, 1, 1, 2))
    except ValueError as error:
        raise Missing(f"not there: {error}") from None
    return made


# -- layers ----------------------------------------------------------------------------------------------------------


def _row(name: str, make: Make, memory: Flops, heads: int | None = None, chunked: bool = False, peer: str = "") -> Row:
    """The level `make` gives as a layer; its own projections, of q, k, v and the answer, are in the floor."""

    def at(size: Size) -> Size:
        return size if heads is None else dataclasses.replace(size, heads=heads)

    def build(size: Size) -> Layer:
        return _layer(make(at(size)), at(size))

    needed = flops.plus(flops.projections(4), memory)
    return Row(f"nestopt {name}", build, lambda size: needed(at(size)), chunked, peer)


def _layer(made: nestopt.Level, size: Size) -> Layer:
    module = nestopt.nn.SequenceMemory(made, dim=size.dim, heads=size.heads)

    def jump(batch: int, position: int) -> State:
        return _at(module.init_state(batch), position)

    grows = isinstance(getattr(made, "memory", None), Window) and made.memory.size is None
    return Layer(module, lambda x: module(x)[0], [tokens(size)], stream=module, jump=jump if grows else None)


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
    deep_memory = getattr(nestopt.ops, "deep_memory", None)
    if deep_memory is None:
        raise Missing("not there: nestopt.ops.deep_memory")
    shape = (size.batch, size.tokens, MEMORIES)
    q, k, v = (torch.randn(*shape, size.dim) for _ in range(3))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    lr, decay, momentum = (low + (high - low) * torch.rand(shape) for low, high in ((0, 0.2), (0.99, 1), (0.4, 0.6)))
    weights = nn.ParameterList(torch.randn(2, MEMORIES, size.dim, size.dim).mul(size.dim**-0.5).unbind())

    def read(q: Tensor, k: Tensor, v: Tensor, lr: Tensor, decay: Tensor, momentum: Tensor) -> Tensor:
        gates = {"lr": lr, "decay": decay, "momentum": momentum}
        options = {"delta": 1.0, "read": "chunk", "chunk": size.chunk, "activation": "gelu"}
        return deep_memory(q, k, v, weights=tuple(weights), **gates, **options)[0]

    return Layer(weights, read, [q, k, v, lr, decay, momentum])
