"""`nestopt.ops.self_modifying` beside the token loop, with every gradient, and in other precisions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.levels.deep import token_wise
from nestopt.ops import deep_memory, self_modifying
from tests.levels.deep.deep_cases import F64, close, gradients
from tests.levels.self_modifying.self_cases import BATCH, HEADS, Case, build, cases, example, flat, label, run_twin

LAYERWISE = [case | {"step": "layerwise"} for case in cases(3)]


@pytest.mark.parametrize("case", [*cases(0), *LAYERWISE], ids=label)
def test_equals_the_token_loop_with_every_gradient(case: Case) -> None:
    tokens, arguments, leaves = build(case)
    fast, slow = flat(*self_modifying(*tokens, **arguments)), run_twin(tokens, arguments)
    probes = [torch.randn_like(x) for x in slow]
    close(fast, slow)
    found, true = gradients(fast, leaves, probes), gradients(slow, leaves, probes)
    sizes = [g.abs().amax().clamp_min(1.0) for g in true]  # of raw steps up to 1,000, to which rounding is relative
    close(
        [g / size for g, size in zip(found, sizes, strict=True)],
        [g / size for g, size in zip(true, sizes, strict=True)],
    )


@pytest.mark.parametrize(("chunk", "projection_chunk"), [(4, 8), (8, 4), (1, 1)])
def test_long_enough_for_blocks_of_chunks(chunk: int, projection_chunk: int) -> None:
    tokens, arguments, _ = example(70, chunk=chunk, projection_chunk=projection_chunk)
    with torch.no_grad():
        close(flat(*self_modifying(*tokens, **arguments)), run_twin(tokens, arguments))


@pytest.mark.parametrize("step", ["normalized", "raw", "layerwise"])
def test_padding_neither_writes_nor_fades(step: str) -> None:
    tokens, arguments, leaves = example(14, step=step)
    mask = torch.rand(BATCH, 14) < 0.6
    fast, slow = flat(*self_modifying(*tokens, **arguments, mask=mask)), run_twin(tokens, arguments, mask=mask)
    close(fast, slow)
    probes = [torch.randn_like(x) for x in slow]
    found = gradients(fast, leaves, probes)
    close(found, gradients(slow, leaves, probes))
    assert all((g[~mask] == 0).all() for g in found[:3])


@pytest.mark.parametrize("delta", [0.0, 0.7])
@pytest.mark.parametrize("step", ["normalized", "raw"])
def test_a_matrix_written_token_by_token(step: str, delta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the end of a block, with padding and a memory of keys beside it."""
    how = {"chunk": 1, "projection_chunk": 1, "depth": 1, "has_momentum": False, "names": ("memory", "k")}
    tokens, arguments, leaves = example(70, step=step, delta=delta, **how)
    mask = torch.rand(BATCH, 70) < 0.9
    with torch.no_grad():
        tokens[2][:, 1] = 1e-3 * tokens[2][:, 1]  # of some values are longer than they may be, of some shorter
        arguments["starts"]["memory"][0] *= 0.3
    arguments["mask"] = mask
    loops: list[int] = []
    scan = token_wise.scan
    monkeypatch.setattr(token_wise, "scan", lambda *given: (loops.append(1), scan(*given))[1])
    fast = flat(*self_modifying(*tokens, **arguments))
    assert len(loops) == 1
    slow = run_twin(tokens, arguments)
    close(fast, slow)
    probes = [torch.randn_like(x) for x in slow]
    found, true = gradients(fast, leaves, probes), gradients(slow, leaves, probes)
    sizes = [g.abs().amax().clamp_min(1.0) for g in true]
    close([g / n for g, n in zip(found, sizes, strict=True)], [g / n for g, n in zip(true, sizes, strict=True)])
    with torch.no_grad():
        close(flat(*self_modifying(*tokens, **arguments)), slow)


