from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.utils._python_dispatch
import torch.utils.checkpoint
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


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("begun", [False, True])
def test_padding_anywhere_is_as_if_it_were_not_there(window: int | None, begun: bool) -> None:
    q, k, v = inputs(12)
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0]]).bool()
    state = attention(*inputs(4), window=window)[1] if begun else None
    filled = [torch.where(mask[..., None, None], x, 1e300) for x in (q, k, v)]
    y, end = attention(*filled, window=window, mask=mask, state=state)
    assert not y[~mask].any()
    weight = torch.randn_like(y)
    got = torch.autograd.grad((weight * y).sum(), [q, k, v])
    for n in range(2):
        short = [x[n : n + 1, mask[n]] for x in (q, k, v)]
        before = None if state is None else {name: x[n : n + 1] for name, x in state.items()}
        alone, pairs = attention(*short, window=window, state=before)
        torch.testing.assert_close(y[n : n + 1, mask[n]], alone, rtol=1e-10, atol=1e-10)
        for name in ("keys", "values"):
            kept = end[name][n : n + 1, :, end["mask"][n]]
            torch.testing.assert_close(kept, pairs[name], rtol=0, atol=0)
        wanted = torch.autograd.grad((weight[n : n + 1, mask[n]] * alone).sum(), [q, k, v])
        for mine, right in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine[n], right[n], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("window", [None, 2, 5])
def test_pieces_with_padding_are_the_whole(window: int | None) -> None:
    q, k, v = inputs(13)
    mask = torch.rand(2, 13) < 0.6
    whole, _ = attention(q, k, v, window=window, mask=mask)
    first, state = attention(q[:, :6], k[:, :6], v[:, :6], window=window, mask=mask[:, :6])
    second, state = attention(q[:, 6:10], k[:, 6:10], v[:, 6:10], window=window, mask=mask[:, 6:10], state=state)
    last = mask[:, 10:] | True  # without a mask, all are tokens
    whole_last, _ = attention(q, k, v, window=window, mask=torch.cat([mask[:, :10], last], 1))
    third, _ = attention(q[:, 10:], k[:, 10:], v[:, 10:], window=window, state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole[:, :10], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(third, whole_last[:, 10:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [None, 2])
def test_packed_sequences_are_each_alone(window: int | None) -> None:
    q, k, v = (x[:1] for x in inputs(14))
    ends = [0, 3, 4, 14]
    y, _ = attention(q, k, v, window=window, cu_seqlens=ends)
    for a, b in itertools.pairwise(ends):
        alone, _ = attention(q[:, a:b], k[:, a:b], v[:, a:b], window=window)
        torch.testing.assert_close(y[:, a:b], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("window", [None, 3])
def test_a_token_that_is_not_finite_is_a_pair_of_zeros_answered_with_nan(which: int, window: int | None) -> None:
    given = [x.detach().clone() for x in inputs(9)]
    given[which][0, 4, 1, 2] = torch.nan
    given = [x.requires_grad_() for x in given]
    y, state = attention(*given, window=window)
    wrong = torch.zeros(2, 9, 3, dtype=torch.bool)
    wrong[0, 4, 1] = True
    assert torch.equal(y.isnan().all(-1), wrong)
    assert torch.equal(y.isnan().any(-1), wrong)
    zeroed = [torch.where(wrong[..., None], 0.0, x) for x in given]
    true, pairs = attention(*zeroed, window=window)
    torch.testing.assert_close((y[~wrong], state), (true[~wrong], pairs))
    gradients = torch.autograd.grad(torch.where(y.isnan(), y * 3, y.square()).sum(), given)
    assert all(x.isfinite().all() for x in gradients)
    with pytest.raises(ValueError, match=rf"{'qkv'[which]}\[0, 4, 1, 2\] is nan"):
        attention(*given, window=window, validate=True)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [None, 16])
def test_short_dtypes(dtype: torch.dtype, bound: float, window: int | None) -> None:
    q, k, v = (x.detach().to(dtype) for x in inputs(130))
    y, state = attention(q, k, v, window=window)
    assert y.dtype == state["keys"].dtype == state["values"].dtype == dtype
    true = twin(q.double(), k.double(), v.double(), window)
    assert float((y.double() - true).abs().max()) < bound


def test_half_precision_numbers_with_a_large_sum_are_finite() -> None:
    q, k, v = (torch.full((1, 3, 1, 64), 6e4, dtype=torch.float16) for _ in range(3))
    assert attention(q * 0, k, v)[0].isfinite().all()


def test_a_window_takes_memory_as_the_number_of_tokens() -> None:
    """No tensor of the whole pass is as large as one number for each pair of tokens."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(
                largest, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)), 0
            )
            return out

    q, k, v = (torch.randn(1, 4096, 1, 4) for _ in range(3))
    with Watch():
        attention(q, k, v, window=16)
    assert largest < 4096 * 64


@pytest.mark.parametrize("window", [None, 3])
def test_numerical_gradients_vmap_compile_and_checkpoint(window: int | None) -> None:
    given = [x.detach()[:1, :, :1].requires_grad_() for x in inputs(7)]

    def run(*qkv: Tensor) -> Tensor:
        return attention(*qkv, window=window)[0]

    assert torch.autograd.gradcheck(run, given)
    true = run(*given)
    weight = torch.randn_like(true)
    wanted = torch.autograd.grad((weight * true).sum(), given)
    for other in (
        torch.compile(run, fullgraph=True, backend="aot_eager"),
        lambda *qkv: torch.utils.checkpoint.checkpoint(run, *qkv, use_reentrant=False),
    ):
        y = other(*given)
        torch.testing.assert_close(y, true)
        torch.testing.assert_close(torch.autograd.grad((weight * y).sum(), given), wanted)
    several = [torch.stack([x.detach(), x.detach().flip(1)]) for x in given]
    mapped = torch.func.vmap(run)(*several)
    torch.testing.assert_close(mapped, torch.stack([run(*(x[n] for x in several)) for n in range(2)]))


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
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask has the shape \[2, 4\].*\[2, 5\]"),
        ({"mask": torch.ones(2, 5)}, "mask is torch.float32"),
        (
            {
                "state": {name: torch.zeros(2, 3, 1, 4) for name in ("keys", "values")}
                | {"mask": torch.ones(2, 3).bool()}
            },
            r"state\['mask'\] has the shape \[2, 3\]; it must be \[2, 1\]",
        ),
        ({"cu_seqlens": [0, 5]}, "cu_seqlens is for sequences end to end"),
        ({name: torch.zeros(2, 0, 3, 4) for name in "qkv"}, "no token"),
    ],
)
def test_says_what_does_not_fit(change: dict[str, object], message: str) -> None:
    arguments = {**{name: torch.zeros(2, 5, 3, 4) for name in "qkv"}, **change}
    with pytest.raises(ValueError, match=message):
        attention(**arguments)  # type: ignore[arg-type]
