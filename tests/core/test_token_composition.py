"""Compositions on tokens: parts by their own forms, against loops written from what `compose` says."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import nestopt
from nestopt import Gate, chain, nest, parallel
from nestopt.core.level import Level
from nestopt.core.memories import Mlp, Window
from nestopt.core.part import FieldError
from nestopt.core.retentions import Decay
from nestopt.core.token_choice import make_form, scan
from nestopt.core.token_form import FormSetting
from nestopt.core.tree import leaves
from nestopt.levels import adam, attention, deltanet, gated_linear, gd, linear_attention, momentum, retnet, titans
from nestopt.nn import SequenceMemory, cat, index
from nestopt.ops import run

F64 = torch.float64
B, T, H, D = 2, 11, 3, 4


def tokens(length: int = T) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(B, length, H, D, dtype=F64) / 2 for _ in range(3))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def starts(level: Level) -> dict[str, Tensor]:
    each = [level.learned_start(D, D) for _ in range(H)]
    return {name: torch.stack([one[name].to(F64) for one in each]) for name in each[0]}


def under(flat: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key[len(name) + 1 :]: x for key, x in flat.items() if key.startswith(name + ".")}


def same(a: object, b: object, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


MIXED = {
    "matrices": (retnet(), deltanet()),
    "chunks of several lengths": (titans(chunk=3), titans(chunk=4, read="chunk"), gated_linear()),
    "with attention": (attention(memory=Window(4)), deltanet(period=2)),
    "of gradients, too": (momentum(0.5), adam(), retnet()),
}


@pytest.mark.parametrize("name", MIXED)
def test_parallel_is_the_sum_of_its_parts_with_every_gradient(name: str) -> None:
    weights = [0.5, -2.0, 3.0][: len(MIXED[name])]
    level = parallel(*MIXED[name], weights=weights)
    (q, k, v), start = tokens(), starts(level)
    y, _ = run(level, q, k, v, learned=start)
    parts = [
        weight * run(part, q, k, v, learned=under(start, key))[0]
        for weight, (key, part) in zip(weights, level.levels.items(), strict=True)
    ]
    same(y, sum(parts))
    probe = torch.randn_like(y)
    own, wanted = (torch.autograd.grad((x * probe).sum(), (q, k, v)) for x in (y, sum(parts)))
    same(own, wanted, 1e-9)


@pytest.mark.parametrize("name", MIXED)
def test_a_chain_shows_each_part_what_the_one_before_answers_at_its_keys(name: str) -> None:
    level = chain(*MIXED[name])
    (q, k, v), start = tokens(), starts(level)
    y, _ = run(level, q, k, v, learned=start)
    shown, last = v, list(level.levels)[-1]
    for key, part in level.levels.items():
        shown, _ = run(part, q if key == last else k, k, shown, learned=under(start, key))
    same(y, shown)
    probe = torch.randn_like(y)
    own, wanted = (torch.autograd.grad((x * probe).sum(), (q, k, v)) for x in (y, shown))
    same(own, wanted, 1e-9)


@pytest.mark.parametrize("kind", [parallel, chain])
def test_gates_of_parts_have_dotted_paths(kind) -> None:  # type: ignore[no-untyped-def]
    level = kind(fast=deltanet(), slow=gated_linear(retention=Decay(Gate(0.9))))
    q, k, v = tokens()
    gates = {
        "levels.fast.lr": torch.rand(B, T, H, dtype=F64),
        "levels.slow.retention.keep": torch.rand(B, T, H, dtype=F64),
    }
    y, _ = run(level, q, k, v, gates=gates)
    fast = run(level.levels["fast"], q if kind is parallel else k, k, v, gates={"lr": gates["levels.fast.lr"]})[0]
    slow = run(
        level.levels["slow"],
        q,
        k,
        v if kind is parallel else fast,
        gates={"retention.keep": gates["levels.slow.retention.keep"]},
    )[0]
    same(y, fast + slow if kind is parallel else slow)


def test_a_chain_of_levels_of_gradients_is_one_direction() -> None:
    level = chain(momentum(0.5), momentum(0.9))
    q, k, v = tokens(4)
    first = second = torch.zeros(B, H, D, D, dtype=F64)
    ys = []
    for t in range(4):
        first = 0.5 * first + v[:, t, :, :, None] * k[:, t, :, None, :]
        second = 0.9 * second + first
        ys.append((second @ q[:, t, :, :, None])[..., 0])
    same(run(level, q, k, v)[0], torch.stack(ys, 1))


def loop_nest(q: Tensor, k: Tensor, v: Tensor, eta: float, beta: float, context: int, delta: bool) -> Tensor:
    """A matrix that learns by sums or by the delta rule; each context its start follows with momentum."""
    begins = m = torch.zeros(B, H, D, D, dtype=F64)
    kept, ys = torch.zeros_like(m), []
    for t in range(q.shape[1]):
        key, value = k[:, t, :, :, None], v[:, t, :, :, None]
        m = m + eta * (value - m @ key) @ key.mT if delta else 0.9 * m + value @ key.mT
        ys.append((m @ q[:, t, :, :, None])[..., 0])
        if (t + 1) % context == 0:
            kept = beta * kept + (begins - m)
            begins = m = begins - kept
    return torch.stack(ys, 1)


@pytest.mark.parametrize("context", [1, 3, 4, 11, 20])
@pytest.mark.parametrize("delta", [True, False])
def test_nest_learns_where_its_inner_level_starts(delta: bool, context: int) -> None:
    inner = deltanet(lr=0.7) if delta else momentum(0.9)
    level = nest(outer=momentum(0.5, period=context), inner=inner)
    q, k, v = tokens()
    y, _ = run(level, q, k, v)
    wanted = loop_nest(q, k, v, 0.7, 0.5, context, delta)
    same(y, wanted)
    probe = torch.randn_like(y)
    own, other = (torch.autograd.grad((x * probe).sum(), (q, k, v), materialize_grads=True) for x in (y, wanted))
    same(own, other, 1e-9)


LEVELS = {
    "parallel": parallel(retnet(), titans(chunk=3, read="chunk"), attention(memory=Window(4))),
    "chain": chain(deltanet(), titans(chunk=3), momentum(0.9)),
    "nest": nest(outer=momentum(0.5, period=6), inner=titans(chunk=3), step_size=0.5),
    "nest of a parallel": nest(outer=gd(period=4), inner=parallel(retnet(), deltanet())),
    "parallel of a nest": parallel(nest(outer=momentum(0.5, period=2), inner=deltanet()), chain(retnet(), gd())),
}


@pytest.mark.parametrize("name", LEVELS)
def test_streaming_is_parallel_and_by_single_tokens(name: str) -> None:
    layer = SequenceMemory(LEVELS[name], 8, 2).double()
    x = torch.randn(2, 17, 8, dtype=F64)
    whole, end = layer(x)
    first, state = layer(x[:, :4])
    ys = [first]
    for t in range(4, 9):
        y, state = layer.step(x[:, t], state)
        ys.append(y[:, None])
    second, state = layer(x[:, 9:], state)
    same(torch.cat([*ys, second], 1), whole)
    same(dict(leaves(state)), dict(leaves(end)))


@pytest.mark.parametrize("name", LEVELS)
def test_sequences_do_not_touch_each_other(name: str) -> None:
    layer = SequenceMemory(LEVELS[name], 8, 2).double()
    x = torch.randn(3, 13, 8, dtype=F64)
    y, state = layer(x)
    same(layer(x[1:2])[0], y[1:2])
    apart = cat([index(state, [2]), index(state, [0])])
    more = torch.randn(2, 5, 8, dtype=F64)
    together, _ = layer(more, state=apart)
    same(together[1:], layer(more[1:], index(state, [0]))[0])
    anew = layer.reset(state, [1])
    again = torch.randn(3, 1, 8, dtype=F64)
    same(layer(again, anew)[0][1:2], layer(again[1:2])[0])
    same(layer(again, anew)[0][:1], layer(again, state)[0][:1])


@pytest.mark.parametrize("name", LEVELS)
def test_padding_and_packing(name: str) -> None:
    layer = SequenceMemory(LEVELS[name], 8, 2).double()
    a, b = torch.randn(1, 9, 8, dtype=F64), torch.randn(1, 5, 8, dtype=F64)
    packed, _ = layer(torch.cat([a, b], 1), cu_seqlens=[0, 9, 14])
    same(packed, torch.cat([layer(a)[0], layer(b)[0]], 1))


@pytest.mark.parametrize("name", LEVELS)
def test_reading_changes_nothing(name: str) -> None:
    layer = SequenceMemory(LEVELS[name], 8, 2, conv=0).double()
    _, state = layer(torch.randn(2, 7, 8, dtype=F64))
    x = torch.randn(2, 3, 8, dtype=F64)
    asked, kept = layer(x, state, learn=False)
    assert asked.isfinite().all()
    same(dict(leaves(kept)), dict(leaves(state)))
    same(torch.stack([layer.step(x[:, t], state, learn=False)[0] for t in range(3)], 1), asked)


def test_everything_is_learned() -> None:
    layer = SequenceMemory(LEVELS["parallel"], 8, 2)
    layer(torch.randn(2, 9, 8))[0].square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()} == set()
    assert any(name.startswith("start.titans-") for name, _ in layer.named_parameters())


def test_the_reference_machine_runs_every_part() -> None:
    level = parallel(retnet(), titans(chunk=3))
    (q, k, v), start = tokens(), starts(level)
    same(scan(level, q, k, v, learned=start)[0], run(level, q, k, v, learned=start)[0])
    form = make_form(level, FormSetting(q.device, F64, reference=True))
    assert [part.choice.name for part in form.parts.values()] == ["reference"] * 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("level", "message"),
    [
        (parallel(retnet(), deltanet(), period=4), "parallel: period=4 is not allowed on tokens"),
        (chain(retnet(), deltanet(), period=4), "chain: period=4 is not allowed on tokens"),
        (nest(gd(period=4), titans(chunk=3)), "its period must be a multiple of the inner level's 3 tokens of a chunk"),
        (nest(gd(period=4), deltanet(), period=2), "nest: period=2 is not allowed on tokens"),
    ],
)
def test_refuses_in_words(level: Level, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        SequenceMemory(level, 8, 2)


def test_nest_of_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="keeps its pairs"):
        SequenceMemory(nest(gd(period=4), attention()), 8, 2)


def test_layers_of_compositions_ask_for_what_their_parts_ask_for() -> None:
    assert SequenceMemory(parallel(linear_attention(), deltanet()), 8, 2).qk_norm
    assert not SequenceMemory(chain(momentum(), linear_attention()), 8, 2).qk_norm
    assert SequenceMemory(nest(gd(period=2), nestopt.levels.oja()), 8, 2).v_norm


def test_states_of_memories_on_mlps_are_of_the_width_of_tokens() -> None:
    layer = nestopt.layer(parallel(titans(memory=Mlp(hidden=5)), retnet()), 8, 2)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves(layer.init_state(1)["memory"]["level"])}
    assert shapes["titans.level.memory.W2"] == (1, 2, 5, 4)
    assert shapes["retnet.level.memory.m"] == (1, 2, 4, 4)
