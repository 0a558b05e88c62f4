"""The README's table of levels in two contexts: each cell is shown here, or by the test that it links to."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestopt
from nestopt.core import Level, scan
from nestopt.core.memories import Mlp, Window
from nestopt.core.retentions import Decay, Keep
from nestopt.core.token_choice import make_form
from nestopt.core.token_form import FormSetting
from nestopt.levels import (
    adam,
    attention,
    cms,
    deep_momentum,
    delta_momentum,
    deltanet,
    linear_attention,
    m3,
    momentum,
    muon,
    oja,
    omega,
    retnet,
    second_moment,
    titans,
    ttt,
)

ROOT = Path(__file__).parents[1]
F64 = torch.float64
Step = Callable[[Tensor], Tensor]
"""Shown a gradient, it gives the direction; it remembers by itself."""


# -- the levels by hand: from a tensor of its shape, what remembers its gradients --------------------------------------


def a_delta_momentum(like: Tensor) -> Step:
    """m ← 0.9 m - s (m ĝᵀ) ĝ + g with s = min(1, ‖g‖²) (NL eq. 49)."""
    m = torch.zeros_like(like)

    def step(g: Tensor) -> Tensor:
        nonlocal m
        unit = g / g.norm()
        m = 0.9 * m - min(1.0, float(g.square().sum())) * (m @ unit.T) @ unit + g
        return m

    return step


def an_average(like: Tensor) -> Step:
    """M ← (1 - η) M + η g, η = ½."""
    m = torch.zeros_like(like)

    def step(g: Tensor) -> Tensor:
        nonlocal m
        m = 0.5 * m + 0.5 * g
        return m

    return step


def a_regression_on_rows(like: Tensor) -> Step:
    """M ← 0.97 M - ¼ (M gᵀ - I) g: rows of g are keys, unit vectors their values."""
    m = torch.zeros_like(like)

    def step(g: Tensor) -> Tensor:
        nonlocal m
        m = 0.97 * m - 0.25 * (m @ g.T - torch.eye(len(g), dtype=g.dtype)) @ g
        return m

    return step


def an_attention_to_gradients(like: Tensor) -> Step:
    """The mean of the last three gradients, weighted by the softmax of their cosines with the last, times √numel."""
    seen: list[Tensor] = []

    def step(g: Tensor) -> Tensor:
        seen.append(g)
        last = seen[-3:]
        cosines = torch.stack([F.cosine_similarity(x.flatten(), g.flatten(), dim=0) for x in last])
        return sum(w * x for w, x in zip((math.sqrt(g.numel()) * cosines).softmax(0), last, strict=True))  # type: ignore[return-value]

    return step


def torchs_adam(like: Tensor) -> Step:
    weight = torch.nn.Parameter(torch.zeros_like(like))
    optimizer = torch.optim.Adam([weight], lr=1.0)

    def step(g: Tensor) -> Tensor:
        before, weight.grad = weight.detach().clone(), g.clone()
        optimizer.step()
        return before - weight.detach()

    return step


def a_muon(like: Tensor, period: int = 1) -> Step:
    """Five steps of Newton-Schulz on Nesterov's 0.05 g + 0.95 m, written once a period on the sum of its gradients."""
    m, total, u, count = torch.zeros_like(like), torch.zeros_like(like), torch.zeros_like(like), 0

    def step(g: Tensor) -> Tensor:
        nonlocal m, total, u, count
        total, count = total + g, count + 1
        if count % period == 0:
            m = 0.95 * m + 0.05 * total
            x = 0.05 * total + 0.95 * m
            x = x / x.norm()
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            u, total = max(1.0, x.shape[0] / x.shape[1]) ** 0.5 * x, torch.zeros_like(total)
        return u

    return step


def two_muons(like: Tensor) -> Step:
    fast, slow = a_muon(like), a_muon(like, 3)
    return lambda g: fast(g) + slow(g)


LEVELS: dict[str, tuple[Level, Callable[[Tensor], Step]]] = {
    "delta_momentum": (delta_momentum(), a_delta_momentum),
    "oja": (oja(), an_average),
    "omega": (omega(), a_regression_on_rows),
    "attention": (attention(memory=Window(3)), an_attention_to_gradients),
    "adam": (adam(), torchs_adam),
    "muon": (muon(), a_muon),
    "cms": (cms((1, 3)), two_muons),
}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def tokens(length: int = 7, dim: int = 4, *, unit_values: bool = False) -> list[Tensor]:
    """q, k, v `[length, dim]`; keys of length 1."""
    q, k, v = torch.randn(3, length, dim, dtype=F64)
    return [q, F.normalize(k, dim=-1), F.normalize(v, dim=-1) if unit_values else v]


