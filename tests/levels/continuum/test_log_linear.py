"""The log-linear memory by loops over spans, written from the binary digits of a token's number."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import nestopt
from nestopt.core import gates_of, scan
from nestopt.core.retentions import Keep
from nestopt.core.tree import leaves
from nestopt.levels import gated_linear, log_linear
from nestopt.levels.continuum import log_linear as room
from nestopt.ops import fast_form, run

F64 = torch.float64


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "chunk_for", lambda x: 4)


def spans(t: int, levels: int) -> list[tuple[int, int, int]]:
    """The level of each span before token t, and where it begins and ends, the newest first."""
    found, end = [], t
    while end:
        bit = (end & -end).bit_length() - 1
        begin = end - 2**bit if bit < levels - 1 else 0  # the last memory has all that is older
        found.append((min(bit, levels - 1) + 1, begin, end))
        end = begin
    return found


def twin(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, weights: list[Tensor]) -> Tensor:
    """Each token's answer as a sum over spans, and in them over tokens."""
    y = torch.zeros_like(v)
    for b, t, h in itertools.product(*map(range, q.shape[:3])):
        total = weights[0][b, t, h] * v[b, t, h] * (k[b, t, h] @ q[b, t, h])
        for level, begin, end in spans(t, len(weights) - 1):
            for s in range(begin, end):
                left = alpha[b, s + 1 : t + 1, h].prod()
                total = total + weights[level][b, t, h] * left * v[b, s, h] * (k[b, s, h] @ q[b, t, h])
        y[b, t, h] = total
    return y


def inputs(levels: int, length: int = 21) -> tuple[list[Tensor], dict[str, Tensor]]:
    tokens = [torch.randn(2, length, 2, dim, dtype=F64, requires_grad=True) for dim in (3, 3, 4)]
    paths = gates_of(log_linear(levels=levels))
    return tokens, {path: torch.rand(2, length, 2, dtype=F64, requires_grad=True) for path in paths}


def test_spans_are_those_of_the_paper() -> None:
    assert spans(13, 9) == [(1, 12, 13), (3, 8, 12), (4, 0, 8)]
    assert spans(13, 2) == [(1, 12, 13), (2, 0, 12)]


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 6])
def test_equals_a_loop_with_every_gradient_and_the_reference_machine(levels: int) -> None:
    level = log_linear(levels=levels)
    assert fast_form(level) == "log_linear"
    tokens, gates = inputs(levels)
    y, state = run(level, *tokens, gates=gates)
    true = twin(*tokens, gates["retention.keep"], [gates[f"weights.l{i}.keep"] for i in range(levels + 1)])
    torch.testing.assert_close(y, true, rtol=1e-10, atol=1e-10)
    given, weight = [*tokens, *gates.values()], torch.randn_like(y)
    mine, right = (torch.autograd.grad((weight * out).sum(), given, materialize_grads=True) for out in (y, true))
    torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-10)
    slow, end = scan(level, *tokens, gates=gates)
    torch.testing.assert_close(y, slow, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dict(leaves(state)), dict(leaves(end)), rtol=1e-10, atol=1e-10)
    asked = run(level, *tokens, gates=gates, state=state, learn=False)[0]
    torch.testing.assert_close(asked, scan(level, *tokens, gates=gates, state=state, learn=False)[0])


@pytest.mark.parametrize("levels", [2, 5])
def test_any_pieces_are_the_whole_and_gradients_pass_through_the_state(levels: int) -> None:
    level = log_linear(levels=levels)
    tokens, gates = inputs(levels, 25)
    whole, end = run(level, *tokens, gates=gates)
    for edges in ([0, 1, 2, 3, 25], [0, 5, 6, 11, 13, 25], [0, 8, 9, 10, 12, 24, 25]):
        ys, state = [], None
        for a, b in itertools.pairwise(edges):
            y, state = run(
                level, *(x[:, a:b] for x in tokens), gates={p: x[:, a:b] for p, x in gates.items()}, state=state
            )
            ys.append(y)
        assert state is not None
        torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dict(leaves(state)), dict(leaves(end)), rtol=1e-10, atol=1e-10)
        mine, right = (
            torch.autograd.grad(out.square().sum(), tokens, retain_graph=True) for out in (torch.cat(ys, 1), whole)
        )
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-10)


