from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nestopt.ops import linear_attention

F64 = torch.float64


def twin(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, read: str) -> tuple[Tensor, Tensor]:
    """M_t = a_t M_{t-1} + v_t k_tᵀ, y_t = M_t q_t, to the letter."""
    ys, m = [], state
    for t in range(q.shape[1]):
        new = decay[:, t, :, None, None] * m + torch.einsum("bhv,bhk->bhvk", v[:, t], k[:, t])
        ys.append(torch.einsum("bhvk,bhk->bhv", new if read == "after" else m, q[:, t]))
        m = new
    return torch.stack(ys, 1), m


def inputs(batch: int, length: int, heads: int, dim_k: int, dim_v: int, dtype: torch.dtype = F64) -> list[Tensor]:
    shapes = [(batch, length, heads, dim_k)] * 2 + [(batch, length, heads, dim_v), (batch, heads, dim_v, dim_k)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def full_decay(decay: float | Tensor | None, like: Tensor) -> Tensor:
    ones = torch.ones(like.shape[:3], dtype=F64)
    return ones if decay is None else ones * decay


def assert_equal_with_gradients(fast: tuple[Tensor, ...], slow: tuple[Tensor, ...], leaves: list[Tensor]) -> None:
    weights = [torch.randn_like(out) for out in slow]
    for mine, true in zip(fast, slow, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)
    one, two = (
        torch.autograd.grad(sum((w * o).sum() for w, o in zip(weights, outs, strict=True)), leaves)  # type: ignore[arg-type]
        for outs in (fast, slow)
    )
    for mine, true in zip(one, two, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("kind", ["none", "float", "heads", "tokens"])
@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (13, 4), (16, 4), (5, 64), (7, 1)])
def test_equals_the_recurrence_with_every_gradient(kind: str, length: int, chunk: int, read: str) -> None:
    q, k, v, state = inputs(2, length, 3, 4, 5)
    decay = {
        "none": None,
        "float": 0.8,
        "heads": torch.rand(3, dtype=F64),
        "tokens": torch.rand(2, length, 3, dtype=F64),
    }[kind]
    leaves = [x.requires_grad_() for x in (q, k, v, state, decay) if isinstance(x, Tensor)]
    fast = linear_attention(q, k, v, decay=decay, state=state, chunk=chunk, read=read)  # type: ignore[arg-type]
    assert_equal_with_gradients(fast, twin(q, k, v, full_decay(decay, q), state, read), leaves)