def test_at_bound_2_a_matrix_turns_round_what_it_holds() -> None:
    """Where η is 1 and α, too, one token takes M(k) = k + W k as far to the other side of its value as it was on this.

    Of a value of length 0 it is turned round again and again, and keeps its length.
    """
    k = torch.randn(1, 1, 1, 4, dtype=F64).expand(1, 6, 1, 4)
    readout = {name: (torch.zeros(4, dtype=F64), torch.tensor(40.0, dtype=F64)) for name in ("eta", "alpha")}
    start = [torch.zeros(4, 4, dtype=F64)]
    how = {"starts": {"memory": start}, "readout": readout, "delta": 0.0, "chunk": 1, "projection_chunk": 1}
    y, _ = self_modifying(k, k, torch.zeros_like(k), bound=2.0, **how)
    unit = F.normalize(k, dim=-1)
    turned = unit * torch.tensor([1, -1, 1, -1, 1, -1], dtype=F64)[None, :, None, None]
    torch.testing.assert_close(y, turned, rtol=1e-2, atol=1e-2)  # but for ε, a ten-thousandth a token
    with pytest.raises(ValueError, match=r"bound=2.0 is not allowed; give a number above 0 and below 2$"):
        self_modifying(k, k, k, bound=2.0, **{**how, "starts": {"memory": [*start, *start]}})


def rounded(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any], list[Tensor], dict[str, Any]]:
    """An example in `dtype` with weights in float32, and in float64 with exactly those numbers."""
    tokens, arguments, _ = example(40, chunk=8, projection_chunk=16)
    tokens = [x.detach().to(dtype) for x in tokens]
    low = {**arguments, "momentum": arguments["momentum"].detach().to(dtype)}
    low["starts"] = {name: [w.detach().float() for w in ws] for name, ws in arguments["starts"].items()}
    low["readout"] = {name: tuple(x.detach().float() for x in parts) for name, parts in arguments["readout"].items()}
    high = {**low, "momentum": low["momentum"].double()}
    high["starts"] = {name: [w.double() for w in ws] for name, ws in low["starts"].items()}
    high["readout"] = {name: tuple(x.double() for x in parts) for name, parts in low["readout"].items()}
    return tokens, low, [x.double() for x in tokens], high


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str
)
def test_lower_precision(dtype: torch.dtype, bound: float) -> None:
    """Only the answer is rounded to `dtype`: all is computed, and kept, in float32."""
    tokens, low, true_tokens, high = rounded(dtype)
    y, *kept = flat(*self_modifying(*tokens, **low))
    with torch.no_grad():
        slow = run_twin(true_tokens, high)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), slow[0], rtol=bound, atol=bound)
    assert {x.dtype for x in kept} == {torch.float32}
    torch.testing.assert_close([x.double() for x in kept], slow[1:], rtol=2e-5, atol=2e-5)


def test_autocast_changes_nothing() -> None:
    tokens, low, *_ = rounded(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = self_modifying(*tokens, **low)
    torch.testing.assert_close(mine, self_modifying(*tokens, **low), rtol=0, atol=0)


@pytest.mark.parametrize("step", ["layerwise", pytest.param("raw", marks=pytest.mark.slow)])
def test_first_and_second_derivatives(step: str) -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 3, 1, 2, dtype=F64) for _ in range(3))
    names = ("memory", "k", "v", "alpha")
    weights = [torch.randn(shape, dtype=F64) for _ in names for shape in ((2, 3), (3, 2))]
    readout = [torch.randn(shape, dtype=F64) for _ in range(2) for shape in ((2,), ())]
    theta = torch.rand(1, 3, 1, dtype=F64)

    def run(q: Tensor, k: Tensor, v: Tensor, theta: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        own, (w, b, w2, b2) = rest[:8], rest[8:]
        starts = {name: own[2 * i : 2 * i + 2] for i, name in enumerate(names)}
        y, state = self_modifying(
            q, k, v, starts=starts, readout={"eta": (w, b), "alpha": (w2, b2)}, momentum=theta, step=step, chunk=1,
            projection_chunk=2, eta_max=0.1,
        )  # fmt: skip
        return y, state["memory"]["weights"]["W1"], state["projections"]["v"]["momentum"]["W2"]

    leaves = [x.requires_grad_() for x in (q, k, v, theta, *weights, *readout)]
    torch.autograd.gradcheck(run, leaves)
    torch.autograd.gradgradcheck(run, leaves, gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize("step", ["normalized", "raw"])
def test_second_derivatives_of_a_matrix_written_token_by_token(step: str) -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 3, 1, 2, dtype=F64) for _ in range(3))
    weight, *readout = (torch.randn(shape, dtype=F64) for shape in ((2, 2), (2,), (), (2,), ()))

    def run(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, *readout: Tensor) -> tuple[Tensor, ...]:
        gates = {"eta": readout[:2], "alpha": readout[2:]}
        how = {"step": step, "chunk": 1, "projection_chunk": 1, "eta_max": 0.1, "delta": 0.5}
        y, state = self_modifying(q, k, v, starts={"memory": [weight]}, readout=gates, **how)
        return y, state["memory"]["weights"]["W1"]

    leaves = [x.requires_grad_() for x in (q, k, v, weight, *readout)]
    torch.autograd.gradcheck(run, leaves)
    torch.autograd.gradgradcheck(run, leaves)


