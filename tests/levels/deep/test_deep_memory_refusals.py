from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from nestopt.levels.deep.deep_memory import deep_memory
from tests.levels.deep.deep_cases import F64, example, inputs, weights_of

OPTIONS = [
    ({"objective": "l1"}, "objective='l1' is not allowed; give one of 'l2', 'dot'"),
    ({"step": "normalised"}, "step='normalised' is not allowed; give one of 'normalized', 'raw'"),
    ({"read": "later"}, "read='later' is not allowed; give one of 'after', 'before', 'chunk'"),
    ({"activation": "sin"}, "activation='sin' is not allowed; give one of 'silu'"),
    ({"chunk": 0}, "chunk=0 is not allowed; give a whole number, 1 or more"),
    ({"checkpoint": -1}, "checkpoint=-1 is not allowed; give a whole number, 0 or more"),
    ({"bound": 2.0}, "bound=2.0 is not allowed; give a number above 0 and below 2"),
    ({"delta": -1.0}, "delta=-1.0 is not allowed; give a finite number, 0 or more"),
    ({"delta": math.inf}, "delta=inf is not allowed"),
    ({"weights": []}, "weights are empty; give W1, or W1, …, W_L"),
    (
        {"weights": [torch.ones(4, 5), torch.ones(6, 4)]},
        r"weights[0] has the shape [4, 5]; for keys of width 4, values",
    ),
    (
        {"weights": [torch.ones(3, 4, 4)]},
        "it must be [4, 4], with or without the heads (2), or the batch and the heads",
    ),
    ({"weights": [torch.ones(4)]}, "weights[0] has the shape [4]"),
    ({"lr": torch.ones(3)}, "lr has the shape [3] and q [2, 5, 2, 4]; it must be [2, 5, 2]"),
    ({"decay": torch.ones(2, 5)}, "decay has the shape [2, 5]"),
    ({"mask": torch.ones(2, 5)}, "mask is torch.float32; it must be bool"),
    ({"cu_seqlens": [0, 5]}, "cu_seqlens is for sequences end to end in one row"),
    ({"validate": True, "lr": 1.5}, "lr is 1.5; it must lie in [0, 1]"),
    ({"validate": True, "step": "raw", "lr": math.inf}, "lr is inf; it must lie in [0, inf)"),
    ({"validate": True, "decay": 1.5}, "decay is 1.5; it must lie in [0, 1]"),
    ({"validate": True, "momentum": 1.0}, "momentum is 1; it must lie in [0, 1)"),
    ({"validate": True, "weights": [torch.full((4, 4), torch.nan)]}, "weights[0][0, 0] is nan; 16 such numbers"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[message for _, message in OPTIONS])
def test_options_that_are_not_allowed(options: dict[str, Any], message: str) -> None:
    arguments = {"weights": weights_of(2), "lr": 0.5, **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        deep_memory(*inputs(5), **arguments)


def test_tokens_that_are_not_allowed() -> None:
    q, k, v = inputs(5)
    weights = weights_of(2)
    for given_tokens, message in [
        ((q[0], k, v), "q has the shape [5, 2, 4]; it must be [batch, tokens, heads, width]"),
        ((q, k[:, 1:], v), "k has the shape [2, 4, 2, 4] and q [2, 5, 2, 4]"),
        ((q, k, v[:, 1:]), "v has the shape [2, 4, 2, 4] and q [2, 5, 2, 4]"),
        ((q[:, :0], k[:, :0], v[:, :0]), "there is no token in it"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            deep_memory(*given_tokens, weights=weights, lr=0.5)
    narrow = [torch.ones(3, 5, dtype=F64), torch.ones(5, 4, dtype=F64)]
    with pytest.raises(ValueError, match="residual=True needs keys and values of one width, not 4 and 3"):
        deep_memory(q, k, v[..., :3], weights=narrow, lr=0.5)
    assert deep_memory(q, k, v[..., :3], weights=narrow, lr=0.5, residual=False)[0].shape == (2, 5, 2, 3)
    k[1, 2, 0, 3] = torch.nan
    with pytest.raises(ValueError, match=re.escape("k[1, 2, 0, 3] is nan; 1 such numbers are in k")):
        deep_memory(q, k, v, weights=weights, lr=0.5, validate=True)


def test_states_that_are_not_allowed() -> None:
    tokens, arguments = example(7)
    _, state = deep_memory(*tokens, **arguments)
    with pytest.raises(ValueError, match=r"must have .'pending', 'weights'.. Is it the state of another memory\?"):
        deep_memory(*tokens, **{**arguments, "momentum": None}, state=state)
    with pytest.raises(ValueError, match=r"with these gates it must have .'k', 'live', 'lr', 'momentum', 'v'."):
        deep_memory(*tokens, **{**arguments, "decay": None}, state=state)
    with pytest.raises(ValueError, match="has 3 tokens of a chunk that is not over; with chunk=2 it has at most 1"):
        deep_memory(*tokens, **{**arguments, "chunk": 2}, state=state)
    with pytest.raises(
        ValueError, match=re.escape("['pending']['k'] is [2, 2, 3, 4]; for these tokens it must be [1, 2, 3, 4]")
    ):
        deep_memory(*(x[:1] for x in tokens), **{**arguments, "lr": 0.5, "decay": 0.5, "momentum": 0.5}, state=state)
    wider = weights_of(2, hidden=6)
    with pytest.raises(
        ValueError, match=re.escape("state['weights']['W1'] is [2, 2, 4, 5]; for these weights and tokens")
    ):
        deep_memory(*tokens, **{**arguments, "weights": wider}, state=state)
    with pytest.raises(ValueError, match=re.escape("state['weights']['W3'] is missing")):
        deep_memory(*tokens, **{**arguments, "weights": [*arguments["weights"], torch.ones(4, 4)]}, state=state)
