"""Levels on tokens: against float64 token loops written from their equations, and what must hold for any level."""

import math

import pytest
import torch

from nestopt.core import AssociativeMemory, Gate, Level, Signal, advance, chain, gates_of, nest, parallel, scan, start
from nestopt.core.features import Elu, Polynomial
from nestopt.core.memories import Matrix, Mlp, Window
from nestopt.core.objectives import L2
from nestopt.core.retentions import Decay
from nestopt.core.tree import leaves
from nestopt.levels import (
    adam,
    attention,
    cms,
    deep_momentum,
    delta_momentum,
    deltanet,
    gd,
    linear_attention,
    momentum,
    muon,
    titans,
    ttt,
)

B, T, H, D = 2, 7, 2, 4


@pytest.fixture
def qkv():
    q, k, v = (torch.randn(B, T, H, D, dtype=torch.float64) for _ in range(3))
    return q, torch.nn.functional.normalize(k, dim=-1), v


def start_of(level, dim=D):
    """A layer's learned start, one per head."""
    starts = [level.learned_start(dim, dim) for _ in range(H)]
    return {name: torch.stack([s[name].double() for s in starts]) for name in starts[0]}


def same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def matrix_loop(q, k, v, write):
    """y_t = M_t q_t with M_t = write(M, k_t, v_t, index), one sequence and head at a time."""
    y = torch.empty_like(v)
    for b in range(B):
        for h in range(H):
            m = torch.zeros(D, D, dtype=q.dtype)
            for t in range(T):
                m = write(m, k[b, t, h], v[b, t, h], (b, t, h))
                y[b, t, h] = m @ q[b, t, h]
    return y


def test_linear_attention(qkv):
    same(scan(linear_attention(), *qkv)[0], matrix_loop(*qkv, lambda m, k, v, _: m + torch.outer(v, k)))


def test_linear_attention_with_gates_and_features(qkv):
    q, k, v = qkv
    alpha, eta = torch.rand(B, T, H, dtype=torch.float64), torch.rand(B, T, H, dtype=torch.float64)
    level = linear_attention(retention=Decay(Gate(0.9)), lr=Gate(0.5), features=Elu())
    y, _ = scan(level, q, k, v, gates={"retention.keep": alpha, "lr": eta})
    phi = [torch.nn.functional.elu(x) + 1 for x in (q, k)]
    same(y, matrix_loop(*phi, v, lambda m, k, v, i: alpha[i] * m + eta[i] * torch.outer(v, k)))


def test_polynomial_features_are_a_kernel():
    k, q = torch.randn(3, D, dtype=torch.float64), torch.randn(3, D, dtype=torch.float64)
    for degree in (1, 2, 3):
        phi = Polynomial(degree)
        assert phi(k).shape[-1] == phi.dim(D)
        same((phi(k) * phi(q)).sum(-1), (k * q).sum(-1) ** degree)


def test_deltanet(qkv):
    eta = 2 * torch.rand(B, T, H, dtype=torch.float64)
    y, _ = scan(deltanet(lr=Gate(0.5, 0, 2)), *qkv, gates={"lr": eta})
    eye = torch.eye(D, dtype=torch.float64)
    want = matrix_loop(*qkv, lambda m, k, v, i: m @ (eye - eta[i] * torch.outer(k, k)) + eta[i] * torch.outer(v, k))
    same(y, want)


def mlp_loop(q, k, v, learned, eta, alpha, theta):
    """Titans with the two-layer memory k + W1 silu(W2 k), gradients by hand."""
    y = torch.empty_like(v)
    for b in range(B):
        for h in range(H):
            w1, w2 = learned["W1"][h], learned["W2"][h]
            s1, s2 = torch.zeros_like(w1), torch.zeros_like(w2)
            for t in range(T):
                key, i = k[b, t, h], (b, t, h)
                z = w2 @ key
                sig = 1 / (1 + torch.exp(-z))
                a = z * sig
                error = key + w1 @ a - v[b, t, h]
                s1n = theta[i] * s1 + eta[i] * torch.outer(error, a)
                s2 = theta[i] * s2 + eta[i] * torch.outer((w1.T @ error) * sig * (1 + z * (1 - sig)), key)
                s1 = s1n
                w1, w2 = alpha[i] * w1 - s1, alpha[i] * w2 - s2
                z = w2 @ q[b, t, h]
                y[b, t, h] = q[b, t, h] + w1 @ (z / (1 + torch.exp(-z)))
    return y


