"""The normaliser of linear attention: means of values, by a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nestopt
from nestopt.core import Gate, scan
from nestopt.core.features import Elu, Polynomial
from nestopt.core.outputs import Sign
from nestopt.core.retentions import Decay
from nestopt.core.tree import leaves
from nestopt.levels import gated_linear, linear_attention, momentum, retnet
from nestopt.ops import fast_form, run
from nestopt.ops import linear_attention as operation

F64 = torch.float64
LEVELS = {
    "plain": linear_attention(features=Elu(), normalizer=True),
    "polynomial": linear_attention(features=Polynomial(2), normalizer=True),
    "before": linear_attention(features=Elu(), normalizer=True, read="before"),
    "retnet": retnet(features=Elu(), normalizer=True),
    "gated": gated_linear(features=Elu(), normalizer=True, lr=Gate(0.5)),
}


def phi(level: nestopt.Level, x: Tensor) -> Tensor:
    if isinstance(level.features, Elu):  # type: ignore[attr-defined]
        return torch.where(x > 0, x + 1, x.exp())
    return torch.stack([a * b for a in x.unbind(-1) for b in x.unbind(-1)], dim=-1)


def twin(level: nestopt.Level, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor]) -> Tensor:
    """Each token's answer as a sum over those before it, of one sequence and head at a time."""
    y = torch.zeros_like(v)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            m, z = 0.0, 0.0
            for t in range(q.shape[1]):
                asked, key = phi(level, q[b, t, h]), phi(level, k[b, t, h])
                held = (m, z)
                alpha = gates["retention.keep"][b, t, h] if "retention.keep" in gates else 1.0
                alpha = 1 - 2.0 ** (-5 - h) if isinstance(level, retnet) else alpha
                eta = gates["lr"][b, t, h] if "lr" in gates else 1.0
                m, z = alpha * m + eta * torch.outer(v[b, t, h], key), alpha * z + eta * key
                held = held if level.read == "before" else (m, z)  # type: ignore[attr-defined]
                if t or level.read == "after":  # type: ignore[attr-defined]
                    y[b, t, h] = held[0] @ asked / (held[1] @ asked)
    return y


def inputs(level: nestopt.Level, length: int = 9) -> tuple[list[Tensor], dict[str, Tensor]]:
    tokens = [torch.randn(2, length, 2, dim, dtype=F64, requires_grad=True) for dim in (3, 3, 4)]
    learned = () if isinstance(level, retnet) else nestopt.core.gates_of(level)
    return tokens, {path: torch.rand(2, length, 2, dtype=F64, requires_grad=True) for path in learned}


@pytest.mark.parametrize("name", LEVELS)
def test_equals_a_loop_with_every_gradient_and_the_reference_machine(name: str) -> None:
    level = LEVELS[name]
    assert fast_form(level) == "normalized_linear"
    tokens, gates = inputs(level)
    y, state = run(level, *tokens, gates=gates)
    true = twin(level, *tokens, gates)
    torch.testing.assert_close(y, true, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(y)
    given = [*tokens, *gates.values()]
    mine, right = (torch.autograd.grad((weight * out).sum(), given) for out in (y, true))
    torch.testing.assert_close(mine, right, rtol=1e-8, atol=1e-9)
    slow, end = scan(level, *tokens, gates=gates)
    torch.testing.assert_close(y, slow, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dict(leaves(state)), dict(leaves(end)), rtol=1e-10, atol=1e-10)
    assert state["level"]["memory"]["m"].shape[2] == 5
    read = run(level, *tokens, state=state, learn=False)[0]
    torch.testing.assert_close(read, scan(level, *tokens, state=state, learn=False)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LEVELS)
def test_a_layer_streams_steps_and_keeps_rows_apart(name: str) -> None:
    layer = nestopt.layer(LEVELS[name], 8, 2).double()
    x = torch.randn(2, 9, 8, dtype=F64)
    y, _, stats = layer(x, return_stats=True)
    assert stats["surprise"].isfinite().all()
    ys, state = [], None
    for x_t in x.unbind(1):
        y_t, state = layer.step(x_t, state)
        ys.append(y_t)
    torch.testing.assert_close(torch.stack(ys, 1), y, rtol=1e-9, atol=1e-9)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    padded, state = layer(x, mask=mask)
    torch.testing.assert_close(padded[0, 3:], layer(x[:1, 3:])[0][0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer(x, layer.reset(state, [0]))[0][0], y[0], rtol=1e-9, atol=1e-9)


def test_in_chunks_the_reference_machine_runs_it() -> None:
    level = linear_attention(features=Elu(), normalizer=True, chunk=3)
    assert fast_form(level) is None
    tokens, _ = inputs(level)
    y, _ = run(level, *tokens)  # its gradient is the same from every memory
    torch.testing.assert_close(y, run(LEVELS["plain"], *tokens)[0], rtol=1e-10, atol=1e-10)


def test_as_an_operation() -> None:
    level = gated_linear(features=Elu(), normalizer=True)
    tokens, gates = inputs(level)
    y, end = operation(*tokens, decay=gates["retention.keep"], features=Elu(), normalizer=True, chunk=4)
    right, state = run(level, *tokens, gates=gates)
    torch.testing.assert_close((y, end), (right, state["level"]["memory"]["m"]), rtol=1e-10, atol=1e-10)
    first, middle = operation(*(x[:, :5] for x in tokens), features=Elu(), normalizer=True)
    rest, _ = operation(*(x[:, 5:] for x in tokens), features=Elu(), normalizer=True, state=middle)
    whole, _ = operation(*tokens, features=Elu(), normalizer=True)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 100.0])
def test_answers_and_gradients_are_finite_in_float32_where_features_vanish(scale: float) -> None:
    q, k, v = (torch.randn(1, 50, 1, 4) * scale for _ in range(3))
    q, k, v = (x.requires_grad_() for x in (q - 3 * scale, k - 3 * scale, v))
    y, _ = run(LEVELS["plain"], q, k, v)
    gradients = torch.autograd.grad(y.sum(), [q, k, v])
    assert all(x.isfinite().all() for x in (y, *gradients))
    largest = float(v.detach().abs().max())
    assert float(y.detach().abs().max()) <= largest * (1 + 1e-5)  # a mean is no larger than what it is of


def test_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"linear_attention: features=Identity\(\) is not allowed with a normalizer"):
        linear_attention(normalizer=True)
    with pytest.raises(ValueError, match=r"features=Polynomial\(degree=3\) is not allowed with a normalizer"):
        linear_attention(normalizer=True, features=Polynomial(3))
    for key, part in (("rule", momentum(0.5)), ("output", Sign())):
        with pytest.raises(ValueError, match=f"linear_attention: {key}=.* is not allowed with a normalizer, which is"):
            linear_attention(normalizer=True, features=Elu(), **{key: part})
    with pytest.raises(ValueError, match="normalizer=True is for tokens, not for gradients"):
        linear_attention(normalizer=True, features=Elu(), retention=Decay(0.9)).init(torch.zeros(2, 3))
    built = nestopt.build("level", {"level": "linear_attention", "features": "elu", "normalizer": True})
    assert built == LEVELS["plain"]
