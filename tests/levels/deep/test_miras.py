"""Yaad, Moneta, Memora and Atlas by their papers' equations, in loops of torch's autograd; and kinds of memories."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, normalize, silu

from nestopt.core import AssociativeMemory, chain
from nestopt.core.part import FieldError
from nestopt.levels import atlas, clip, ggd, memora, momentum, moneta, muon, omega, titans, ttt, yaad
from nestopt.nn import SequenceMemory
from nestopt.ops import fast_form, run
from nestopt.parts import Decay, ElasticNet, Factored, Huber, Kl, Lq, Mlp, Random, Swiglu

F64 = torch.float64
D, HIDDEN, LENGTH = 4, 8, 7
RATE, KEEP = 0.05, 0.9
Theta = dict[str, Tensor]


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(LENGTH, D, dtype=F64) for _ in range(3))
    return normalize(q, dim=-1), normalize(k, dim=-1), v


def started(level: AssociativeMemory) -> Theta:
    torch.manual_seed(1)
    return {name: w.double() for name, w in level.learned_start(D, D).items()}


def by_level(level: AssociativeMemory, start: Theta) -> Tensor:
    learned = {name: w[None] for name, w in start.items()}
    q, k, v = (x[None, :, None] for x in pairs())
    y, _ = run(level, q, k, v, learned=learned)
    return y[0, :, 0]


def of_miras(theta: Theta, x: Tensor) -> Tensor:
    """x + LN(W1 gelu(W2 x))."""
    return x + layer_norm(theta["W1"] @ gelu(theta["W2"] @ x), (D,), eps=1e-6)


def slope(loss: Callable[[Theta], Tensor], theta: Theta) -> Theta:
    leaves = {name: w.detach().requires_grad_() for name, w in theta.items()}
    found = torch.autograd.grad(loss(leaves), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def cubes(y: Tensor, v: Tensor) -> Tensor:
    return (y - v).abs().pow(3).sum() / 3


def squares(y: Tensor, v: Tensor) -> Tensor:
    return (y - v).square().sum() / 2


def long_errors(y: Tensor, v: Tensor) -> Tensor:
    length = (y - v).norm()
    return length**2 / 2 if length <= 2.5 else 2.5 * (length - 1.25)


def in_chunks(
    a: Theta,
    mirror: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    chunk: int,
    kept: Callable[[Tensor], Tensor] = lambda a: KEEP * a,
) -> Tensor:
    """A ← kept(A) - η Σ ∇ℓ at W = mirror(A) after each chunk; reads are of W, the last after its write."""
    q, k, v = pairs()
    ys = []
    w = {name: mirror(x) for name, x in a.items()}
    for first in range(0, LENGTH, chunk):
        rows = range(first, min(first + chunk, LENGTH))
        ys += [of_miras(w, q[t]) for t in rows]
        if len(rows) == chunk:
            down = slope(lambda th: sum(loss(of_miras(th, k[t]), v[t]) for t in rows), w)  # noqa: B023
            a = {name: kept(a[name]) - RATE * down[name] for name in a}
            w = {name: mirror(x) for name, x in a.items()}
            ys[-1] = of_miras(w, q[rows[-1]])
    return torch.stack(ys)


def over_a_norm(a: Tensor) -> Tensor:
    """A / ‖A‖₄²."""
    return a / a.flatten().abs().pow(4).sum().sqrt()


def shares(a: Tensor) -> Tensor:
    return torch.stack([row.exp() / row.exp().sum() for row in a])


LETTER = {"normalized": False, "lr": RATE}


@pytest.mark.parametrize("chunk", [1, 3])
def test_moneta(chunk: int) -> None:
    level = moneta(**LETTER, chunk=chunk, retention=Lq(KEEP))
    start = started(level)
    want = in_chunks(start, over_a_norm, cubes, chunk)
    torch.testing.assert_close(by_level(level, start), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 3])
def test_memora(chunk: int) -> None:
    """By A, and by the equation's own log of W."""
    level = memora(**LETTER, chunk=chunk, retention=Kl(KEEP))
    learned = started(level)
    start = {name: math.sqrt(w.shape[1]) * w for name, w in learned.items()}
    torch.testing.assert_close(by_level(level, learned), in_chunks(start, shares, squares, chunk), rtol=0, atol=1e-9)
    q, k, v = pairs()
    w, ys = {name: shares(a) for name, a in start.items()}, []
    for t in range(LENGTH):
        down = slope(lambda th: squares(of_miras(th, k[t]), v[t]), w)  # noqa: B023
        w = {name: torch.softmax(KEEP * w[name].log() - RATE * down[name], -1) for name in w}
        ys.append(of_miras(w, q[t]))
    if chunk == 1:
        torch.testing.assert_close(by_level(level, learned), torch.stack(ys), rtol=0, atol=1e-9)