def run(level: Level, q: Tensor, k: Tensor, v: Tensor, **given: dict[str, Tensor]) -> Tensor:
    """`nestopt.ops.run` on one sequence and head; and the reference machine, which must say the same."""
    q, k, v = (x[None, :, None] for x in (q, k, v))
    y, _ = nestopt.ops.run(level, q, k, v, **given)
    close(y, scan(level, q, k, v, **given)[0])
    return y[0, :, 0]


# -- on gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEVELS)
def test_on_gradients(name: str) -> None:
    level, by_hand = LEVELS[name]
    weight = torch.nn.Parameter(torch.randn(3, 4, dtype=F64))
    wanted, step = weight.detach().clone(), by_hand(weight.detach())
    optimizer = nestopt.optimizer([weight], level, lr=0.1)
    for _ in range(8):
        weight.grad = 0.5 * torch.randn(3, 4, dtype=F64)
        wanted = wanted - 0.1 * step(weight.grad)
        optimizer.step()
        close(weight.detach(), wanted, 1e-6 if name in ("muon", "cms") else 1e-9)  # Newton-Schulz multiplies rounding


def test_m3_is_a_cms_under_a_second_moment() -> None:
    """Up to the length of M3's direction, which is that of its fast memory's."""
    continuum = cms((1, 3), rule=muon(0.9, nesterov=False), weights=(1.0, 0.5))
    stack = second_moment(0.8, 0.0, of=continuum, sees="gradient")
    one, fast = m3((0.9, 0.8, 0.9), 0.5, 3, eps=0.0, mode="ema"), muon(0.9, False)
    states = [level.init(torch.zeros(3, 4, dtype=F64)) for level in (stack, one, fast)]
    for t in range(1, 9):
        g, found = torch.randn(3, 4, dtype=F64), []
        for i, level in enumerate((stack, one, fast)):
            u, states[i] = level.step(g, states[i], nestopt.Signal(t))
            found.append(u)
        close(found[1], found[0] * found[2].norm() / found[0].norm(), 1e-6)


# -- on tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_as_a_layer_its_direction_is_read_at_the_query(name: str) -> None:
    """Shown v kᵀ, token by token: averages of v kᵀ divided by a root, or orthogonalised."""
    level, by_hand = LEVELS[name]
    q, k, v = tokens()
    step = by_hand(torch.zeros(4, 4, dtype=F64))
    wanted = torch.stack([step(torch.outer(v[t], k[t])) @ q[t] for t in range(len(q))])
    close(run(level, q, k, v), wanted, 1e-6 if name == "muon" else 1e-9)


def test_momentum_is_a_head_of_retnet() -> None:
    q, k, v = tokens()
    m, wanted = torch.zeros(4, 4, dtype=F64), []
    for t in range(len(q)):
        m = (1 - 2**-6) * m + torch.outer(v[t], k[t])
        wanted.append(m @ q[t])
    close(run(momentum(1 - 2**-6), q, k, v), torch.stack(wanted))
    close(run(linear_attention(retention=Decay(1 - 2**-6)), q, k, v), torch.stack(wanted))
    heads = [x[None, :, None].expand(1, -1, 2, -1) for x in (q, k, v)]
    close(nestopt.ops.run(retnet(), *heads)[0][0, :, 1], torch.stack(wanted))


def test_delta_momentum_is_deltanet() -> None:
    """For keys and values of length 1."""
    q, k, v = tokens(unit_values=True)
    m, wanted = torch.zeros(4, 4, dtype=F64), []
    for t in range(len(q)):
        m = m @ (torch.eye(4, dtype=F64) - torch.outer(k[t], k[t])) + torch.outer(v[t], k[t])
        wanted.append(m @ q[t])
    close(run(delta_momentum(beta=1.0), q, k, v), torch.stack(wanted))
    close(run(deltanet(lr=1.0), q, k, v), torch.stack(wanted))


