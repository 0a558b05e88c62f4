"""Mesa against the exact ridge regression, by a loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import nestopt
from nestopt.core import gates_of, scan
from nestopt.core.retentions import Keep
from nestopt.core.tree import leaves
from nestopt.levels import mesa
from nestopt.ops import fast_form, run

F64 = torch.float64
LEVELS = {"cg": mesa(), "exact": mesa(solver="exact"), "keeps all": mesa(retention=Keep(), lr=0.7, floor=0.5)}


def twin(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, eta: Tensor, alpha: Tensor) -> Tensor:
    """Of each token the ridge regression of all pairs so far, from their weights; one row of values after the other."""
    y = torch.zeros(*v.shape, dtype=F64)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for h in range(q.shape[2]):
                left = torch.stack([eta[b, s, h] * alpha[b, s + 1 : t + 1, h].prod() for s in range(t + 1)])
                keys, values = k[b, : t + 1, h], v[b, : t + 1, h]
                system = keys.mT @ (left[:, None] * keys) + torch.diag(ridge[h])
                y[b, t, h] = (left[:, None] * values).mT @ (keys @ (torch.linalg.inv(system) @ q[b, t, h]))
    return y


def inputs(level: nestopt.Level, length: int = 9) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    tokens = [torch.randn(2, length, 3, dim, dtype=F64, requires_grad=True) for dim in (4, 4, 5)]
    gates = {path: torch.rand(2, length, 3, dtype=F64, requires_grad=True) for path in gates_of(level)}
    return tokens, gates, torch.randn(3, 4, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("name", LEVELS)
def test_equals_the_exact_optimum_with_every_gradient(name: str) -> None:
    level = LEVELS[name]
    assert fast_form(level) == "mesa"
    tokens, gates, raw = inputs(level)
    y, state = run(level, *tokens, gates=gates, learned={"ridge": raw})
    idle = {"lr": torch.full((2, 9, 3), 0.7, dtype=F64), "retention.keep": torch.ones(2, 9, 3, dtype=F64)}
    eta, alpha = {**idle, **gates}.values()
    ridge = (0.5 if name == "keeps all" else 0.25) + (1 + raw.exp()).log()
    true = twin(*tokens, ridge, eta, alpha)
    torch.testing.assert_close(y, true, rtol=1e-9, atol=1e-9)
    given, weight = [*tokens, *gates.values(), raw], torch.randn_like(y)
    mine, right = (torch.autograd.grad((weight * out).sum(), given) for out in (y, true))
    torch.testing.assert_close(mine, right, rtol=1e-8, atol=1e-9)
    slow, end = scan(level, *tokens, gates=gates, learned={"ridge": raw})
    torch.testing.assert_close(y, slow, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(leaves(state)), dict(leaves(end)), rtol=1e-9, atol=1e-9)
    also = torch.autograd.grad((weight * slow).sum(), given)
    torch.testing.assert_close(also, right, rtol=1e-8, atol=1e-9)
    asked = run(level, *tokens, state=state, learn=False)[0]
    torch.testing.assert_close(asked, scan(level, *tokens, state=state, learn=False)[0], rtol=1e-9, atol=1e-9)


def test_few_steps_err_by_no_more_than_the_bound_in_the_norm_of_the_system() -> None:
    torch.manual_seed(0)
    q, k = (normalize(torch.randn(1, 60, 1, 16, dtype=F64), dim=-1) for _ in range(2))
    gates = {"lr": torch.full((1, 60, 1), 0.9, dtype=F64), "retention.keep": torch.full((1, 60, 1), 0.98, dtype=F64)}
    identity = torch.eye(16, dtype=F64)
    left = 0.9 * 0.98 ** torch.arange(59, -1, -1, dtype=F64)
    system = k[0, :, 0].mT @ (left[:, None] * k[0, :, 0]) + identity
    values = torch.linalg.eigvalsh(system)
    root = math.sqrt(float(values[-1] / values[0]))
    errors = {}
    for steps in (1, 3, 6, 30):
        # the values are the keys of the identity: the answer is H (H + 1)⁻¹ q, which tells the solution
        y, _ = run(mesa(steps=steps), q, k, k, gates=gates)
        found = torch.linalg.solve(system - identity, y[0, -1, 0])
        exact = torch.linalg.solve(system, q[0, -1, 0])
        errors[steps] = float(((found - exact) @ system @ (found - exact)).sqrt() / (exact @ system @ exact).sqrt())
        assert errors[steps] <= 2 * ((root - 1) / (root + 1)) ** steps
    assert errors[1] > 0.05 > errors[6] > errors[30]
    assert errors[30] < 1e-9


@pytest.mark.parametrize("options", [{}, {"steps": 3}, {"solver": "exact"}])
def test_a_layer_streams_steps_and_keeps_rows_apart(options: dict[str, object]) -> None:
    layer = nestopt.layer(mesa(**options), 8, 2).double()  # type: ignore[arg-type]
    with torch.no_grad():
        layer.start["ridge"].add_(torch.randn(2, 4))
    x = torch.randn(2, 40, 8, dtype=F64)
    y, end = layer(x)
    first, state = layer(x[:, :7])
    ys = [first]
    for x_t in x[:, 7:12].unbind(1):
        y_t, state = layer.step(x_t, state)
        ys.append(y_t[:, None])
    rest, state = layer(x[:, 12:], state)
    torch.testing.assert_close(torch.cat([*ys, rest], 1), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(leaves(state)), dict(leaves(end)), rtol=1e-9, atol=1e-9)
    mask = torch.arange(40) >= torch.tensor([[3], [0]])
    padded, state = layer(x, mask=mask)
    torch.testing.assert_close(padded[0, 3:], layer(x[:1, 3:])[0][0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer(x, layer.reset(state, [0]))[0][0], y[0], rtol=1e-9, atol=1e-9)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_gradients_have_gradients() -> None:
    tokens, gates, raw = inputs(mesa(), 3)
    tokens = [x[:1, :, :1].detach().requires_grad_() for x in tokens]
    gates = {path: x[:1, :, :1].detach() for path, x in gates.items()}

    def answers(q: Tensor, k: Tensor) -> Tensor:
        return run(mesa(), q, k, tokens[2], gates=gates, learned={"ridge": raw[:1].detach()})[0]

    assert torch.autograd.gradgradcheck(answers, tokens[:2])


def test_recalls_what_gradient_steps_have_not_learned_yet() -> None:
    """Of 12 correlated keys in 16 dimensions, each shown once, the optimum answers all; DeltaNet loses the first."""
    torch.manual_seed(0)
    k = normalize(torch.randn(1, 12, 1, 16) + 2.0, dim=-1)
    v = normalize(torch.randn(1, 12, 1, 16), dim=-1)
    kept = {"retention": Keep(), "lr": 1.0}
    _, state = run(mesa(floor=1e-4, steps=60, **kept), k, k, v, learned={"ridge": torch.full((1, 16), -12.0)})  # type: ignore[arg-type]
    y = run(mesa(floor=1e-4, steps=60, **kept), k, k, v, state=state, learn=False)[0]  # type: ignore[arg-type]
    _, its = run(nestopt.levels.deltanet(lr=1.0), k, k, v)
    theirs = run(nestopt.levels.deltanet(lr=1.0), k, k, v, state=its, learn=False)[0]
    wrong, its_wrong = ((out - v).norm(dim=-1).mean() for out in (y, theirs))
    assert wrong < 0.05 < 0.3 < its_wrong


def test_on_gradients_it_is_newtons_direction() -> None:
    level = mesa(lr=0.5, retention=Keep())
    grads = [torch.randn(3, 4, dtype=F64) for _ in range(2)]
    state, total = level.init(grads[0]), torch.zeros(4, 4, dtype=F64)
    for grad in grads:
        total += 0.5 * grad.mT @ grad
        direction, state = level.step(grad, state, nestopt.Signal(step=1))
    wanted = 0.5 * (grads[0] + grads[1]) @ torch.linalg.inv(total + torch.eye(4, dtype=F64))
    torch.testing.assert_close(direction, wanted)


def test_says_what_does_not_fit() -> None:
    for key, value in (("floor", 0.0), ("steps", 0), ("solver", "qr")):
        with pytest.raises(ValueError, match=f"mesa: {key}={value!r} is not allowed"):
            mesa(**{key: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mesa: period=2 is not allowed on tokens"):
        nestopt.layer(mesa(period=2), 8)
