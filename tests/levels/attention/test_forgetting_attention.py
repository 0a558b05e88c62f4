"""Forgetting attention against loops, rows alone, and its own pieces."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import nestopt
from nestopt.core import Gate, gates_of, scan
from nestopt.core.memories import Window
from nestopt.core.retentions import Decay, Keep
from nestopt.core.tree import leaves
from nestopt.levels import attention, forgetting_attention
from nestopt.levels.attention import forgetting
from nestopt.ops import run

F64 = torch.float64


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of few tokens."""
    monkeypatch.setattr(forgetting, "BLOCK", 4)


def twin(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, window: int | None) -> Tensor:
    """One query at a time: every pair's weight is exp of its score times each later token's α."""
    y = torch.zeros(*q.shape[:3], v.shape[-1], dtype=F64)
    group = q.shape[2] // k.shape[2]
    for b, t, h in itertools.product(*map(range, q.shape[:3])):
        weights, values = [], []
        for s in range(0 if window is None else max(0, t + 1 - window), t + 1):
            left = alpha[b, s + 1 : t + 1, h].prod()
            weights.append(left * ((q[b, t, h] * k[b, s, h // group]).sum() / math.sqrt(q.shape[-1])).exp())
            values.append(v[b, s, h // group])
        total = torch.stack(weights)
        y[b, t, h] = (total[:, None] * torch.stack(values)).sum(0) / total.sum()
    return y


def inputs(length: int = 11, kv_heads: int = 3) -> list[Tensor]:
    sizes = ((3, 4), (kv_heads, 4), (kv_heads, 5))
    given = [torch.randn(2, length, heads, dim, dtype=F64, requires_grad=True) for heads, dim in sizes]
    return [*given, torch.rand(2, length, 3, dtype=F64, requires_grad=True)]


def call(level: nestopt.Level, given: list[Tensor], part: slice = slice(None), **options) -> tuple[Tensor, dict]:  # type: ignore[no-untyped-def, type-arg]
    q, k, v, alpha = (x[:, part] for x in given)
    return run(level, q, k, v, gates={"retention.keep": alpha}, **options)


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_equals_a_loop_with_every_gradient(window: int | None, kv_heads: int) -> None:
    given = inputs(kv_heads=kv_heads)
    level = forgetting_attention(memory=Window(window))
    assert nestopt.ops.fast_form(level) == "forgetting_attention"
    y, state = call(level, given)
    true = twin(*given, window)
    torch.testing.assert_close(y, true, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(y)
    mine, right = (torch.autograd.grad((weight * out).sum(), given, materialize_grads=True) for out in (y, true))
    torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-10)
    assert state["level"]["memory"]["keys"].shape == (2, kv_heads, min(window or 11, 11), 4)


@pytest.mark.parametrize("level", [forgetting_attention(), forgetting_attention(memory=Window(3))])
def test_equals_the_reference_machine_which_may_go_on_with_its_states(level: nestopt.Level) -> None:
    given = inputs()
    q, k, v, alpha = given
    slow = scan(level, q, k, v, gates={"retention.keep": alpha})
    y, middle = call(level, given, slice(0, 5))
    rest, end = scan(level, q[:, 5:], k[:, 5:], v[:, 5:], gates={"retention.keep": alpha[:, 5:]}, state=middle)
    for mine in (call(level, given), (torch.cat([y, rest], 1), end)):
        torch.testing.assert_close(mine[0], slow[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dict(leaves(mine[1])), dict(leaves(slow[1])), rtol=1e-10, atol=1e-10)
    asked = run(level, q, k, v, state=slow[1], learn=False)[0]
    torch.testing.assert_close(asked, scan(level, q, k, v, state=slow[1], learn=False)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_pieces_padding_and_packing_are_the_rows_alone(window: int | None, kv_heads: int) -> None:
    given, level = inputs(13, kv_heads), forgetting_attention(memory=Window(window))
    whole, _ = call(level, given)
    ys, state = [], None
    for part in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 13)):
        y, state = call(level, given, part, state=state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=1e-10, atol=1e-10)
    mask = torch.rand(2, 13) < 0.6
    mask[:, 3] = True
    first, state = call(level, given, slice(0, 6), mask=mask[:, :6])
    second, state = call(level, given, slice(6, 9), mask=mask[:, 6:9], state=state)
    third, _ = call(level, given, slice(9, 13), state=state)
    y, seen = torch.cat([first, second, third], 1), torch.cat([mask[:, :9], torch.ones(2, 4, dtype=torch.bool)], 1)
    for n in range(2):
        alone, _ = call(level, [x[n : n + 1, seen[n]] for x in given])
        torch.testing.assert_close(y[n : n + 1, seen[n]], alone, rtol=1e-10, atol=1e-10)
    ends = [0, 3, 4, 13]
    y, _ = call(level, [x[:1] for x in given], cu_seqlens=ends)
    for a, b in itertools.pairwise(ends):
        alone, _ = call(level, [x[:1] for x in given], slice(a, b))
        torch.testing.assert_close(y[:, a:b], alone, rtol=1e-10, atol=1e-10)


def test_without_forgetting_it_is_attention_and_at_0_each_token_is_alone() -> None:
    q, k, v, _ = inputs()
    plain, _ = run(attention(), q, k, v)
    for level in (forgetting_attention(retention=Keep()), forgetting_attention(retention=Decay(1.0))):
        torch.testing.assert_close(run(level, q, k, v)[0], plain, rtol=1e-10, atol=1e-10)
    none = torch.zeros(2, 11, 3, dtype=F64, requires_grad=True)
    y, _ = run(forgetting_attention(), q, k, v, gates={"retention.keep": none})
    torch.testing.assert_close(y, v, rtol=1e-10, atol=1e-10)
    assert torch.autograd.grad(y.sum(), none)[0].isfinite().all()


def test_long_streams_lose_no_digits_in_float32() -> None:
    q, k, v = (torch.randn(1, 3000, 1, 8) for _ in range(3))
    alpha = torch.rand(1, 3000, 1) * 0.1
    given = {"retention.keep": alpha}
    y, _ = run(forgetting_attention(), q, k, v, gates=given)
    last = slice(2900, 3000)  # all that 3,000 tokens leave of weights
    true, _ = run(
        forgetting_attention(),
        *(x[:, last].double() for x in (q, k, v)),
        gates={"retention.keep": alpha[:, last].double()},
    )
    torch.testing.assert_close(y[:, last][:, 50:].double(), true[:, 50:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes(dtype: torch.dtype) -> None:
    given = [x.detach() for x in inputs(40)]
    q, k, v = (x.to(dtype) for x in given[:3])
    y, state = run(forgetting_attention(), q, k, v, gates={"retention.keep": given[3].float()})
    assert y.dtype == state["level"]["memory"]["keys"].dtype == dtype
    assert state["level"]["memory"]["faded"].dtype == torch.float32
    assert float((y.double() - twin(*given, None)).abs().max()) < 4e-2


def test_a_layer_has_no_rotary_positions_and_learns_when_to_forget() -> None:
    layer = nestopt.layer(forgetting_attention(), 8, 4, kv_heads=2).double()
    assert layer.rope == 0
    assert list(gates_of(layer.level)) == ["retention.keep"]
    x = torch.randn(2, 9, 8, dtype=F64)
    y, state = layer(x)
    assert state["memory"]["level"]["memory"]["faded"].shape == (2, 4, 9)
    y.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0, 0]]).bool()
    padded, state = layer(x, mask=mask)
    torch.testing.assert_close(padded[0, 2:], layer(x[:1, 2:])[0][0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer(x, layer.reset(state, [1]))[0][1], y[1], rtol=1e-10, atol=1e-10)


def test_on_gradients_a_constant_share_weighs_what_is_attended_to() -> None:
    level = forgetting_attention(memory=Window(2), retention=Decay(0.25))
    w = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = nestopt.optimizer([w], level, lr=1.0, weight_decay=0.0)
    grads = [torch.randn(2, 3) for _ in range(3)]
    for grad in grads:
        before, w.grad = w.detach().clone(), grad.clone()
        optimizer.step()
    unit = [g.flatten() / g.square().mean().sqrt() for g in grads]
    weights = torch.stack([0.25 * (unit[2] @ unit[1] / 6**0.5).exp(), (unit[2] @ unit[2] / 6**0.5).exp()])
    wanted = (weights[0] * grads[1] + weights[1] * grads[2]) / weights.sum()
    torch.testing.assert_close(before - w.detach(), wanted)


def test_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"forgetting_attention: lr=0.5 is not allowed: the memory window appends"):
        forgetting_attention(lr=0.5)
    with pytest.raises(ValueError, match=r"attention: retention=.* is not allowed: the memory window"):
        attention(retention=Decay(Gate(0.9)))
