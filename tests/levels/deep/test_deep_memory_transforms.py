from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from nestopt.levels.deep.deep_memory import deep_memory
from tests.levels.deep.deep_cases import BATCH, HEADS, READS, close, example, gradients, outputs


@pytest.mark.parametrize("step", ["normalized", "layerwise"])
@pytest.mark.parametrize("what", ["all", "tokens", "weights", "gates"])
@pytest.mark.parametrize("delta", [0.0, 1.0])
@pytest.mark.parametrize("read", READS)
def test_vmap_is_a_loop(read: str, delta: float, what: str, step: str) -> None:
    """Over everything, or one kind of argument; and its backward pass, inside of which gradients are written on."""
    many = [example(6, read=read, delta=delta, step=step) for _ in range(3)]

    def of_kind(i: int, kind: str) -> list[Tensor]:
        tokens, arguments = many[i]
        gates = [arguments[name] for name in ("lr", "decay", "momentum")]
        return {"tokens": tokens, "weights": arguments["weights"], "gates": gates}[kind]

    kinds = ("tokens", "weights", "gates")
    stacked = [
        [torch.stack(x) for x in zip(*(of_kind(i, kind) for i in range(3)), strict=True)]
        if what in ("all", kind)
        else of_kind(0, kind)
        for kind in kinds
    ]
    leaves = [x.requires_grad_() for kind in stacked for x in kind]
    dims = tuple(0 if what in ("all", kind) else None for kind in kinds)

    def run(tokens: list[Tensor], weights: list[Tensor], gates: list[Tensor]) -> tuple[Tensor, ...]:
        given = dict(zip(("lr", "decay", "momentum"), gates, strict=True))
        y, state = deep_memory(*tokens, **given, weights=weights, read=read, delta=delta, chunk=4, step=step)  # type: ignore[arg-type]
        return y, state["weights"]["W1"], state["momentum"]["W2"]

    fast = torch.vmap(run, in_dims=dims)(*stacked)
    loop = [
        run(*([x[i] for x in kind] if dim == 0 else kind for kind, dim in zip(stacked, dims, strict=True)))
        for i in range(3)
    ]
    slow = tuple(torch.stack(x) for x in zip(*loop, strict=True))
    close(fast, slow)
    probes = [torch.randn_like(x) for x in slow]
    close(gradients(fast, leaves, probes), gradients(slow, leaves, probes))


@pytest.mark.parametrize("step", ["normalized", "layerwise"])
def test_functional_gradients(step: str) -> None:
    tokens, arguments = example(6, step=step)
    weights = arguments.pop("weights")

    def loss(weights: list[Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return deep_memory(q, k, v, **arguments, weights=weights)[0].square().sum()

    leaves = [w.requires_grad_() for w in weights]
    true = torch.autograd.grad(loss(leaves, *tokens), leaves)
    plain = [w.detach() for w in weights]
    close(torch.func.grad(loss)(plain, *tokens), list(true))
    per_example = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(plain, *(x[None] for x in tokens))
    close([g[0] for g in per_example], list(true))
    jacobian = torch.func.jacrev(lambda w: deep_memory(*tokens, **arguments, weights=w)[0].sum((0, 2, 3)))(plain)
    y = deep_memory(*tokens, **arguments, weights=leaves)[0].sum((0, 2, 3))
    for t in range(6):
        close([j[t] for j in jacobian], list(torch.autograd.grad(y[t], leaves, retain_graph=True)))


COMPILED = [
    ("chunk", "normalized"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("after", "layerwise"), ("before", "normalized"))),
]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, as it traces
@pytest.mark.parametrize(("read", "step"), COMPILED)
def test_compiled_in_one_graph(read: str, step: str) -> None:
    tokens, arguments = example(7, read=read, step=step)
    leaves = [x.requires_grad_() for x in (*tokens, *arguments["weights"], arguments["lr"], arguments["momentum"])]
    compiled = torch.compile(deep_memory, fullgraph=True, backend="aot_eager")
    fast, slow = compiled(*tokens, **arguments), deep_memory(*tokens, **arguments)
    close(fast, slow)
    probes = [torch.randn_like(x) for x in outputs(*slow)]
    close(gradients(outputs(*fast), leaves, probes), gradients(outputs(*slow), leaves, probes))


def test_within_activation_checkpointing() -> None:
    tokens, arguments = example(11)
    leaves = [x.requires_grad_() for x in (*tokens, *arguments["weights"])]

    def run(*tokens: Tensor) -> tuple[Tensor, Tensor]:
        y, state = deep_memory(*tokens, **arguments, checkpoint=1)
        return y, state["weights"]["W1"]

    plain = run(*tokens)
    probes = [torch.randn_like(x) for x in plain]
    again = torch.utils.checkpoint.checkpoint(run, *tokens, use_reentrant=False)
    close(gradients(again, leaves, probes), gradients(plain, leaves, probes))


@pytest.mark.parametrize("step", ["normalized", "layerwise"])
@pytest.mark.parametrize("absent", [(), ("decay",), ("momentum",), ("decay", "momentum")], ids=str)
@pytest.mark.parametrize("length", [3, 8])
def test_gradients_are_written_on_only_inside(length: int, absent: tuple[str, ...], step: str) -> None:
    """A caller's own gradients stay as they are; twice backward is the same twice; with and without a graph."""
    tokens, arguments = example(length, **dict.fromkeys(absent), step=step)
    weights = [w.expand(BATCH, HEADS, *w.shape).clone().requires_grad_() for w in arguments.pop("weights")]
    y, state = deep_memory(*tokens, **arguments, weights=weights)
    ends = list(state["weights"].values())
    for end in ends:
        if not end.is_leaf:
            end.retain_grad()
    outs = [y, *ends, ends[0].square()]  # W1 is used twice; W2 once, which gets the caller's own tensor
    probes = [torch.randn_like(x) for x in outs]
    before = [probe.clone() for probe in probes]
    found = [
        torch.autograd.grad(outs, weights, probes, retain_graph=True, create_graph=graph)
        for graph in (False, False, True)
    ]
    torch.testing.assert_close(probes, before, rtol=0, atol=0)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    close(found[2], found[0])
    ends[0].grad = None  # `grad` adds to it, too
    torch.autograd.backward(outs, probes, retain_graph=True)
    torch.autograd.backward(outs, probes)
    close([w.grad for w in weights], [2 * g for g in found[0]])
    if length == 8:
        close(ends[0].grad, 2 * (2 * ends[0] * probes[-1] + probes[1]))