def test_titans_and_ttt(qkv):
    eta, alpha, theta = (torch.rand(B, T, H, dtype=torch.float64) for _ in range(3))
    eta, zero, one = 0.3 * eta, torch.zeros_like(eta), torch.ones_like(eta)
    learned = start_of(titans())
    assert set(gates_of(titans())) == {"lr", "retention.keep", "rule.beta"}
    letter = {"memory": Mlp(), "chunk": 1, "normalized": False, "forget": "all"}
    gates = {"lr": eta, "retention.keep": alpha, "rule.beta": theta}
    y, _ = scan(titans(**letter), *qkv, gates=gates, learned=learned)
    same(y, mlp_loop(*qkv, learned, eta, alpha, theta))
    y, _ = scan(ttt(**letter), *qkv, gates={"lr": eta}, learned=learned)
    same(y, mlp_loop(*qkv, learned, eta, one, zero))


@pytest.mark.parametrize("size", [None, 3])
def test_attention(qkv, size):
    q, k, v = qkv
    y, _ = scan(attention(memory=Window(size)), q, k, v)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                first = 0 if size is None else max(0, t - size + 1)
                keys, values = k[b, first : t + 1, h], v[b, first : t + 1, h]
                weights = [math.exp(float(key @ q[b, t, h]) / math.sqrt(D)) for key in keys]
                want = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
                same(y[b, t, h], want)


@pytest.mark.parametrize("read", ["after", "before", "chunk"])
def test_chunks_take_gradients_at_the_state_they_began_with(qkv, read):
    q, k, v = qkv
    chunk, keep, lr = 3, 0.9, 0.4
    level = AssociativeMemory(memory=Matrix(), objective=L2(), retention=Decay(keep), lr=lr, chunk=chunk, read=read)
    y, _ = scan(level, q, k, v)
    for b in range(B):
        for h in range(H):
            m = torch.zeros(D, D, dtype=torch.float64)
            for t in range(T):
                at = m if t % chunk == 0 else at  # noqa: F821  # set at t = 0
                new = keep * m - lr * torch.outer(at @ k[b, t, h] - v[b, t, h], k[b, t, h])
                same(y[b, t, h], {"after": new, "before": m, "chunk": at}[read] @ q[b, t, h])
                m = new


def test_a_memory_with_a_period_writes_the_sum_when_due(qkv):
    q, k, v = qkv
    period, lr = 3, 0.2
    y, _ = scan(AssociativeMemory(memory=Matrix(), objective=L2(), lr=lr, period=period), q, k, v)
    for b in range(B):
        for h in range(H):
            m, total = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
            for t in range(T):
                total = total + torch.outer(m @ k[b, t, h] - v[b, t, h], k[b, t, h])
                if (t + 1) % period == 0:
                    m, total = m - lr * total, torch.zeros_like(total)
                same(y[b, t, h], m @ q[b, t, h])


def test_any_level_on_gradients_is_a_layer(qkv):
    """The token form of a level without one of its own: it compresses v kᵀ, and its direction is read at q."""
    q, k, v = qkv
    for level in (adam((0.5, 0.8), 1e-3), chain(momentum(0.5), momentum(0.9, period=2))):
        y, _ = scan(level, q, k, v)
        for b in range(B):
            for h in range(H):
                state = start(level, torch.zeros(D, D, dtype=torch.float64))
                for t in range(T):
                    u, state = advance(level, torch.outer(v[b, t, h], k[b, t, h]), state, Signal(t + 1))
                    same(y[b, t, h], u @ q[b, t, h])


