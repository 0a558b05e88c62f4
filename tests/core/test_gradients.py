"""Levels on gradients against float64 loops written from their equations."""

import math

import pytest
import torch

from nestopt.config import as_saved, build, to_spec
from nestopt.core import AssociativeMemory, Signal, advance, chain, parallel, start
from nestopt.core.memories import Matrix, Mlp, Vector, Window
from nestopt.core.objectives import L2, Dot
from nestopt.core.outputs import RmsNorm, Sign
from nestopt.core.retentions import Decay
from nestopt.levels import (
    adam,
    adamw,
    attention,
    cms,
    deep_momentum,
    delta_momentum,
    deltanet,
    gd,
    linear_attention,
    momentum,
    muon,
    newton_schulz,
)
from nestopt.levels.gradient.muon import NewtonSchulzOutput
from nestopt.optim import DeepMomentum

STEPS, OUT, IN = 9, 4, 6


@pytest.fixture
def grads():
    return [torch.randn(OUT, IN, dtype=torch.float64) for _ in range(STEPS)]


def run(level, grads, param=None):
    """All directions of `level` over `grads`."""
    param = torch.zeros_like(grads[0]) if param is None else param
    state, out = start(level, param), []
    for t, grad in enumerate(grads, start=1):
        direction, state = advance(level, grad, state, Signal(t, param))
        out.append(direction)
    return torch.stack(out)


def same(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def entries(grads):
    return [[[float(g[i, j]) for j in range(IN)] for i in range(OUT)] for g in grads]


@pytest.mark.parametrize("dampening", [0.0, 0.3])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("undamped", [False, True])
def test_momentum_entry_by_entry(grads, dampening, nesterov, undamped):
    beta, want = 0.8, torch.empty(STEPS, OUT, IN, dtype=torch.float64)
    for i in range(OUT):
        for j in range(IN):
            m = 0.0
            for t, g in enumerate(entries(grads)):
                damp = 0.0 if undamped and t == 0 else dampening
                m = beta * m + (1 - damp) * g[i][j]
                want[t, i, j] = g[i][j] + beta * m if nesterov else m
    same(run(momentum(beta, dampening, nesterov, undamped), grads), want)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_adam_entry_by_entry(grads, amsgrad, bias_correction):
    b1, b2, eps = 0.7, 0.9, 1e-3
    want = torch.empty(STEPS, OUT, IN, dtype=torch.float64)
    for i in range(OUT):
        for j in range(IN):
            m = h = top = 0.0
            for t, g in enumerate(entries(grads), start=1):
                m = b1 * m + (1 - b1) * g[i][j]
                h = b2 * h + (1 - b2) * g[i][j] ** 2
                top = max(top, h)
                root = top if amsgrad else h
                c1, c2 = (1 - b1**t, 1 - b2**t) if bias_correction else (1, 1)
                want[t - 1, i, j] = (m / c1) / (math.sqrt(root / c2) + eps)
    same(run(adam((b1, b2), eps, bias_correction, amsgrad), grads), want)


def test_adamw_adds_the_parameter(grads):
    param = torch.randn(OUT, IN, dtype=torch.float64)
    same(run(adamw(weight_decay=0.3), grads, param), run(adam(), grads) + 0.3 * param)


@pytest.mark.parametrize("normalize", ["clip", "unit", None])
@pytest.mark.parametrize("zeta", [0.02, 1.0])
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT), (IN,)])
def test_delta_momentum_entry_by_entry(normalize, zeta, shape):
    grads = [0.3 * torch.randn(shape, dtype=torch.float64) for _ in range(STEPS)]
    beta = 0.9
    directions = run(delta_momentum(beta, zeta, normalize), grads)
    g0 = grads[0] if len(shape) == 2 else grads[0][None]
    rows, cols = g0.shape
    m = [[0.0] * cols for _ in range(rows)]
    for t, grad in enumerate(grads):
        g = grad.reshape(rows, cols).tolist()
        square = sum(x * x for row in g for x in row)
        s = {"clip": min(1.0, zeta * square), "unit": min(1.0, zeta), None: zeta * square}[normalize]
        # m <- beta m - s m (ĝᵀ ĝ) + g
        outer = [[sum(g[r][a] * g[r][b] for r in range(rows)) / square for b in range(cols)] for a in range(cols)]
        m = [
            [beta * m[i][j] - s * sum(m[i][a] * outer[a][j] for a in range(cols)) + g[i][j] for j in range(cols)]
            for i in range(rows)
        ]
        same(directions[t].reshape(rows, cols), torch.tensor(m, dtype=torch.float64), 1e-10)