# -- what it comes to where much is left out ---------------------------------------------------------------------------


def gate(x: Tensor, parts: tuple[Tensor, Tensor]) -> Tensor:
    w, b = parts
    return torch.sigmoid((x * w).sum(-1) + b)


@pytest.mark.parametrize("step", ["normalized", "raw", "layerwise"])
@pytest.mark.parametrize("length", [6, 11])
def test_one_memory_alone_is_a_deep_memory_of_its_own_values(step: str, length: int) -> None:
    """The first chunk's values are those of the start; from there on, of the chunk before."""
    tokens, arguments, _ = example(length, names=("memory",), chunk=4, step=step, delta=0.5)
    q, k, v = tokens
    readout, (w1, w2) = arguments["readout"], arguments["starts"]["memory"]
    lr, decay = gate(k, readout["eta"]), gate(k, readout["alpha"])
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    lr = lr if step != "raw" else lr * arguments["eta_max"]
    y, state = self_modifying(*tokens, **arguments)
    ys, end = [], None
    now = {"W1": w1.expand(BATCH, HEADS, -1, -1), "W2": w2.expand(BATCH, HEADS, -1, -1)}
    for begin in range(0, length, 4):
        part = slice(begin, begin + 4)
        x = v[:, part].transpose(1, 2)
        own = x + F.silu(x @ now["W2"].mT) @ now["W1"].mT
        if step != "raw":
            own = own * (x.norm(dim=-1, keepdim=True) / own.norm(dim=-1, keepdim=True)).clamp_max(1)
        gates = {"lr": lr[:, part], "decay": decay[:, part], "momentum": arguments["momentum"][:, part]}
        how = {"delta": 0.5, "read": "chunk", "chunk": 4, "step": step, "weights": [w1, w2], "state": end}
        answer, end = deep_memory(q[:, part], k[:, part], own.transpose(1, 2), **gates, **how)
        now = end["weights"]
        ys.append(answer)
    close(torch.cat(ys, 1), y)
    close(
        {kind: end[kind] for kind in ("weights", "momentum")},
        {kind: state["memory"][kind] for kind in end if kind != "pending"},
    )


def test_a_value_is_no_longer_than_what_it_is_made_of() -> None:
    """Of memories that answer with eleven times what they are asked."""
    tokens, arguments, _ = example(8, names=("memory", "v"), chunk=4, projection_chunk=4)
    big = {name: [10 * torch.eye(4, dtype=F64).expand(HEADS, 4, 4)] for name in ("memory", "v")}
    _, early = self_modifying(*(x[:, :3] for x in tokens), **{**arguments, "starts": big, "momentum": 0.5})
    made = early["projections"]["pending"]["v"].transpose(1, 2)
    close(made.norm(dim=-1), tokens[2][:, :3].norm(dim=-1), 1e-9)
    _, raw = self_modifying(*(x[:, :3] for x in tokens), **{**arguments, "starts": big, "momentum": 0.5, "step": "raw"})
    close(raw["projections"]["pending"]["v"].transpose(1, 2), 11 * tokens[2][:, :3])


def test_every_weight_learns() -> None:
    """After their first write: a memory that was not written yet makes no difference to what writes it."""
    for chunk, projection_chunk in itertools.product((1, 2, 4), (1, 2, 4)):
        tokens, arguments, leaves = example(9, chunk=chunk, projection_chunk=projection_chunk)
        y, _ = self_modifying(*tokens, **arguments)
        for gradient in torch.autograd.grad(y.square().sum(), leaves):
            assert gradient.abs().sum() > 0
