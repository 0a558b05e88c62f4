from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from nestopt.ops import self_modifying
from tests.levels.deep.deep_cases import close, gradients
from tests.levels.self_modifying.self_cases import example, flat


def split(x: tuple[list[Tensor], dict[str, Any], list[Tensor]]) -> tuple[list[Tensor], dict[str, Any]]:
    """What differs from example to example, and what a call is given beside it."""
    tokens, arguments, _ = x
    return [*tokens, arguments["momentum"]], arguments


def call(arguments: dict[str, Any], *tokens: Tensor) -> list[Tensor]:
    *qkv, momentum = tokens
    return flat(*self_modifying(*qkv, **{**arguments, "momentum": momentum}))


@pytest.mark.parametrize("length", [3, 9])
def test_vmap_over_tokens_is_a_loop(length: int) -> None:
    many = [split(example(length))[0] for _ in range(3)]
    _, arguments = split(example(length))
    stacked = [torch.stack(x).detach().requires_grad_() for x in zip(*many, strict=True)]
    fast = torch.vmap(lambda *x: tuple(call(arguments, *x)))(*stacked)
    loop = [call(arguments, *(x[i] for x in stacked)) for i in range(3)]
    slow = [torch.stack(x) for x in zip(*loop, strict=True)]
    close(list(fast), slow)
    leaves = [*stacked, *(w for ws in arguments["starts"].values() for w in ws)]
    probes = [torch.randn_like(x) for x in slow]
    close(gradients(fast, leaves, probes), gradients(slow, leaves, probes))


def test_functional_gradients() -> None:
    tokens, arguments, _ = example(9)
    starts = {name: [w.detach() for w in ws] for name, ws in arguments["starts"].items()}

    def loss(starts: dict[str, list[Tensor]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self_modifying(q, k, v, **{**arguments, "starts": starts})[0].square().sum()

    leaves = [w for ws in arguments["starts"].values() for w in ws]
    true = torch.autograd.grad(loss(arguments["starts"], *tokens), leaves)
    found = torch.func.grad(loss)(starts, *tokens)
    close([w for ws in found.values() for w in ws], list(true))
    per_example = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(starts, *(x[None] for x in tokens))
    close([w[0] for ws in per_example.values() for w in ws], list(true))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, as it traces
@pytest.mark.parametrize("has_momentum", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_in_one_graph(has_momentum: bool) -> None:
    tokens, arguments, leaves = example(7, has_momentum=has_momentum)
    compiled = torch.compile(self_modifying, fullgraph=True, backend="aot_eager")
    fast, slow = flat(*compiled(*tokens, **arguments)), flat(*self_modifying(*tokens, **arguments))
    close(fast, slow)
    probes = [torch.randn_like(x) for x in slow]
    close(gradients(fast, leaves, probes), gradients(slow, leaves, probes))


def test_within_activation_checkpointing() -> None:
    tokens, arguments, leaves = example(11)

    def run(*tokens: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(*self_modifying(*tokens, **arguments, checkpoint=1)))

    plain = run(*tokens)
    probes = [torch.randn_like(x) for x in plain]
    again = torch.utils.checkpoint.checkpoint(run, *tokens, use_reentrant=False)
    close(gradients(again, leaves, probes), gradients(plain, leaves, probes))


# -- refusals ----------------------------------------------------------------------------------------------------------

ONE = torch.ones(4, 4)
OPTIONS = [
    ({"chunk": 3, "projection_chunk": 4}, "projection_chunk=4 is not allowed with chunk=3: one of them must divide"),
    ({"chunk": 0}, "chunk=0 is not allowed; give a whole number, 1 or more"),
    ({"projection_chunk": 0}, "projection_chunk=0 is not allowed; give a whole number, 1 or more"),
    ({"eta_max": 0.0}, "eta_max=0.0 is not allowed; give a number above 0"),
    ({"step": "normalised"}, "step='normalised' is not allowed; give one of 'normalized', 'raw'"),
    ({"bound": 2.0}, "bound=2.0 is not allowed"),
    ({"delta": math.inf}, "delta=inf is not allowed"),
    ({"activation": "sin"}, "activation='sin' is not allowed; give one of 'silu'"),
    ({"starts": {"k": [ONE]}}, "starts has ['k']; 'memory', which answers, must be there"),
    ({"starts": {"memory": [ONE], "alfa": [ONE]}}, "starts has 'alfa', which is no memory"),
    ({"starts": {"memory": [torch.ones(3, 4)]}}, "starts['memory'][0] has the shape [3, 4]; for keys of width 4"),
    (
        {"starts": {"memory": [ONE], "k": [ONE], "v": [ONE, ONE]}},
        "starts['v'] has weights [(4, 4), (4, 4)] and starts['k'] [(4, 4)]; memories that make something must be of",
    ),
    ({"readout": {"eta": (torch.ones(4), torch.ones(()))}}, "readout has ['eta']; it must have w and b of 'alpha'"),
    (
        {"readout": dict.fromkeys(("eta", "alpha"), (torch.ones(3), torch.ones(())))},
        "readout['eta']: w has the shape [3]; for these tokens it must be one of [4], [2, 4], [2, 2, 4]",
    ),
    ({"momentum": torch.ones(3)}, "momentum has the shape [3] and q [2, 11, 2, 4]"),
    ({"mask": torch.ones(2, 11)}, "mask is torch.float32; it must be bool"),
    ({"cu_seqlens": [0, 11]}, "cu_seqlens is for sequences end to end in one row"),
    ({"validate": True, "momentum": 1.0}, "momentum is 1; it must lie in [0, 1)"),
    (
        {"validate": True, "starts": {"memory": [torch.full((4, 4), torch.nan)]}},
        "starts['memory'][0][0, 0] is nan; 16 such numbers",
    ),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[message for _, message in OPTIONS])
def test_options_that_are_not_allowed(options: dict[str, Any], message: str) -> None:
    tokens, arguments, _ = example(11)
    with pytest.raises(ValueError, match=re.escape(message)):
        self_modifying(*tokens, **{**arguments, **options})


def test_states_that_are_not_allowed() -> None:
    tokens, arguments, _ = example(7, chunk=4, projection_chunk=8)
    _, state = self_modifying(*tokens, **arguments)

    def refused(message: str, state: Any = state, tokens: list[Tensor] = tokens, **other: Any) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            self_modifying(*tokens, **{**arguments, **other}, state=state)

    refused("the state's memory has the keys ['momentum', 'pending', 'weights']; with these arguments", momentum=None)
    fewer = {name: weights for name, weights in arguments["starts"].items() if name != "q"}
    refused("the state's projections has the keys ['alpha', 'eta', 'k', 'pending', 'q', 'v']", starts=fewer)
    refused("has 3 tokens of a chunk that is not over; with chunk=2 it has at most 1", chunk=2)
    refused("it must be [1, 2", tokens=[x[:1] for x in tokens], momentum=0.5)
    refused("v is 3 wide and k 4; here they must be the same", tokens=[*tokens[:2], tokens[2][..., :3]])
    refused("state['weights']['W1'] is missing", state={**state, "memory": {**state["memory"], "weights": {}}})
