"""What every operation on tokens does to its arguments first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nestopt.core.padding import from_places, places, to_places
from nestopt.core.token_batch import TokenBatch, check_finite, check_range, check_state, per_token, run_unpacked
from tests.levels.matrix.twins import F64


def qkv(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, 5, 3, dim, dtype=dtype) for dim in (4, 4, 6)]


@pytest.mark.parametrize(
    ("dtype", "inner"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32), (F64, F64)],
)
def test_tokens_are_laid_out_in_a_dtype_to_compute_in_and_answered_in_their_own(
    dtype: torch.dtype, inner: torch.dtype
) -> None:
    q, k, v = qkv(dtype)
    x = TokenBatch.of(q, k, v)
    assert x.q.dtype == x.k.dtype == x.v.dtype == x.dtype == inner
    torch.testing.assert_close([x.q, x.k, x.v], [y.transpose(1, 2).to(inner) for y in (q, k, v)], rtol=0, atol=0)
    assert x.answer(x.v).dtype == dtype
    assert torch.equal(x.answer(x.v), v)


def test_padding_and_what_is_not_finite_are_not_live() -> None:
    q, k, v = qkv()
    gate = torch.ones(2, 5, 3)
    k[0, 1, 2, 0], v[1, 0, 1, 3], gate[1, 3, 0] = torch.nan, -torch.inf, torch.inf
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 1] = mask[0, 4] = False
    inner = per_token("decay", gate, q, torch.float32)
    x = TokenBatch.of(q, k, v, mask, inner)
    live = torch.ones(2, 3, 5, dtype=torch.bool)
    live[0, :, 1] = live[0, :, 4] = live[1, 1, 0] = live[1, 0, 3] = False
    assert torch.equal(x.active, live)
    assert not any(y[~live].any() for y in (x.q, x.k, x.v))
    wrong = ~live & mask[:, None]
    assert torch.equal(~x.finite, wrong)  # padding is not
    assert torch.equal(x.answer(torch.zeros(2, 3, 5, 6)).isnan().any(-1).transpose(1, 2), wrong)
    torch.testing.assert_close(x.gate(inner, 0.5), torch.where(live, 1.0, 0.5))


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5), torch.full((3,), 0.5), torch.full((2, 5, 3), 0.5)])
def test_gates_of_every_shape(value: Any) -> None:
    gate = per_token("decay", value, qkv()[0], F64)
    assert gate.dtype == F64
    assert torch.equal(gate.expand(2, 3, 5), torch.full((2, 3, 5), 0.5, dtype=F64))


def test_says_what_gate_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"decay has the shape \[3, 5\] and q \[2, 5, 3, 4\]"):
        per_token("decay", torch.ones(3, 5), qkv()[0], F64)


def test_ranges_are_open_or_closed() -> None:
    check_range("x", torch.tensor([0.0, 1.0]), 0, 1)
    check_range("x", 0.5, 0, 1, closed="()")
    with pytest.raises(ValueError, match=r"x\[1\] is 1; it must lie in \[0, 1\)"):
        check_range("x", torch.tensor([0.0, 1.0]), 0, 1, closed="[)")
    with pytest.raises(ValueError, match=r"x is 0; it must lie in \(0, 1\]"):
        check_range("x", 0, 0, 1, closed="(]")
    with pytest.raises(ValueError, match=r"x is nan"):
        check_range("x", float("nan"), 0, 1)


def test_what_is_not_finite_is_named_with_its_place_and_count() -> None:
    check_finite(a=torch.zeros(2), b=None)
    with pytest.raises(ValueError, match=r"b\[1, 0\] is nan; 2 such numbers are in b"):
        check_finite(a=torch.zeros(2), b=torch.tensor([[0.0, 1.0], [torch.nan, torch.inf]]))


def test_states() -> None:
    assert check_state("state", torch.zeros(2, 3), (2, 3), F64).dtype == F64
    with pytest.raises(ValueError, match=r"state has the shape \[2, 3\].*must be \[2, 4\]"):
        check_state("state", torch.zeros(2, 3), (2, 4), F64)
    with pytest.raises(ValueError, match=r"state is torch\.bool"):
        check_state("state", torch.zeros(2, 3).bool(), (2, 3), F64)


def test_packed_hands_on_rows_with_their_gates_and_state() -> None:
    q, k, v = (torch.randn(1, 7, 2, dim, requires_grad=True) for dim in (3, 3, 4))
    gate, state, seen = torch.rand(1, 7, 2), torch.zeros(3, 1), {}

    def run(q: Any, k: Any, v: Any, **arguments: Any) -> Any:
        seen.update(arguments, k=k)
        return v * 2, arguments["state"]

    y, end = run_unpacked(run, q, k, v, torch.tensor([0, 2, 3, 7]), decay=gate, lr=0.5, state=state)
    assert end is state
    assert torch.equal(y, v * 2)
    assert torch.equal(seen["mask"].sum(1), torch.tensor([2, 1, 4]))
    assert torch.equal(seen["decay"][seen["mask"]], gate[0])
    assert torch.equal(seen["k"][seen["mask"]], k[0])
    assert seen["lr"] == 0.5
    (gradient,) = torch.autograd.grad(y.sum(), v)
    assert torch.equal(gradient, torch.full_like(v, 2))


@pytest.mark.parametrize("ends", [[0], [0, 6], [1, 7], [0, 3, 3, 7], [0, 5, 4, 7], [0, 2.5, 7]])
def test_says_what_ends_are_not_allowed(ends: list[float]) -> None:
    q, k, v = (torch.randn(1, 7, 2, 3) for _ in range(3))
    with pytest.raises(ValueError, match=r"cu_seqlens=\[.*rising whole numbers from 0 to the 7 tokens"):
        run_unpacked(lambda *_: None, q, k, v, torch.tensor(ends))  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=r"cu_seqlens=\[.*rising whole numbers from 0 to the 7 tokens"):
        run_unpacked(lambda *_: None, q, k, v, ends)  # type: ignore[arg-type,return-value]


def test_packed_takes_one_row_and_no_mask() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"one row.*\[2, 5, 3, 4\]"):
        run_unpacked(lambda *_: None, q, k, v, [0, 5])  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="without a mask"):
        run_unpacked(lambda *_: None, q[:1], k[:1], v[:1], [0, 5], mask=torch.ones(1, 5).bool())  # type: ignore[arg-type,return-value]


def test_padding_goes_to_the_front_and_back_again() -> None:
    live = torch.rand(2, 3, 9) < 0.6
    x = torch.randn(2, 3, 9, 2)
    place = places(live)
    moved = to_places(x, place)
    for b in range(2):
        for h in range(3):
            here = live[b, h]
            assert torch.equal(moved[b, h], torch.cat([x[b, h, ~here], x[b, h, here]]))
    assert torch.equal(from_places(moved, place), x)
