"""`SequenceMemory.step`: one token at a time gives what the whole does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nestopt import Gate
from nestopt.core.features import Elu
from nestopt.core.retentions import Decay
from nestopt.core.tree import leaves
from nestopt.levels import (
    deltanet,
    gated_deltanet,
    gated_linear,
    gla,
    kda,
    linear_attention,
    retnet,
    titans,
)
from nestopt.nn import SequenceMemory, detach
from tests.nn.tools import F64, LEVELS, away, in_steps, level_of, make, same, same_states

CHUNKED = ["titans in chunks", "titans, matrix", "ttt in chunks", "ttt without gates"]

MATRICES = {
    "linear_attention": linear_attention(features=Elu()),
    "retnet": retnet(read="before"),
    "gated_linear": gated_linear(lr=Gate(0.3), step_size=0.7),
    "a constant decay": gated_linear(retention=Decay(0.9)),
    "deltanet": deltanet(features=Elu()),
    "deltanet, bound": deltanet(normalized=True, retention=Decay(Gate(0.8))),
    "gated_deltanet": gated_deltanet(lr=0.3, read="before"),
    "gla": gla(read="before"),
    "kda": kda(lr=0.3),
    "gated_deltanet, fading as it writes": gated_deltanet(fade="with"),
}


@pytest.mark.parametrize("name", LEVELS)
def test_steps_are_the_whole(name: str) -> None:
    module = make(name)
    x = torch.randn(2, 10, 8, dtype=F64)
    whole, end = module(x)
    stepped, state = in_steps(module, x)
    same(stepped, whole)
    same_states(state, end)


@pytest.mark.parametrize("name", LEVELS)
def test_steps_go_on_from_a_piece_and_a_piece_from_steps(name: str) -> None:
    module = make(name)
    x = torch.randn(2, 9, 8, dtype=F64)
    first, state = module(x[:, :2])
    second, state = in_steps(module, x[:, 2:5], state)
    third, _ = module(x[:, 5:], state)
    same(torch.cat([first, second, third], 1), module(x)[0])


OPTIONS: list[dict[str, Any]] = [
    {"gates": False},
    {"rope": 100.0, "gate_output": True},
    {"qk_norm": False, "out_norm": False, "conv": 0},
    {"v_norm": True, "conv": 1, "dim_head": 3},
    {"qk_norm": False, "v_norm": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", CHUNKED)
def test_the_shorter_way_knows_every_option(name: str, options: dict[str, object]) -> None:
    module = make(name, **options)
    x = torch.randn(3, 11, 8, dtype=F64)
    whole, end = module(x)
    stepped, state = in_steps(module, x)
    same(stepped, whole)
    same_states(state, end)


@pytest.mark.parametrize("options", [{}, *OPTIONS])
@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_is_written_to_as_by_the_whole(name: str, options: dict[str, Any]) -> None:
    module = away(SequenceMemory(MATRICES[name], 8, 2, **options).double())
    x = torch.randn(3, 7, 8, dtype=F64, requires_grad=True)
    inputs = [x, *module.parameters()]
    whole, end = module(x)
    wanted = torch.autograd.grad(whole.sin().sum(), inputs, allow_unused=True)
    stepped, state = in_steps(module, x)
    same(stepped, whole)
    same_states(state, end)
    same(torch.autograd.grad(stepped.sin().sum(), inputs, allow_unused=True), wanted, 1e-9)
    with torch.no_grad():
        x[0, 4, 2] = torch.inf
        whole, end = module(x)
        stepped, state = in_steps(module, x)
    assert stepped[0, 4].isnan().all()
    torch.testing.assert_close(stepped, whole, rtol=1e-10, atol=1e-10, equal_nan=True)
    same_states(state, end)


@pytest.mark.parametrize("name", [*CHUNKED, "gated_deltanet", "attention"])
def test_gradients_through_steps_are_those_of_the_whole(name: str) -> None:
    module = make(name)
    x = torch.randn(2, 9, 8, dtype=F64, requires_grad=True)
    inputs = [x, *module.parameters()]
    whole = torch.autograd.grad(module(x)[0].sin().sum(), inputs)
    stepped = torch.autograd.grad(in_steps(module, x)[0].sin().sum(), inputs)
    same(stepped, whole, 1e-9)


@pytest.mark.parametrize("name", CHUNKED)
def test_a_token_that_is_not_finite_is_not_written_here_either(name: str) -> None:
    module = make(name, conv=0)
    x = torch.randn(2, 9, 8, dtype=F64)
    x[0, 5, 2] = torch.inf
    whole, end = module(x)
    stepped, state = in_steps(module, x)
    assert stepped[0, 5].isnan().all()
    assert stepped[0, 6:].isfinite().all()
    torch.testing.assert_close(stepped, whole, rtol=1e-10, atol=1e-10, equal_nan=True)
    same_states(state, end)


@pytest.mark.parametrize("name", ["titans in chunks", "deltanet", "attention", "momentum"])
def test_steps_in_bfloat16_are_the_whole_within_its_precision(name: str) -> None:
    module = SequenceMemory(level_of(name), 8, 2).bfloat16()
    x = torch.randn(2, 9, 8, dtype=torch.bfloat16)
    whole, end = module(x)
    stepped, state = in_steps(module, x)
    assert stepped.dtype == torch.bfloat16
    assert (stepped - whole).float().norm() < 0.04 * whole.float().norm()
    assert {k: v.dtype for k, v in leaves(state)} == {k: v.dtype for k, v in leaves(end)}


def test_the_state_stays_of_one_size() -> None:
    module = SequenceMemory(titans(chunk=4, read="chunk"), 8, 2)
    with torch.no_grad():
        _, state = in_steps(module, torch.randn(2, 4, 8))
        sizes = {path: leaf.shape for path, leaf in leaves(state)}
        _, state = in_steps(module, torch.randn(2, 40, 8), state)
    assert {path: leaf.shape for path, leaf in leaves(state)} == sizes


def test_a_graph_ends_where_it_is_cut() -> None:
    module = make("titans in chunks")
    x = torch.randn(2, 6, 8, dtype=F64, requires_grad=True)
    _, state = in_steps(module, x[:, :5])
    y, _ = module.step(x[:, 5], detach(state))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert not grad[:, :5].any()
    assert grad[:, 5].any()


def test_says_what_does_not_fit() -> None:
    module = SequenceMemory(titans(), 8, 2)
    with pytest.raises(ValueError, match=r"x_t has the shape \[2, 1, 8\].*\[batch, dim=8\]"):
        module.step(torch.zeros(2, 1, 8))
    with pytest.raises(ValueError, match=r"x_t has the shape \[2, 7\]"):
        module.step(torch.zeros(2, 7))
    _, state = module.step(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"of a batch of 2, and the input of 1"):
        module.step(torch.zeros(1, 8), state)