def test_rows_have_places_of_their_own_in_a_chunk() -> None:
    level = log_linear(levels=4)
    tokens, gates = inputs(4)
    mask = torch.rand(2, 21) < 0.6
    y1, state = run(level, *(x[:, :9] for x in tokens), gates={p: x[:, :9] for p, x in gates.items()}, mask=mask[:, :9])
    rest = {p: x[:, 9:] for p, x in gates.items()}
    y2, state = run(level, *(x[:, 9:] for x in tokens), gates=rest, mask=mask[:, 9:], state=state)
    y = torch.cat([y1, y2], 1)
    for n in range(2):
        own = {path: x[n : n + 1, mask[n]] for path, x in gates.items()}
        alone, end = run(level, *(x[n : n + 1, mask[n]] for x in tokens), gates=own)
        torch.testing.assert_close(y[n : n + 1, mask[n]], alone, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state["level"]["slots"][n : n + 1], end["level"]["slots"], rtol=1e-10, atol=1e-10)
    assert not y[~mask].any()
    ends = [0, 3, 4, 21]
    y, _ = run(level, *(x[:1] for x in tokens), gates={p: x[:1] for p, x in gates.items()}, cu_seqlens=ends)
    for a, b in itertools.pairwise(ends):
        own = {path: x[:1, a:b] for path, x in gates.items()}
        alone, _ = run(level, *(x[:1, a:b] for x in tokens), gates=own)
        torch.testing.assert_close(y[:, a:b], alone, rtol=1e-10, atol=1e-10)


def test_with_all_weights_alike_it_is_gated_linear_attention() -> None:
    tokens, gates = inputs(5)
    own = {path: x for path, x in gates.items() if path == "retention.keep"}
    y, _ = run(log_linear(levels=5), *tokens, gates=own)
    torch.testing.assert_close(2 * y, run(gated_linear(), *tokens, gates=own)[0], rtol=1e-10, atol=1e-10)


def test_a_layer_streams_by_single_tokens_and_all_of_it_learns() -> None:
    layer = nestopt.layer(log_linear(levels=4), 8, 2, kv_heads=1).double()
    with torch.no_grad():
        layer.gates.weight.normal_()
    x = torch.randn(2, 14, 8, dtype=F64)
    y, end = layer(x)
    first, state = layer(x[:, :3])
    ys = [first]
    for x_t in x[:, 3:].unbind(1):
        y_t, state = layer.step(x_t, state)
        ys.append(y_t[:, None])
    torch.testing.assert_close(torch.cat(ys, 1), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(leaves(state)), dict(leaves(end)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer(x, layer.reset(state, [0]))[0][0], y[0], rtol=1e-9, atol=1e-9)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


def test_on_gradients_the_direction_weighs_the_spans() -> None:
    level = log_linear(levels=3, retention=Keep())
    grads = [torch.randn(2, 3) for _ in range(8)]
    state = level.init(grads[0])
    for t, grad in enumerate(grads):
        direction, state = nestopt.core.bind(level).step(grad, state, nestopt.Signal(step=t + 1))
        torch.testing.assert_close(direction, 0.5 * torch.stack(grads[: t + 1]).sum(0))
    torch.testing.assert_close(state["slots"], torch.stack([torch.zeros(2, 3)] * 2 + [torch.stack(grads).sum(0)]))


def test_from_a_configuration_and_says_what_does_not_fit() -> None:
    level = log_linear(levels=2)
    assert (
        nestopt.build("level", nestopt.to_spec(level))
        == level
        == nestopt.build("level", {"level": "log_linear", "levels": 2})
    )
    for levels in (0, 33, True, 2.0):
        with pytest.raises(ValueError, match=r"log_linear: levels=.* is not allowed; give a whole number from 1 to 32"):
            log_linear(levels=levels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"log_linear: weights=.* is not allowed; give a decay for each of l0 to l3"):
        log_linear(levels=3, weights=level.weights)


def test_a_capturable_step_is_the_same() -> None:
    """Whose count of steps is a tensor."""
    torch.manual_seed(0)
    grads, found = torch.randn(5, 4, 4), []
    for capturable in (False, True):
        weight = torch.nn.Parameter(torch.zeros(4, 4))
        optimizer = nestopt.optim.Nested([weight], log_linear(levels=3), lr=0.1, capturable=capturable)
        for grad in grads:
            weight.grad = grad
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(*found)
