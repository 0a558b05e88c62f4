"""The delta rule beyond what holds of every matrix memory (`test_matrix_memories`)."""

from __future__ import annotations

import pytest
import torch

from nestopt.core import scan
from nestopt.levels import deltanet
from nestopt.ops import delta_rule, linear_attention
from tests.levels.matrix.twins import CASES, F64


def same(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_is_the_level_deltanet() -> None:
    inputs = CASES["delta"].inputs(2, 13)
    lr = inputs.pop("lr")
    y, state = scan(deltanet(lr=0.25), **inputs)
    for first in (True, False):
        mine, memory = delta_rule(**inputs, lr=0.25, decay_first=first, chunk=4)
        same(mine, y)
        same(memory, state["level"]["memory"]["m"])
    assert not torch.isclose(delta_rule(**inputs, lr=lr)[0], y).all()


def test_a_key_met_again_with_lr_1_gets_its_value_exactly() -> None:
    inputs = CASES["delta"].inputs(1, 40)
    y, _ = delta_rule(inputs["k"], inputs["k"], inputs["v"], lr=1.0, chunk=16)
    same(y, inputs["v"])


def test_momentum_of_0_is_none() -> None:
    inputs = CASES["delta, decay"].inputs(2, 13)
    y, state = delta_rule(**inputs, momentum=0.0, chunk=4)
    plain, memory = delta_rule(**inputs, chunk=4)
    same((y, state["memory"]), (plain, memory))


def test_orthogonal_keys_make_it_linear_attention() -> None:
    q, v = torch.randn(1, 8, 1, 8, dtype=F64), torch.randn(1, 8, 1, 3, dtype=F64)
    k = torch.eye(8, dtype=F64)[None, :, None]
    same(delta_rule(q, k, v, lr=1.0, decay=0.9, chunk=3), linear_attention(q, k, v, decay=0.9, chunk=3))


@pytest.mark.parametrize("chunk", [16, 64, 256])
def test_float32_is_right_for_keys_that_are_nearly_one_and_lr_2(chunk: int) -> None:
    """The hardest system: all keys alike, each write reflecting the memory."""
    q = torch.randn(1, 256, 1, 8)
    k = torch.nn.functional.normalize(torch.randn(1, 1, 1, 8) + 0.05 * torch.randn(1, 256, 1, 8), dim=-1)
    v = torch.randn(1, 256, 1, 8)
    y, state = delta_rule(q, k, v, lr=1.99, chunk=chunk)
    exact, memory = delta_rule(q.double(), k.double(), v.double(), lr=1.99, chunk=1)
    assert float((y - exact).abs().max() / exact.abs().max()) < 1e-4
    assert float((state - memory).abs().max() / memory.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("momentum", "state", "message"),
    [
        (None, {"memory": torch.zeros(1)}, r"state has the keys \['memory'\]; without momentum"),
        (0.5, torch.zeros(2, 2, 4, 3), "state is a Tensor; with momentum it must have 'memory' and 'momentum'"),
        (
            0.5,
            {"memory": torch.zeros(2, 2, 4, 3), "momentum": torch.zeros(2, 2, 3, 4)},
            r"state\['momentum'\] has the shape \[2, 2, 3, 4\].*\[2, 2, 4, 3\]",
        ),
        (None, torch.zeros(2, 2, 4, 3, dtype=torch.long), "state is torch.int64"),
    ],
)
def test_says_what_state_does_not_fit(momentum: float | None, state: object, message: str) -> None:
    inputs = CASES["delta"].inputs(2, 5)
    with pytest.raises(ValueError, match=message):
        delta_rule(**inputs, momentum=momentum, state=state)  # type: ignore[arg-type]
