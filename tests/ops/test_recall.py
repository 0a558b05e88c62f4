"""`learn=False`: memories are read and not written."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from nestopt.core import Gate, Level, gates_of, scan
from nestopt.core.features import Elu
from nestopt.core.memories import Mlp, Window
from nestopt.core.retentions import Decay
from nestopt.core.tree import leaves
from nestopt.levels import (
    attention,
    comba,
    deltanet,
    gd,
    linear_attention,
    momentum,
    oja,
    omega,
    rwkv6,
    self_modifying,
    titans,
    ttt,
)
from nestopt.levels.self_modifying.level import SelfModifying
from nestopt.ops import run
from tests.ops.test_dispatch import F64, FAST, GENERIC, call, inputs

PENDING = {
    "titans of a period": titans(chunk=4, period=2),
    "titans, written once a chunk": titans(chunk=4, write="chunk"),
    "titans, raw and read after": titans(chunk=4, normalized=False, lr=Gate(0.1)),
}
LEVELS = FAST | GENERIC | PENDING


def parts_of(level: Level, given: dict[str, Tensor], part: slice) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Queries, keys and values, and gates, of some tokens."""
    return [given[name][:, part] for name in "qkv"], {path: given[path][:, part] for path in gates_of(level)}


def begun(level: Level, given: dict[str, Tensor], count: int) -> dict[str, Any]:
    """The state after `count` tokens."""
    torch.manual_seed(0)
    return call(run, level, given, part=slice(0, count))[1]


def close(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("count", [4, 6])
@pytest.mark.parametrize("name", LEVELS)
def test_is_what_the_generic_machine_reads_and_changes_nothing(name: str, count: int) -> None:
    level, given = LEVELS[name], inputs(LEVELS[name])
    state = begun(level, given, count)
    before = {path: leaf.clone() for path, leaf in leaves(state)}
    tokens, gates = parts_of(level, given, slice(count, None))
    y, after = run(level, *tokens, gates=gates, state=state, learn=False)
    slow, same = scan(level, *tokens, gates=gates, state=state, learn=False)
    close(y, slow)
    for found in (after, same):
        assert before
        assert [path for path, _ in leaves(found)] == list(before)
        assert all(torch.equal(leaf, before[path]) for path, leaf in leaves(found))
    for t in range(tokens[0].shape[1]):  # a token alone, and its keys and values make no difference
        (q, k, v), now = parts_of(level, given, slice(count + t, count + t + 1))
        alone, _ = run(level, q, k.flip(0), 2 * v, gates=now, state=state, learn=False)
        close(alone[:, 0], y[:, t])


READ_FIRST = [
    name
    for name, level in LEVELS.items()
    if isinstance(level, SelfModifying) or getattr(level, "read", "after") != "after"
    if not isinstance(level, rwkv6 | comba)  # in whose answers a token's own key has a part
]


@pytest.mark.parametrize("count", [4, 5, 6])
@pytest.mark.parametrize("name", READ_FIRST)
def test_is_what_a_token_is_answered_that_is_read_before_its_write(name: str, count: int) -> None:
    level, given = LEVELS[name], inputs(LEVELS[name])
    state = begun(level, given, count)
    tokens, gates = parts_of(level, given, slice(count, count + 1))
    answered, _ = run(level, *tokens, gates=gates, state=state)
    close(run(level, *tokens, gates=gates, state=state, learn=False)[0], answered)


IDLE = {
    "linear attention": linear_attention(lr=Gate(0.5), retention=Decay(Gate(0.9)), features=Elu()),
    "deltanet": deltanet(lr=Gate(0.5)),
    "gated deltanet": deltanet(lr=Gate(0.5), retention=Decay(Gate(0.9)), fade="before"),
    "oja": oja(lr=Gate(0.5)),
    "omega of one": omega(window=1, lr=Gate(0.5)),
    "ttt": ttt(lr=Gate(0.5), chunk=4),
    "ttt, token by token": ttt(lr=Gate(0.5), chunk=1),
    "ttt, as the chunk found it": ttt(lr=Gate(0.5), chunk=4, read="chunk"),
    "titans without momentum": titans(
        memory=Mlp(norm=True), rule=gd(), lr=Gate(0.5), retention=Decay(Gate(0.9)), chunk=4
    ),
}


@pytest.mark.parametrize("name", IDLE)
def test_is_what_a_token_is_answered_that_writes_nothing(name: str) -> None:
    """Its strength is 0 and it keeps all. Until the chunk is over, after which its tokens are written."""
    level, given = IDLE[name], inputs(IDLE[name])
    state = begun(level, given, 5)
    tokens, gates = parts_of(level, given, slice(5, 8))
    idle = {path: torch.full_like(gate, float("keep" in path)) for path, gate in gates.items()}
    answered, _ = run(level, *tokens, gates=idle, state=state)
    close(run(level, *tokens, gates=gates, state=state, learn=False)[0][:, :2], answered[:, :2])


# -- pairs that are kept -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 3])
def test_attention_sees_the_pairs_of_the_state_and_none_of_the_call(size: int | None) -> None:
    level, given = attention(memory=Window(size)), inputs(attention())
    (q, k, v), _ = parts_of(level, given, slice(0, 5))
    _, state = run(level, q, k, v)
    y, _ = run(level, q, k, v, state=state, learn=False)
    first = 0 if size is None else 2
    scores = torch.einsum("bthd,bshd->bhts", q, k[:, first:]) / k.shape[-1] ** 0.5
    close(y, torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v[:, first:]))


