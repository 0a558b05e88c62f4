"""The Omega rule beyond what holds of every matrix memory (`test_matrix_memories`)."""

from __future__ import annotations

import pytest
import torch

from nestopt.ops import delta_rule, omega
from tests.levels.matrix.twins import CASES, F64, loop_omega


def same(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_window_of_1_is_the_delta_rule() -> None:
    inputs = CASES["omega, decay, powers"].inputs(2, 13)
    y, state = omega(**inputs, window=1, chunk=4)
    same((y, state["memory"]), delta_rule(**inputs, decay_first=False, chunk=4))
    assert state["keys"].shape == (2, 2, 0, 3)


def test_the_state_holds_the_last_pairs_and_grows_to_one_less_than_the_window() -> None:
    inputs = CASES["omega"].inputs(2, 6)
    state = None
    for t in range(6):
        _, state = omega(**{name: x[:, t : t + 1] for name, x in inputs.items()}, window=4, state=state)
        first = max(0, t + 1 - 3)
        same(state["keys"], inputs["k"][:, first : t + 1].transpose(1, 2))
        same(state["values"], inputs["v"][:, first : t + 1].transpose(1, 2))


@pytest.mark.parametrize("window", [5, 20])
def test_a_window_longer_than_a_chunk_or_than_all_tokens(window: int) -> None:
    inputs = CASES["omega, decay, powers"].inputs(2, 9)
    for chunk in (1, 4, 64):
        same(omega(**inputs, window=window, weights=0.8, chunk=chunk), loop_omega(**inputs, window=window, weights=0.8))


def test_a_weight_that_is_a_tensor_of_no_dimension_is_a_number_with_a_gradient() -> None:
    inputs = CASES["omega"].inputs(2, 9)
    weight = torch.tensor(0.7, dtype=F64, requires_grad=True)
    fast, slow = (
        omega(**inputs, window=3, weights=weight)[0],
        loop_omega(**inputs, window=3, weights=weight ** torch.arange(3))[0],
    )
    same(fast, slow)
    same(torch.autograd.grad(fast.square().sum(), weight), torch.autograd.grad(slow.square().sum(), weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"window": 2.0}, "window=2.0"),
        ({"weights": torch.ones(2)}, r"weights has the shape \[2\]; with window=3 it must be \[3\]"),
        ({"state": torch.zeros(2, 2, 4, 3)}, "state is a Tensor"),
        (
            {
                "state": {
                    "memory": torch.zeros(2, 2, 4, 3),
                    "keys": torch.zeros(2, 2, 3, 3),
                    "values": torch.zeros(2, 2, 3, 4),
                }
            },
            r"state\['keys'\] holds 3 pairs; with window=3 it must be 2 at most",
        ),
        (
            {
                "state": {
                    "memory": torch.zeros(2, 2, 4, 3),
                    "keys": torch.zeros(2, 2, 2, 3),
                    "values": torch.zeros(2, 2, 1, 4),
                }
            },
            r"state\['values'\] has the shape \[2, 2, 1, 4\].*\[2, 2, 2, 4\]",
        ),
    ],
)
def test_says_what_does_not_fit(change: dict[str, object], message: str) -> None:
    inputs = CASES["omega"].inputs(2, 5)
    with pytest.raises(ValueError, match=message):
        omega(**{**inputs, "window": 3, **change})  # type: ignore[arg-type]