@given(
    length=st.integers(1, 12),
    chunk=st.integers(1, 16),
    dims=st.tuples(*[st.integers(1, 4)] * 4),
    seed=st.integers(0, 9),
)
def test_any_shape_and_chunk(length: int, chunk: int, dims: tuple[int, int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    batch, heads, dim_k, dim_v = dims
    q, k, v, state = inputs(batch, length, heads, dim_k, dim_v)
    decay = torch.rand(batch, length, heads, dtype=F64)
    fast = linear_attention(q, k, v, decay=decay, state=state, chunk=chunk)
    torch.testing.assert_close(fast, twin(q, k, v, decay, state, "after"), rtol=1e-10, atol=1e-10)


def test_starts_at_zero() -> None:
    q, k, v, state = inputs(2, 9, 2, 3, 3)
    torch.testing.assert_close(linear_attention(q, k, v, chunk=4), linear_attention(q, k, v, state=state * 0, chunk=4))


@pytest.mark.parametrize("least", [1e-6, 0.0])
def test_float32_is_finite_and_right_where_memories_are_wiped(least: float) -> None:
    q, k, v, state = inputs(1, 200, 2, 8, 8, torch.float32)
    decay = torch.where(torch.rand(1, 200, 2) < 0.3, least, 0.999).requires_grad_()
    y, end = linear_attention(q, k, v, decay=decay, state=state)
    true, true_end = twin(*(x.double() for x in (q, k, v, decay, state)), "after")  # type: ignore[arg-type]
    torch.testing.assert_close((y, end), (true.float(), true_end.float()), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(y.square().sum(), decay, retain_graph=True)
    (true_gradient,) = torch.autograd.grad(true.square().sum(), decay)
    assert gradient.isfinite().all()
    if least > 0:  # at exactly 0 a logarithm has no gradient, and it is 0 there
        torch.testing.assert_close(gradient, true_gradient, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("cut", [1, 6, 12])
def test_two_pieces_are_the_whole(cut: int) -> None:
    q, k, v, state = inputs(2, 13, 2, 3, 4)
    decay = torch.rand(2, 13, 2, dtype=F64)
    whole, end = linear_attention(q, k, v, decay=decay, state=state, chunk=5)
    first, middle = linear_attention(q[:, :cut], k[:, :cut], v[:, :cut], decay=decay[:, :cut], state=state, chunk=5)
    second, last = linear_attention(q[:, cut:], k[:, cut:], v[:, cut:], decay=decay[:, cut:], state=middle, chunk=5)
    torch.testing.assert_close((torch.cat([first, second], 1), last), (whole, end))


def test_sequences_do_not_meet_and_no_token_sees_a_later_one() -> None:
    q, k, v, _ = inputs(2, 11, 2, 3, 4)
    decay = torch.rand(2, 11, 2, dtype=F64)
    y, _ = linear_attention(q, k, v, decay=decay, chunk=4)
    others = [x.clone() for x in (q, k, v, decay)]
    for x in others:
        x[1] = torch.rand_like(x[1])
        x[0, 6:] = torch.rand_like(x[0, 6:])
    changed, _ = linear_attention(*others[:3], decay=others[3], chunk=4)
    torch.testing.assert_close(changed[0, :6], y[0, :6], rtol=0, atol=0)
    assert not torch.isclose(changed[0, 6:], y[0, 6:]).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_remember_in_float32(dtype: torch.dtype) -> None:
    q, k, v, _ = inputs(1, 300, 2, 8, 8, dtype)
    y, state = linear_attention(q, k, v, decay=0.999)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    _, true = twin(*(x.double() for x in (q, k, v)), full_decay(0.999, q), torch.zeros(1, 2, 8, 8, dtype=F64), "after")  # type: ignore[arg-type]
    torch.testing.assert_close(state, true.float(), rtol=1e-4, atol=1e-3)


def test_autocast_does_not_shorten_the_memory() -> None:
    q, k, v, _ = inputs(1, 70, 2, 8, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = linear_attention(q, k, v)
    torch.testing.assert_close((y, state), linear_attention(q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 3)}, r"q has the shape \[2, 5, 3\]"),
        ({"k": torch.zeros(2, 5, 3, 7)}, r"k has the shape \[2, 5, 3, 7\] and q \[2, 5, 3, 4\]"),
        ({"v": torch.zeros(2, 6, 3, 4)}, r"v has the shape \[2, 6, 3, 4\] and q \[2, 5, 3, 4\]"),
        ({"decay": torch.ones(2, 5)}, r"decay has the shape \[2, 5\] and q \[2, 5, 3, 4\]"),
        ({"decay": -0.1}, r"decay=-0\.1"),
        ({"decay": float("nan")}, r"decay=nan"),
        ({"state": torch.zeros(2, 3, 4, 9)}, r"state has the shape \[2, 3, 4, 9\].*\[2, 3, 6, 4\]"),
        ({"chunk": 0}, "chunk=0"),
        ({"read": "during"}, "read='during'"),
        ({name: torch.zeros(2, 0, 3, 4) for name in "qkv"}, "no token"),
    ],
)
def test_says_what_does_not_fit(change: dict[str, object], message: str) -> None:
    arguments = {"q": torch.zeros(2, 5, 3, 4), "k": torch.zeros(2, 5, 3, 4), "v": torch.zeros(2, 5, 3, 6), **change}
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments)  # type: ignore[arg-type]