def test_attention_without_pairs_is_answered_with_zeros() -> None:
    q = torch.randn(2, 3, 1, 4)
    y, state = run(attention(), q, q, q, learn=False)
    assert torch.equal(y, torch.zeros_like(q))
    assert state["level"]["memory"]["keys"].shape[2] == 0


def test_attention_after_padding() -> None:
    q = torch.randn(2, 4, 1, 4, dtype=F64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    _, state = run(attention(), q, q, q, mask=mask)
    y, _ = run(attention(), q, q, q, state=state, learn=False)
    _, alone = run(attention(), *(q[:1, mask[0]],) * 3)
    close(y[:1], run(attention(), *(q[:1],) * 3, state=alone, learn=False)[0])
    assert (y[1] == 0).all()
    (found,) = torch.autograd.grad(y.sum(), q)
    assert found.isfinite().all()


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention", "deltanet", "titans", "self-modifying", "adam", "titans by adam"])
def test_padding_and_tokens_that_are_not_finite(name: str) -> None:
    level, given = LEVELS[name], inputs(LEVELS[name])
    state = begun(level, given, 5)
    (q, k, v), gates = parts_of(level, given, slice(5, 9))
    y, _ = run(level, q, k, v, gates=gates, state=state, learn=False)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]], dtype=torch.bool)
    broken = torch.where(mask[..., None, None], q, torch.nan).detach()
    padded, _ = run(level, broken, k, v, gates=gates, state=state, mask=mask, learn=False)
    close(padded[mask], y[mask])
    bare, _ = run(level, broken, k, v, gates=gates, state=state, learn=False)
    close(bare[mask], y[mask])
    assert bare[~mask].isnan().all()


@pytest.mark.parametrize("name", ["attention", "deltanet", "momentum", "titans", "self-modifying", "titans by adam"])
def test_gradients_reach_queries_and_the_state(name: str) -> None:
    level, given = LEVELS[name], inputs(LEVELS[name])
    state = begun(level, given, 5)
    tokens, gates = parts_of(level, given, slice(5, 9))
    fast, slow = (how(level, *tokens, gates=gates, state=state, learn=False)[0] for how in (run, scan))
    probe = torch.randn_like(fast)
    found = [
        torch.autograd.grad((y * probe).sum(), list(given.values()), retain_graph=True, materialize_grads=True)
        for y in (fast, slow)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)
    for key in "qkv":
        assert found[0][list(given).index(key)].abs().sum() > 0


def test_sequences_end_to_end() -> None:
    level, given = self_modifying(chunk=2, projection_chunk=4), inputs(self_modifying())
    q, k, v = (given[name] for name in "qkv")
    _, state = run(level, q, k, v)
    y, _ = run(level, q, k, v, state=state, learn=False)
    ends = [0, q.shape[1], 2 * q.shape[1]]
    flat, _ = run(level, *(x.flatten(0, 1)[None] for x in (q, k, v)), state=state, cu_seqlens=ends, learn=False)
    close(flat.unflatten(1, (2, -1))[0], y)


def test_a_level_of_its_own_in_chunks() -> None:
    """One that is no memory of pairs, and that keeps what is pending in the machine's way."""

    class Sums(momentum):
        @property
        def chunk_size(self) -> int:
            return 3

        def chunk_step(self, q, k, v, gates, live, state, signal):  # type: ignore[no-untyped-def]
            outer = (v[:, :, None] * k[:, None, :] * live[:, None, None]).cumsum(0) + state["momentum"]
            return (outer @ q[..., None])[..., 0], {**state, "momentum": outer[-1]}

    level = dataclasses.replace(Sums(1.0))
    given = inputs(momentum())
    state = begun(level, given, 5)
    assert state["pending"]["k"].shape[2] == 2
    tokens, _ = parts_of(momentum(), given, slice(5, 9))
    plain, _ = run(linear_attention(), *(x[:, :5] for x in (given["q"], given["k"], given["v"])))[1], None
    close(
        run(level, *tokens, state=state, learn=False)[0],
        run(linear_attention(), *tokens, state=plain, learn=False)[0],
    )
