"""Linear attention beyond what holds of every matrix memory (`test_matrix_memories`)."""

from __future__ import annotations

import pytest
import torch

from nestopt.core.features import Elu, Polynomial
from nestopt.ops import linear_attention
from tests.levels.matrix.twins import CASES, F64, leaves, loop_linear_attention


def test_starts_at_zero() -> None:
    inputs = CASES["linear attention, decay"].inputs(2, 9)
    torch.testing.assert_close(
        linear_attention(**inputs, chunk=4),
        linear_attention(**inputs, state=torch.zeros(2, 2, 4, 3, dtype=F64), chunk=4),
    )


@pytest.mark.parametrize("features", [Elu(), Polynomial(2)])
def test_features_are_those_of_queries_and_keys_and_padding_has_none(features: Elu | Polynomial) -> None:
    inputs = CASES["linear attention, decay"].inputs(2, 9)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    mask = torch.ones(2, 9, dtype=torch.bool)
    y, end = linear_attention(**inputs, features=features, chunk=4)
    mapped = {**inputs, "q": features(inputs["q"]), "k": features(inputs["k"])}
    true = loop_linear_attention(**mapped)
    torch.testing.assert_close((y, end), true, rtol=1e-10, atol=1e-10)
    got, wanted = (
        torch.autograd.grad(out[0].square().sum() + out[1].sum(), leaves(inputs)) for out in ((y, end), true)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    mask[:, 4:] = False  # elu(0) + 1 is 1, and must not be written
    padded, state = linear_attention(**inputs, features=features, mask=mask, chunk=4)
    short = {name: x[:, :4] for name, x in inputs.items()}
    torch.testing.assert_close((padded[:, :4], state), linear_attention(**short, features=features))
    assert not padded[:, 4:].any()


def test_a_token_that_is_not_finite_leaves_the_gradients_of_features_alone() -> None:
    inputs = CASES["linear attention"].inputs(1, 5)
    inputs["k"][0, 2, 0, 1] = torch.nan
    weight = torch.eye(3, dtype=F64).requires_grad_()
    y, _ = linear_attention(**inputs, features=lambda x: torch.exp(x @ weight))
    (gradient,) = torch.autograd.grad(y.nansum(), weight)
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("decay", [-0.1, float("nan")])
def test_says_what_decay_is_not_allowed(decay: float) -> None:
    inputs = CASES["linear attention"].inputs(1, 5)
    with pytest.raises(ValueError, match=f"decay={decay}"):
        linear_attention(**inputs, decay=decay)


def test_validate_names_a_state_that_is_not_finite() -> None:
    inputs = CASES["linear attention"].inputs(1, 5)
    state = torch.zeros(1, 2, 4, 3)
    state[0, 1, 2, 0] = torch.inf
    with pytest.raises(ValueError, match=r"state\[0, 1, 2, 0\] is inf"):
        linear_attention(**inputs, state=state, validate=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_remember_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 300, 2, 8, dtype=dtype) for _ in range(3))
    y, state = linear_attention(q, k, v, decay=0.999)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    _, true = loop_linear_attention(q.double(), k.double(), v.double(), decay=0.999)
    torch.testing.assert_close(state.double(), true, rtol=1e-4, atol=1e-3)