def test_delta_momentum_elementwise(grads):
    directions, m = run(delta_momentum(0.9, 0.5, "unit", elementwise=True), grads), torch.zeros_like(grads[0])
    for t, g in enumerate(grads):
        unit = g / g.norm()
        m = 0.9 * m - 0.5 * m * unit**2 + g
        same(directions[t], m)


def test_delta_momentum_of_zero_gradients_is_finite():
    assert torch.equal(run(delta_momentum(), [torch.zeros(3, 4)] * 3), torch.zeros(3, 3, 4))


def test_muon_is_the_polar_factor_in_the_limit(grads):
    """With the classical iteration run to its end, orthogonalisation is UVᵀ."""
    level = muon(0.9, nesterov=False, steps=60, coefficients=(1.5, -0.5, 0.0), scale=None)
    m = torch.zeros_like(grads[0])
    for t, direction in enumerate(run(level, grads)):
        m = 0.9 * m + 0.1 * grads[t]
        u, _, vt = torch.linalg.svd(m, full_matrices=False)
        same(direction, u @ vt, 1e-8)


@pytest.mark.parametrize("shape", [(12, 3), (3, 12)])
def test_muon_scales(shape):
    grads = [torch.randn(shape, dtype=torch.float64)]
    plain = run(muon(scale=None), grads)
    same(run(muon(scale="original"), grads), math.sqrt(max(1, shape[0] / shape[1])) * plain)
    same(run(muon(scale="match_rms_adamw"), grads), 0.2 * math.sqrt(12) * plain)
    same(run(muon(scale="spectral_unclamped"), grads), math.sqrt(shape[0] / shape[1]) * plain)