def test_the_same_level_in_both_contexts(qkv):
    q, k, v = qkv
    same(scan(momentum(0.9), *qkv)[0], scan(linear_attention(retention=Decay(0.9)), *qkv)[0])
    unit_v = torch.nn.functional.normalize(v, dim=-1)
    same(scan(delta_momentum(1.0, 1.0), q, k, unit_v)[0], scan(deltanet(lr=1.0), q, k, unit_v)[0])


ANY = {
    "gd": gd(),
    "momentum": momentum(0.9),
    "momentum, gated": momentum(Gate(0.9)),
    "adam": adam(),
    "muon": muon(steps=2),
    "delta_momentum": delta_momentum(),
    "attention": attention(),
    "window attention": attention(memory=Window(2)),
    "linear_attention": linear_attention(),
    "deltanet": deltanet(),
    "ttt": ttt(),
    "titans": titans(),
    "titans, chunks": titans(chunk=3, read="chunk"),
    "titans on a clock": titans(period=2),
    "titans by adam": titans(rule=adam(), step_size=0.05),
    "titans by a nest": titans(rule=nest(momentum(0.5, period=2), chain(momentum(0.5), adam())), step_size=0.05),
    "deep titans": titans(memory=Mlp(depth=3, hidden=5, activation="gelu")),
    "deep_momentum": deep_momentum(),
    "cms": cms((1, 2)),
    "parallel": parallel(momentum(0.5), adam(period=2), weights=[1.0, 0.5]),
}


@pytest.mark.parametrize("name", ANY)
def test_streaming_causality_and_batch_independence(name, qkv):
    q, k, v = qkv
    level = ANY[name]
    learned = start_of(level)
    torch.manual_seed(1)  # a memory that starts at random must start the same each time
    y, state = scan(level, q, k, v, learned=learned)
    assert y.shape == v.shape
    assert y.isfinite().all()

    def again(*tensors, **kwargs):
        torch.manual_seed(1)
        return scan(level, *tensors, learned=learned, **kwargs)

    for cut in (1, 3):
        first, middle = again(*(x[:, :cut] for x in (q, k, v)))
        second, last = again(*(x[:, cut:] for x in (q, k, v)), state=middle)
        # the reference machine takes a chunk's tokens together: in another grouping, sums are rounded otherwise
        same(torch.cat([first, second], 1), y, 1e-13)
        torch.testing.assert_close(last, state, rtol=1e-13, atol=1e-13)

    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[0, 4] += 1.0
    other, _ = again(*changed)
    assert torch.equal(other[0, :4], y[0, :4])
    assert torch.equal(other[1], y[1])
    if level.label not in ("cms", "gd"):
        assert not torch.equal(other[0, 5:], y[0, 5:])  # later tokens do remember

    one, _ = again(*(x[1:] for x in (q, k, v)))
    same(one, y[1:])


@pytest.mark.parametrize("name", [n for n in ANY if n not in ("cms", "gd")])
def test_outer_gradients(name):
    """The outer gradient passes through every inner step, to tokens, gates and the learned start."""
    level = ANY[name]
    q, k, v = (torch.randn(1, 4, H, 3, dtype=torch.float64) for _ in range(3))
    gates = {path: torch.full((1, 4, H), 0.4, dtype=torch.float64) for path in gates_of(level)}
    learned = start_of(level, 3)
    if name == "muon":  # float64 all the way
        assert scan(level, q, k, v)[0].dtype == torch.float64

    def run(q, k, v, *rest):
        g = dict(zip(gates, rest, strict=False))
        w = dict(zip(learned, rest[len(gates) :], strict=True))
        return scan(level, q, k, v, gates=g, learned=w)[0]

    inputs = [x.requires_grad_() for x in (q, k, v, *gates.values(), *learned.values())]
    found = torch.autograd.grad(run(*inputs).square().sum(), inputs)
    for x, g in zip(inputs, found, strict=True):
        assert g.isfinite().all()
        assert g.norm() > 0, tuple(x.shape)
    if name not in ("deep_momentum",):  # starts at random inside the graph: checked on its own, seeded
        assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-5, rtol=1e-3, fast_mode=True)


