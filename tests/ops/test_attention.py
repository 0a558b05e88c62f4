from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nestopt.ops import attention

F64 = torch.float64


def twin(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """softmax(q_t k_sᵀ / √D_k) v_s over the last `window` tokens s <= t, one token at a time."""
    ys = []
    for t in range(q.shape[1]):
        first = 0 if window is None else max(0, t + 1 - window)
        scores = torch.einsum("bhk,bshk->bhs", q[:, t], k[:, first : t + 1]) / math.sqrt(q.shape[-1])
        ys.append(torch.einsum("bhs,bshv->bhv", scores.softmax(-1), v[:, first : t + 1]))
    return torch.stack(ys, 1)


def inputs(length: int, dim_v: int = 5) -> list[Tensor]:
    return [torch.randn(2, length, 3, dim, dtype=F64, requires_grad=True) for dim in (4, 4, dim_v)]


@pytest.mark.parametrize("window", [None, 1, 3, 9, 20])
@pytest.mark.parametrize("length", [1, 9])
def test_equals_the_definition_with_every_gradient(length: int, window: int | None) -> None:
    q, k, v = inputs(length)
    y, _ = attention(q, k, v, window=window)
    true = twin(q, k, v, window)
    torch.testing.assert_close(y, true, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(true)
    fast, slow = (torch.autograd.grad((weight * out).sum(), [q, k, v]) for out in (y, true))
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-10)


@given(cuts=st.lists(st.integers(1, 11), max_size=4, unique=True), window=st.none() | st.integers(1, 14))
def test_any_pieces_are_the_whole(cuts: list[int], window: int | None) -> None:
    q, k, v = inputs(12)
    whole, end = attention(q, k, v, window=window)
    state, ys, edges = None, [], [0, *sorted(cuts), 12]
    for a, b in itertools.pairwise(edges):
        y, state = attention(q[:, a:b], k[:, a:b], v[:, a:b], window=window, state=state)
        ys.append(y)
    torch.testing.assert_close((torch.cat(ys, 1), state), (whole, end), rtol=1e-10, atol=1e-10)


def test_state_is_the_last_pairs() -> None:
    q, k, v = inputs(8)
    _, state = attention(q, k, v, window=3)
    torch.testing.assert_close(state, {"keys": k[:, -3:].transpose(1, 2), "values": v[:, -3:].transpose(1, 2)})


def test_sequences_do_not_meet_and_no_token_sees_a_later_one() -> None:
    q, k, v = (x.detach() for x in inputs(8))
    y, _ = attention(q, k, v)
    k2, v2 = k.clone(), v.clone()
    k2[1], v2[1], k2[0, 5:], v2[0, 5:] = 1.0, 2.0, 3.0, 4.0
    changed, _ = attention(q, k2, v2)
    torch.testing.assert_close(changed[0, :5], y[0, :5], rtol=0, atol=1e-14)
    assert not torch.isclose(changed[0, 5:], y[0, 5:]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 5, 3)}, r"k has the shape \[2, 5, 3\]"),
        ({"v": torch.zeros(1, 5, 3, 4)}, r"v has the shape \[1, 5, 3, 4\] and q \[2, 5, 3, 4\]"),
        ({"window": 0}, "window=0"),
        ({"state": {"keys": torch.zeros(2, 3, 1, 4)}}, r"state has the keys \['keys'\]"),
        (
            {"state": {"keys": torch.zeros(2, 3, 1, 4), "values": torch.zeros(2, 3, 2, 4)}},
            r"state\['values'\] has the shape \[2, 3, 2, 4\]",
        ),
        (
            {"state": {"keys": torch.zeros(2, 4, 1, 4), "values": torch.zeros(2, 4, 1, 4)}},
            r"state\['keys'\] has the shape \[2, 4, 1, 4\] and this call's keys .* \[2, 3, 5, 4\]",
        ),
        ({name: torch.zeros(2, 0, 3, 4) for name in "qkv"}, "no token"),
    ],
)
def test_says_what_does_not_fit(change: dict[str, object], message: str) -> None:
    arguments = {**{name: torch.zeros(2, 5, 3, 4) for name in "qkv"}, **change}
    with pytest.raises(ValueError, match=message):
        attention(**arguments)  # type: ignore[arg-type]