def test_newton_schulz_by_its_polynomial():
    """Each step applies an odd polynomial to the singular values and leaves the singular vectors."""
    g = torch.randn(5, 3, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    s = s / g.norm()
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    same(run(newton_schulz(steps=3), [g])[0], u @ torch.diag(s) @ vt, 1e-10)


# -- named levels are choices of parts ---------------------------------------------------------------------------------


PARTS = {
    "momentum = vector + dot + decay": (
        momentum(0.8),
        AssociativeMemory(memory=Vector(), objective=Dot(), retention=Decay(0.8)),
    ),
    "dampened momentum = the same with lr": (
        momentum(0.8, 0.4),
        AssociativeMemory(memory=Vector(), objective=Dot(), retention=Decay(0.8), lr=0.6),
    ),
    "momentum = matrix + dot + decay": (
        momentum(0.8),
        AssociativeMemory(memory=Matrix(), objective=Dot(), retention=Decay(0.8)),
    ),
    "momentum = linear attention with decay": (momentum(0.8), linear_attention(retention=Decay(0.8))),
    "an average = vector + l2": (momentum(0.8, 0.8), AssociativeMemory(memory=Vector(), objective=L2(), lr=0.2)),
    "delta momentum = matrix + l2": (
        delta_momentum(1.0, 1.0, None),
        AssociativeMemory(memory=Matrix(), objective=L2()),
    ),
    "delta momentum = deltanet": (delta_momentum(1.0, 1.0, None), deltanet(lr=1.0)),
    "delta momentum with decay = matrix + l2 + decay": (
        delta_momentum(0.9, 1.0, None),
        AssociativeMemory(memory=Matrix(), objective=L2(), retention=Decay(0.9)),
    ),
    "muon = momentum, then newton_schulz": (
        muon(0.9, scale=None),
        chain(momentum(0.9, nesterov=True), newton_schulz()),
    ),
    "muon = matrix + dot + decay, read by newton_schulz": (
        muon(0.9, nesterov=False, scale=None),
        AssociativeMemory(memory=Matrix(), retention=Decay(0.9), lr=0.1, output=NewtonSchulzOutput()),
    ),
    "adam without memory = sign": (
        adam((0.0, 0.0), 0.0),
        AssociativeMemory(memory=Vector(), retention=Decay(0.0), output=Sign()),
    ),
    "cms of muons = muons in parallel": (
        cms((1, 3), weights=(1, 0.5)),
        parallel(muon(), muon(period=3), weights=(1, 0.5)),
    ),
    "a rule with a memory": (
        AssociativeMemory(memory=Vector(), objective=Dot(), rule=momentum(0.5)),
        chain(momentum(0.5), momentum(1.0)),
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_named_levels_are_choices_of_parts(name, grads):
    grads = [0.3 * g for g in grads]  # so that the unbounded delta rule stays finite
    named, generic = PARTS[name]
    tolerance = 1e-6 if "newton" in name else 1e-12  # Newton-Schulz multiplies rounding
    same(run(generic, grads), run(named, grads), tolerance)


def test_rms_norm_output(grads):
    level = AssociativeMemory(memory=Vector(), retention=Decay(0.9), output=RmsNorm())
    m = torch.zeros_like(grads[0])
    for g, direction in zip(grads, run(level, grads), strict=True):
        m = 0.9 * m + g
        same(direction, m / m.square().mean().sqrt(), 1e-10)


def test_deep_momentum_row_by_row():
    """eq. 50 with hand-written gradients of the two-layer memory, gradient descent as rule."""
    keep, lr = 0.95, 0.01
    memory = Mlp(hidden=3, residual=False, activation="tanh")
    level = deep_momentum(memory=memory, rule=gd(), retention=Decay(keep), step_size=lr, mode="paper")
    grads = [torch.randn(OUT, IN, dtype=torch.float64) for _ in range(STEPS)]
    state = start(level, grads[0])
    w1, w2 = state["memory"]["W1"].clone(), state["memory"]["W2"].clone()
    assert torch.equal(w1, torch.zeros_like(w1))
    for t, g in enumerate(grads, start=1):
        direction, state = advance(level, g, state, Signal(t, g))
        scale = math.sqrt(sum(float(x) ** 2 for x in g.flatten()) / g.numel())
        d1, d2 = torch.zeros_like(w1), torch.zeros_like(w2)
        for row in g / scale:
            hidden = torch.tanh(w2 @ row)
            error = w1 @ hidden - row
            d1 += torch.outer(error, hidden)
            d2 += torch.outer((w1.T @ error) * (1 - hidden**2), row)
        w1, w2 = keep * w1 - lr * d1, keep * w2 - lr * d2
        want = torch.stack([scale * (w1 @ torch.tanh(w2 @ (row / scale))) for row in g])
        same(direction, want, 1e-10)


def test_deep_momentum_learns_the_next_gradient_from_the_average():
    """Row by row, with hand-written gradients; one of the gradients is a thousand times as long."""
    keep, lr, beta = 0.95, 0.01, 0.8
    memory = Mlp(hidden=3, residual=False, activation="tanh")
    level = deep_momentum(memory=memory, rule=gd(), retention=Decay(keep), step_size=lr, beta=beta)
    grads = [torch.randn(OUT, IN, dtype=torch.float64) for _ in range(STEPS)]
    grads[STEPS // 2] *= 1e3
    state, average = start(level, grads[0]), torch.zeros_like(grads[0])
    w1, w2 = state["memory"]["W1"].clone(), state["memory"]["W2"].clone()

    def rms(x):
        return math.sqrt(sum(float(entry) ** 2 for entry in x.flatten()) / x.numel())

    for t, g in enumerate(grads, start=1):
        direction, state = advance(level, g, state, Signal(t, g))
        scale = max(rms(average), rms(g) / 10)
        d1, d2 = torch.zeros_like(w1), torch.zeros_like(w2)
        for key, row in zip(average / scale, g / scale, strict=True):
            hidden = torch.tanh(w2 @ key)
            error = key + w1 @ hidden - row
            d1 += torch.outer(error, hidden)
            d2 += torch.outer((w1.T @ error) * (1 - hidden**2), key)
        w1, w2 = keep * w1 - lr * d1, keep * w2 - lr * d2
        average = beta * average + (1 - beta) * g
        keys = average / max(rms(average), rms(g) / 10)
        want = torch.stack([key + w1 @ torch.tanh(w2 @ key) for key in keys])
        same(direction, want * rms(average) / rms(want), 1e-10)


def test_deep_momentum_that_learns_nothing_is_momentum():
    grads = [torch.randn(OUT, IN, dtype=torch.float64) for _ in range(STEPS)]
    plain = run(momentum(0.9, dampening=0.9), grads)
    for got, want in zip(run(deep_momentum(step_size=0.0), grads), plain, strict=True):
        same(got, want, 1e-10)


def test_modes_of_deep_momentum():
    with pytest.warns(UserWarning, match="deep_momentum: mode='paper' is"):
        paper = deep_momentum(mode="paper")
    with as_saved():
        assert build("level", "deep_momentum") == deep_momentum(mode="paper", step_size=0.02)
        assert build("level", to_spec(deep_momentum())) == deep_momentum()
    assert "average" not in start(paper, torch.zeros(3, 4))
    weight = torch.nn.Parameter(torch.randn(3, 4))
    old, now = DeepMomentum([weight], mode="paper", step_size=0.02), DeepMomentum([weight])
    weight.grad = torch.randn(3, 4)
    old.step()
    saved = old.state_dict()
    for key in ("mode", "beta"):
        del saved["param_groups"][0][key]  # as it was before there were two modes
    now.load_state_dict(saved)
    assert now.level(now.param_groups[0]) == old.level(old.param_groups[0])


def test_window_attends_to_the_last_gradients(grads):
    directions = run(attention(memory=Window(3)), grads)
    for t, g in enumerate(grads):
        last = grads[max(0, t - 2) : t + 1]
        unit = [x / x.square().mean().sqrt() for x in [*last, g]]
        scores = torch.stack([(x * unit[-1]).sum() / math.sqrt(g.numel()) for x in unit[:-1]]).softmax(0)
        same(directions[t], sum(s * x for s, x in zip(scores, last, strict=True)))


def test_deep_momentum_trains():
    """A regression by deep momentum: it must learn, not only run."""
    inputs, target = torch.randn(64, 8), torch.randn(5, 8)
    w, level = torch.zeros(5, 8), deep_momentum()
    state = start(level, w)

    def loss(w):
        return (inputs @ (w - target).T).square().mean()

    before = loss(w)
    for t in range(1, 301):
        grad = torch.func.grad(loss)(w)
        direction, state = advance(level, grad, state, Signal(t, w))
        w = w - 0.5 * direction
    assert loss(w) < 0.02 * before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: momentum(-0.1), ["momentum", "beta=-0.1", "[0"]),
        (lambda: adam((0.9, 1.0)), ["betas[1]=1.0", "[0, 1)"]),
        (lambda: adam(eps=-1.0), ["eps=-1.0"]),
        (lambda: delta_momentum(1.5), ["beta=1.5", "[0, 1]"]),
        (lambda: delta_momentum(normalize="clap"), ["'clap'", "Did you mean 'clip'"]),
        (lambda: muon(steps=-1), ["steps=-1"]),
        (lambda: muon(dtype="bf16"), ["dtype='bf16'", "bfloat16"]),
        (lambda: momentum(period=0), ["period=0", "1 or more"]),
        (lambda: cms(()), ["periods=()"]),
        (lambda: parallel(momentum(), adam(), weights=[1]), ["1 numbers for 2 levels", "momentum, adam"]),
    ],
)
def test_wrong_values_say_what_is_allowed(make, words):
    with pytest.raises(ValueError, match="=") as error:
        make()
    for word in words:
        assert word in str(error.value)