def test_adam_has_a_finite_gradient_where_its_second_moment_is_zero():
    q, k, v = (torch.zeros(1, 3, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    y, _ = scan(adam(), q, k, v)
    for g in torch.autograd.grad(y.sum(), (q, k, v)):
        assert g.isfinite().all()


def test_mistakes_are_named(qkv):
    with pytest.raises(ValueError, match="no token"):
        scan(momentum(), *(x[:, :0] for x in qkv))
    with pytest.raises(ValueError, match=r"attention: lr=0\.5 .* learns by no rule"):
        attention(lr=0.5)
    with pytest.raises(ValueError, match=r"attention: period=2 .* takes every pair"):
        scan(attention(period=2), *qkv)


def test_state_is_plain_tensors_per_sequence_and_head(qkv):
    _, state = scan(titans(rule=adam()), *qkv, learned=start_of(titans()))
    assert torch.equal(state["step"], torch.full((B, H), T))
    assert state["level"]["memory"]["W1"].shape == (B, H, D, 2 * D)
    assert state["level"]["rule"]["W2"]["exp_avg"].shape == (B, H, 2 * D, D)


class Lion(Level):
    """A level as a plugin's author would write it."""

    beta: float = 0.9

    def init(self, param):
        return {"m": torch.zeros_like(param)}

    def step(self, grad, state, signal):
        m = self.beta * state["m"] + (1 - self.beta) * grad
        return (0.9 * state["m"] + 0.1 * grad).sign(), {"m": m}


def test_a_level_of_ones_own_needs_no_token_code(qkv):
    y, state = scan(Lion(), *qkv)
    assert y.shape == qkv[2].shape
    assert state["level"]["m"].shape == (B, H, D, D)
    y, _ = scan(titans(rule=Lion(0.5), step_size=0.01), *qkv, learned=start_of(titans()))
    assert y.isfinite().all()


@pytest.mark.parametrize("rule", [gd(), momentum(0.5), adam()], ids=["gd", "momentum", "adam"])
@pytest.mark.parametrize("read", ["after", "before", "chunk"])
def test_a_chunk_of_padding_alone_is_not_written(rule, read, qkv):
    """With write="chunk": not by the rule, which moves without a gradient, nor by what is kept of the memory."""
    parts = {"objective": L2(), "rule": rule, "retention": Decay(0.8)}
    level = AssociativeMemory(**parts, lr=0.3, chunk=3, read=read, write="chunk")
    first, second = ([x[:, part] for x in qkv] for part in (slice(0, 3), slice(3, 6)))
    dead = torch.zeros(B, 3, H, dtype=torch.bool)
    y1, written = scan(level, *first)
    y, passed = scan(level, *second, state=written, live=dead)
    assert written["level"]["memory"]["m"].count_nonzero()
    for name, leaf in leaves(passed):
        assert torch.equal(leaf, dict(leaves(written))[name]), name
    same(y, torch.einsum("bhvk,bthk->bthv", written["level"]["memory"]["m"], second[0]))
    # within one call, between two chunks that are written
    pieces = [torch.cat([a, b, a], 1) for a, b in zip(first, second, strict=True)]
    together, end = scan(level, *pieces, live=torch.cat([~dead, dead, ~dead], 1))
    y3, alone = scan(level, *first, state=written)
    same(together, torch.cat([y1, y, y3], 1))
    for name, leaf in leaves(end):
        same(leaf, dict(leaves(alone))[name])
    _, live = scan(level, *second, state=written)
    assert not torch.equal(live["level"]["memory"]["m"], passed["level"]["memory"]["m"])
