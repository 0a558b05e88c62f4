from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from nestopt.levels.deep.deep_memory import deep_memory
from tests.levels.deep.deep_cases import (
    BATCH,
    F64,
    HEADS,
    READS,
    Case,
    all_pairs,
    build,
    close,
    example,
    gradients,
    label,
    layerwise_cases,
    outputs,
    run_twin,
)


@pytest.mark.parametrize("case", [*all_pairs(0), *layerwise_cases(2)], ids=label)
def test_equals_the_token_loop_with_every_gradient(case: Case) -> None:
    tokens, arguments, leaves = build(case)
    fast, slow = outputs(*deep_memory(*tokens, **arguments)), run_twin(tokens, arguments)
    probes = [torch.randn_like(out) for out in slow]
    close(fast, slow)
    close(gradients(fast, leaves, probes), gradients(slow, leaves, probes))


def rounded(tokens: list[Tensor], arguments: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """The same in `dtype`, and float64 copies of exactly those numbers."""
    low = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    low["weights"] = [w.float() for w in arguments["weights"]]
    return [x.to(dtype) for x in tokens], low


def in_double(tokens: list[Tensor], arguments: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    full_arguments = {name: x.double() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    return [x.double() for x in tokens], {**full_arguments, "weights": [w.double() for w in arguments["weights"]]}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("delta", [0.0, 1.0])
@pytest.mark.parametrize("step", ["normalized", "layerwise"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str
)
def test_lower_precision(dtype: torch.dtype, bound: float, step: str, delta: float, read: str) -> None:
    """Only the answer is rounded to `dtype`: all is computed, and kept, in float32."""
    tokens, arguments = rounded(*example(40, read=read, delta=delta, chunk=16, step=step), dtype)
    y, state = deep_memory(*tokens, **arguments)
    slow = run_twin(*in_double(tokens, arguments))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), slow[0], rtol=bound, atol=bound)
    kept = outputs(y, state)[1:]
    assert {x.dtype for x in kept} == {torch.float32}
    torch.testing.assert_close([x.double() for x in kept], slow[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", ["normalized", "layerwise"])
def test_gradients_in_float32(step: str) -> None:
    tokens, arguments = rounded(*example(40, chunk=16, step=step), torch.float32)
    names = ("lr", "decay", "momentum")
    leaves = [x.requires_grad_() for x in (*tokens, *arguments["weights"], *(arguments[n] for n in names))]
    true_tokens, true_arguments = in_double(tokens, arguments)
    true_leaves = [*true_tokens, *true_arguments["weights"], *(true_arguments[n] for n in names)]
    y, state = deep_memory(*tokens, **arguments)
    slow = run_twin(true_tokens, true_arguments)
    probes = [torch.randn_like(x) for x in slow]
    found = gradients(outputs(y, state), leaves, [x.float() for x in probes])
    for mine, true in zip(found, gradients(slow, true_leaves, probes), strict=True):
        assert (mine - true).norm() <= 1e-5 * true.norm()


def test_autocast_changes_nothing() -> None:
    tokens, arguments = rounded(*example(11), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = deep_memory(*tokens, **arguments)
    torch.testing.assert_close((y, state), deep_memory(*tokens, **arguments), rtol=0, atol=0)


@pytest.mark.parametrize("step", ["normalized", "layerwise"])
def test_gates_of_0_and_1_are_finite_and_right(step: str) -> None:
    tokens, arguments = rounded(*example(70, chunk=32, step=step), torch.float32)
    for name in ("lr", "decay", "momentum"):
        arguments[name] = torch.where(torch.rand(BATCH, 70, HEADS) < 0.3, 0.0, 0.95)
    leaves = [x.requires_grad_() for x in (*tokens, *(arguments[n] for n in ("lr", "decay", "momentum")))]
    y, state = deep_memory(*tokens, **arguments)
    slow = run_twin(*in_double(tokens, arguments))
    torch.testing.assert_close([x.double() for x in outputs(y, state)], slow, rtol=1e-4, atol=1e-5)
    assert all(g.isfinite().all() for g in gradients([y], leaves, [torch.ones_like(y)]))


QUICK = {("chunk", "normalized"), ("after", "layerwise"), ("before", "raw")}


@pytest.mark.parametrize(
    ("read", "step"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(READS, ("normalized", "raw", "layerwise"))
    ],
)
def test_first_and_second_derivatives(read: str, step: str) -> None:
    torch.manual_seed(1)
    shape = (1, 3, 1)
    q, k, v = (torch.randn(*shape, 2, dtype=F64) for _ in range(3))
    gates = [0.1 + 0.8 * torch.rand(shape, dtype=F64) for _ in range(3)]
    weights = [torch.randn(2, 3, dtype=F64), torch.randn(3, 2, dtype=F64)]

    def run(*x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, lr, decay, momentum, *weights = x
        y, state = deep_memory(
            q, k, v, weights=weights, lr=lr, decay=decay, momentum=momentum, delta=1.0, chunk=2, read=read, step=step
        )
        return y, state["weights"]["W1"], state["momentum"]["W2"]

    leaves = [x.requires_grad_() for x in (q, k, v, *gates, *weights)]
    torch.autograd.gradcheck(run, leaves)
    torch.autograd.gradgradcheck(run, leaves, gen_non_contig_grad_outputs=True)