def test_yaad() -> None:
    level = yaad(**LETTER, chunk=1, forget="all", objective=Huber(2.5, "norm"), retention=Decay(KEEP))
    start = started(level)
    want = in_chunks(start, lambda a: a, long_errors, 1)
    torch.testing.assert_close(by_level(level, start), want, rtol=0, atol=1e-9)
    lengths = {bool((of_miras(start, k) - v).norm() > 2.5) for k, v in zip(*pairs()[1:], strict=True)}
    assert lengths == {True, False}


def test_an_elastic_net_sets_small_entries_to_zero() -> None:
    level = ttt(
        memory=Mlp(activation="gelu", norm="layer"), **LETTER, chunk=1, retention=ElasticNet(KEEP, 0.01), read="after"
    )
    start, (q, k, v) = started(level), pairs()
    w, ys = start, []
    for t in range(LENGTH):
        down = slope(lambda th: squares(of_miras(th, k[t]), v[t]), w)  # noqa: B023
        z = {name: KEEP * w[name] - RATE * down[name] for name in w}
        w = {name: x.sign() * (x.abs() - 0.01).clamp_min(0) for name, x in z.items()}
        ys.append(of_miras(w, q[t]))
    assert any(bool((x == 0).any()) for x in w.values())
    torch.testing.assert_close(by_level(level, start), torch.stack(ys), rtol=0, atol=1e-9)


def orthogonal(s: Tensor) -> Tensor:
    """Newton and Schulz's iteration as Muon has it, without transposing."""
    x = s / s.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


@pytest.mark.parametrize("nesterov", [True, False])
def test_atlas(nesterov: bool) -> None:
    level = atlas(
        Mlp(HIDDEN, residual=False),
        rule=muon(0.9, nesterov),
        retention=Decay(KEEP),
        lr=0.5,
        step_size=0.1,
        chunk=3,
        forget="all",
    )
    start, (q, k, v) = started(level), pairs()

    def read(theta: Theta, x: Tensor) -> Tensor:
        return theta["W1"] @ silu(theta["W2"] @ torch.outer(x, x).flatten())

    w, s, ys = start, {name: torch.zeros_like(x) for name, x in start.items()}, []
    for first in range(0, LENGTH, 3):
        rows = range(first, min(first + 3, LENGTH))
        ys += [read(w, q[t]) for t in rows]
        if len(rows) == 3:
            g = slope(lambda th: 0.5 * sum(squares(read(th, k[t]), v[t]) for t in rows), w)  # noqa: B023
            s = {name: 0.9 * s[name] + g[name] for name in s}
            seen = {name: g[name] + 0.9 * s[name] if nesterov else s[name] for name in s}
            scale = {name: muon_scale(x) for name, x in w.items()}
            w = {name: KEEP * w[name] - 0.1 * scale[name] * orthogonal(seen[name]) for name in w}
            ys[-1] = read(w, q[rows[-1]])
    torch.testing.assert_close(by_level(level, start), torch.stack(ys), rtol=0, atol=1e-6)


def muon_scale(w: Tensor) -> float:
    return math.sqrt(max(1.0, w.shape[0] / w.shape[1]))


def test_surprise_is_clipped_a_chunk_at_a_time() -> None:
    """S ← θ S + clip(Σ η ∇ℓ), W ← α W - S, with the norm of each weight's surprise at most 0.1."""
    rule = chain([clip(0.1), momentum(0.7)])
    level = titans(
        Mlp(HIDDEN, residual=False), rule=rule, retention=Decay(KEEP), **LETTER, chunk=3, write="chunk", forget="all"
    )
    assert fast_form(level) == "rule_by_chunk"
    start, (q, k, v) = started(level), pairs()

    def read(theta: Theta, x: Tensor) -> Tensor:
        return theta["W1"] @ silu(theta["W2"] @ x)

    w, s, ys = start, {name: torch.zeros_like(x) for name, x in start.items()}, []
    clipped = []
    for first in range(0, LENGTH, 3):
        rows = range(first, min(first + 3, LENGTH))
        ys += [read(w, q[t]) for t in rows]
        if len(rows) == 3:
            g = slope(lambda th: RATE * sum(squares(read(th, k[t]), v[t]) for t in rows), w)  # noqa: B023
            clipped += [bool(x.norm() > 0.1) for x in g.values()]
            s = {name: 0.7 * s[name] + g[name] * min(1.0, 0.1 / float(g[name].norm())) for name in s}
            w = {name: KEEP * w[name] - s[name] for name in w}
            ys[-1] = read(w, q[rows[-1]])
    assert set(clipped) == {True, False}
    torch.testing.assert_close(by_level(level, start), torch.stack(ys), rtol=0, atol=1e-9)


def one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(1, dtype=F64)])


MEMORIES: dict[str, tuple[Mlp, Callable[[Theta, Tensor], Tensor]]] = {
    "ttt's own": (Mlp(norm="layer", activation="gelu"), of_miras),
    "with biases": (
        Mlp(residual=False, bias=True),
        lambda th, x: th["W1"] @ one(silu(th["W2"] @ one(x))),
    ),
    "factored": (
        Factored(rank=2, activation="tanh"),
        lambda th, x: x + th["W1"] @ (th["W2"] @ torch.tanh(th["W3"] @ (th["W4"] @ x))),
    ),
    "swiglu": (
        Swiglu(norm="layer"),
        lambda th, x: x + layer_norm(th["W1"] @ (silu(th["W2"] @ x) * (th["W3"] @ x)), (D,), eps=1e-6),
    ),
    "swiglu with biases": (
        Swiglu(bias=True, residual=False),
        lambda th, x: th["W1"] @ one(silu(th["W2"] @ one(x)) * (th["W3"] @ one(x))),
    ),
}