def gradients(w1: Tensor, w2: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Of ½‖k + W1 silu(W2 k) - v‖², by hand."""
    z = w2 @ k
    s = torch.sigmoid(z)
    error = k + w1 @ (z * s) - v
    return torch.outer(error, z * s), torch.outer((w1.T @ error) * s * (1 + z * (1 - s)), k)


def learner(q: Tensor, k: Tensor, v: Tensor, start: dict[str, Tensor], keep: float, rules: list[Step]) -> Tensor:
    """y of an MLP memory that the steps of `rules` move: W ← keep W - rule(∂W), then read."""
    w1, w2, ys = start["W1"], start["W2"], []
    for t in range(len(q)):
        d1, d2 = gradients(w1, w2, k[t], v[t])
        w1, w2 = keep * w1 - rules[0](d1), keep * w2 - rules[1](d2)
        ys.append(q[t] + w1 @ F.silu(w2 @ q[t]))
    return torch.stack(ys)


def start_of(level: Level) -> dict[str, Tensor]:
    return {name: weight.double() for name, weight in level.learned_start(4, 4).items()}


def with_momentum(eta: float, theta: float) -> Step:
    s: Tensor | float = 0.0

    def step(g: Tensor) -> Tensor:
        nonlocal s
        s = theta * s + eta * g
        return s

    return step


LETTER: dict[str, Any] = {"chunk": 1, "normalized": False, "forget": "all"}
"""The equations of titans as they are printed, with `memory=Mlp()`."""


@pytest.mark.parametrize("theta", [0.0, 0.6], ids=["ttt", "titans"])
def test_deep_momentum_with_their_rules_is(theta: float) -> None:
    """Ttt where its rule is `gd`, titans where it is momentum: the same parts, by the letter of their equations."""
    q, k, v = tokens()
    keep = 0.9 if theta else 1.0
    parts = {"rule": momentum(theta) if theta else nestopt.levels.gd(), "lr": 0.3, "step_size": 1.0}
    parts |= {"retention": Decay(keep) if theta else Keep()}
    level = deep_momentum(memory=Mlp(), **parts)  # type: ignore[arg-type]
    start = start_of(level)
    wanted = learner(q, k, v, start, keep, [with_momentum(0.3, theta) for _ in range(2)])
    learned = {name: weight[None] for name, weight in start.items()}
    close(run(level, q, k, v, learned=learned), wanted)
    named = (titans if theta else ttt)(memory=Mlp(), **LETTER, **parts)  # type: ignore[arg-type]
    close(run(named, q, k, v, learned=learned), wanted)


def test_oja_on_tokens() -> None:
    q, k, v = tokens(unit_values=True)
    m, wanted = torch.zeros(4, 4, dtype=F64), []
    for t in range(len(q)):
        m = m + 0.5 * torch.outer(v[t], k[t] - m.T @ v[t])
        wanted.append(m @ q[t])
    close(run(oja(), q, k, v), torch.stack(wanted))


def test_omega_on_tokens() -> None:
    q, k, v = tokens()
    m, wanted = torch.zeros(4, 4, dtype=F64), []
    for t in range(len(q)):
        last = range(max(0, t - 3), t + 1)
        m = 0.97 * m - 0.25 * sum(torch.outer(m @ k[i] - v[i], k[i]) for i in last)
        wanted.append(m @ q[t])
    close(run(omega(), q, k, v), torch.stack(wanted))


def test_attention_on_tokens() -> None:
    q, k, v = tokens()
    close(run(attention(), q, k, v), F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0])


def test_cms_on_tokens_is_read_and_not_written() -> None:
    q, k, v = tokens()
    level = cms((1, 16))
    start, x = start_of(level), q
    for name in ("every_1", "every_16"):
        normed = x / (x.square().mean(-1, keepdim=True) + torch.finfo(F64).eps).sqrt()
        x = x + F.silu(normed @ start[f"{name}.W2"].T) @ start[f"{name}.W1"].T
    learned = {name: weight[None] for name, weight in start.items()}
    close(run(level, q, k, v, learned=learned), x)
    _, state = nestopt.ops.run(level, *(x[None, :, None] for x in (q, k, v)), learned=learned)
    for name, weight in start.items():
        assert torch.equal(state["level"][name][0, 0], weight)


# -- as another level's rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEVELS)
def test_as_the_rule_of_titans(name: str) -> None:
    """Each weight of the memory is moved by what the level makes of its gradients, one a token."""
    rule, by_hand = LEVELS[name]
    level = titans(rule=rule, lr=0.4, step_size=0.05, retention=Decay(0.9), memory=Mlp(), **LETTER)
    assert level.rule is rule
    q, k, v = tokens()
    start = start_of(level)
    steps = []
    for weight in ("W1", "W2"):
        direction = by_hand(start[weight])
        steps.append(lambda g, direction=direction: 0.05 * direction(0.4 * g))
    learned = {key: weight[None] for key, weight in start.items()}
    exact = 1e-6 if name in ("muon", "cms") else 1e-9
    close(run(level, q, k, v, learned=learned), learner(q, k, v, start, 0.9, steps), exact)


def test_deep_momentum_as_the_rule_of_titans() -> None:
    """A network learns the rows of the memory's gradients by descent, and what it answers to them moves the memory."""
    parts = {"memory": Mlp(hidden=3, residual=False), "rule": nestopt.levels.gd(), "retention": Decay(0.95)}
    rule = deep_momentum(**parts, step_size=0.02, mode="paper")  # type: ignore[arg-type]
    level = titans(rule=rule, lr=0.4, step_size=0.05, retention=Decay(0.9), memory=Mlp(), **LETTER)
    q, k, v = tokens()
    given = [x[None, :, None] for x in (q, k, v)]
    state = make_form(level, FormSetting(given[0].device)).init(
        1, 1, given[0].shape[-1], given[2].shape[-1], given[2], {}
    )
    start = {name: weight[0, 0] for name, weight in state["level"]["memory"].items()}
    steps = [a_deep_momentum(state["level"]["rule"][name]["memory"], 0.4, 0.05) for name in ("W1", "W2")]
    y, _ = nestopt.ops.run(level, *given, state=state)
    close(y[0, :, 0], learner(q, k, v, start, 0.9, steps))


def a_deep_momentum(start: dict[str, Tensor], eta: float, step_size: float) -> Step:
    """W1 silu(W2 û) for rows û of the gradient at unit RMS, learned by steps of 0.02 on ½‖answer - û‖²."""
    w1, w2 = (start[name][0, 0].clone() for name in ("W1", "W2"))

    def step(g: Tensor) -> Tensor:
        nonlocal w1, w2
        rms = (eta * g).square().mean().sqrt()
        rows = eta * g / rms
        d1, d2 = torch.zeros_like(w1), torch.zeros_like(w2)
        for u in rows:
            z = w2 @ u
            s = torch.sigmoid(z)
            error = w1 @ (z * s) - u
            d1 = d1 + torch.outer(error, z * s)
            d2 = d2 + torch.outer((w1.T @ error) * s * (1 + z * (1 - s)), u)
        w1, w2 = 0.95 * w1 - 0.02 * d1, 0.95 * w2 - 0.02 * d2
        return step_size * rms * torch.stack([w1 @ F.silu(w2 @ u) for u in rows])

    return step


# -- the table ---------------------------------------------------------------------------------------------------------


def table() -> dict[str, list[str]]:
    """Cells by the first word of their row."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## One object, three roles")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    return {row[0].split("`")[1]: row[1:] for row in rows}


def links() -> dict[str, tuple[str, str]]:
    """Where a label of the README leads: a file, and the test that is its title."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return {
        label: (file, test) for label, file, test in re.findall(r'^\[([\w-]+)\]: (\S+) "(.*)"$', readme, re.MULTILINE)
    }


def test_every_cell_of_the_readmes_table_names_a_test_that_there_is() -> None:
    rows, known = table(), links()
    assert list(rows) == [
        "momentum",
        "delta_momentum",
        "deep_momentum",
        "oja",
        "omega",
        "attention",
        "adam",
        "muon",
        "cms",
    ]
    used = [label for row in rows.values() for cell in row for label in re.findall(r"\]\[([\w-]+)\]", cell)]
    assert sorted(used) == sorted(known)
    for name, row in rows.items():
        assert len(row) == 3
        assert [re.findall(r"\]\[([\w-]+)\]", cell) != [] for cell in row] == [True] * 3, (
            f"{name}: a cell without a test"
        )
    for file, test in known.values():
        function, _, case = test.partition("[")
        code = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {function}\(", code, re.MULTILINE), f"{file} has no {function}"
        if case:
            assert file == "tests/test_two_contexts.py"
            assert case.removesuffix("]") in LEVELS