@pytest.mark.parametrize("name", MEMORIES)
def test_a_memory_is_what_it_says(name: str) -> None:
    """Its read, and of each weight its input and a bound of the read's derivative by what the weight gives."""
    memory, formula = MEMORIES[name]
    torch.manual_seed(0)
    theta = {key: 0.5 * torch.randn_like(w, dtype=F64) for key, w in memory.start(D, D, torch.empty(0)).items()}
    x = torch.randn(3, D, dtype=F64)
    torch.testing.assert_close(
        memory.read(theta, x), torch.stack([formula(theta, one) for one in x]), rtol=0, atol=1e-12
    )
    layers = memory.layers(theta, x)
    assert sorted(layers) == sorted(theta)
    for i, row in enumerate(x):

        def at_row(*w: Tensor, row: Tensor = row) -> Tensor:
            return formula(dict(zip(theta, w, strict=True)), row)

        by = dict(zip(theta, torch.autograd.functional.jacobian(at_row, tuple(theta.values())), strict=True))
        for key, (a, j) in layers.items():
            slopes = by[key]
            found = (slopes @ a[i]) / a[i].square().sum()  # ∂y/∂(W a) `[D, out]`
            torch.testing.assert_close(
                slopes, found[..., None] * a[i], rtol=0, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}"
            )
            assert torch.linalg.matrix_norm(found, 2) <= j[i] * (1 + 1e-9), key


@pytest.mark.parametrize("name", MEMORIES)
def test_a_memory_learns_at_chunk_speed_and_lets_every_weight_learn(name: str) -> None:
    memory, _ = MEMORIES[name]
    torch.manual_seed(0)
    layer = SequenceMemory(titans(memory, chunk=4, write="chunk"), 8, 2)
    closed = type(memory) is Mlp and not memory.bias
    assert layer.form.choice.name == "rule_by_chunk"
    assert fast_form(titans(memory)) == ("deep_memory" if closed else None)
    layer(torch.randn(2, 13, 8))[0].square().sum().backward()
    assert [path for path, p in layer.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("retention", [Lq(KEEP), Kl(KEEP), ElasticNet(KEEP)], ids=str)
def test_a_retention_that_is_more_than_a_share_is_computed_or_refused(retention: Lq) -> None:
    for level in (titans(normalized=False, retention=retention), omega(retention=retention)):
        assert fast_form(level) is None
    for make in (
        lambda: titans(retention=retention),
        lambda: AssociativeMemory(retention=retention, fade="before"),
        lambda: ggd(retention=retention),
    ):
        with pytest.raises(FieldError, match="retention"):
            make()


def test_a_clock_of_steps_is_not_for_what_writes_once_a_chunk() -> None:
    with pytest.raises(FieldError, match="period=2 is not allowed on tokens: write='chunk'"):
        SequenceMemory(moneta(period=2), 8, 2)


def test_layers_of_retentions_stream_and_rows_are_their_own() -> None:
    for level in (moneta(chunk=3), memora(chunk=3), atlas(Mlp(6, residual=False), chunk=3), yaad(chunk=3)):
        torch.manual_seed(0)
        layer = SequenceMemory(level, 8, 2).double()
        x = torch.randn(2, 10, 8, dtype=F64)
        whole, _ = layer(x)
        first, state = layer(x[:, :4])
        second, _ = layer(x[:, 4:], state)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-9)
        mask = torch.tensor([[True] * 10, [False] * 3 + [True] * 7])
        torch.testing.assert_close(layer(x, mask=mask)[0][1, 3:], layer(x[1:, 3:])[0][0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("of", ["fourier", "positive"])
def test_random_features_have_a_kernel_in_the_mean(of: str) -> None:
    """e^{-‖k - q‖²/2} and e^{k·q}, over many seeds; of one seed always the same."""
    k = 0.5 * pairs()[1]
    found = sum(Random(64, of, seed)(k) @ Random(64, of, seed)(k).T for seed in range(200)) / 200
    want = (k @ k.T).exp() if of == "positive" else (-0.5 * torch.cdist(k, k).square()).exp()
    torch.testing.assert_close(found, want, rtol=0.05, atol=0.03)
    torch.testing.assert_close(Random(64, of, 3)(k.float()).double(), Random(64, of, 3)(k), rtol=1e-5, atol=1e-5)
    layer = SequenceMemory(atlas(Mlp(8, residual=False), features=Random(5, of), chunk=4), 8, 2)
    assert layer.start["W2"].shape == (2, 8, 5)
    layer(torch.randn(2, 9, 8))[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
