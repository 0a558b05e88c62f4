"""RWKV-7 and Comba: memories that are asked at another key than they write along."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import nestopt
from nestopt import Level
from nestopt.core.part import FieldError
from nestopt.levels import comba, gated_deltanet, rwkv7
from nestopt.ops import delta_rule, rank_one, run
from tests.levels.matrix.twins import CASES, F64

PIECES = pytest.mark.parametrize("pieces", [[130], [3, 60, 1, 66]])


def in_pieces(level: Level, pieces: list[int], by_token: dict[str, torch.Tensor], learned: dict[str, torch.Tensor]):  # type: ignore[no-untyped-def]
    ys, state = [], None
    for at in torch.arange(130).split(pieces):
        q, k, v = (by_token[name][:, at] for name in "qkv")
        gates = {path: x[:, at] for path, x in by_token.items() if path not in "qkv"}
        y, state = run(level, q, k, v, gates=gates, state=state, learned=learned)
        ys.append(y)
    assert state is not None
    return torch.cat(ys, 1), state["level"]["memory"]["m"]


@PIECES
def test_rwkv7_is_its_recurrence(pieces: list[int]) -> None:
    q, k, v = (torch.randn(2, 130, 2, 4, dtype=F64) for _ in range(3))
    keep, rate = torch.rand(2, 2, 130, 2, 4, dtype=F64)
    xi, rho = torch.rand(2, 2, 4, dtype=F64) + 0.5
    by_token = {"q": q, "k": k, "v": v, "retention.keep": keep, "rate": rate}
    found = in_pieces(rwkv7(), pieces, by_token, {"removal": xi, "replacement": rho})
    m, ys = torch.zeros(2, 2, 4, 4, dtype=F64), []
    for t in range(130):
        kappa = xi * k[:, t]
        kappa = kappa / (kappa * kappa).sum(-1, keepdim=True).sqrt()
        written = k[:, t] * (1 + (rate[:, t] - 1) * rho)
        turn = torch.diag_embed(keep[:, t]) - kappa[..., :, None] * (rate[:, t] * kappa)[..., None, :]
        m = m @ turn + v[:, t, :, :, None] * written[..., None, :]
        ys.append((m @ q[:, t, :, :, None])[..., 0])
    torch.testing.assert_close(found, (torch.stack(ys, 1), m), rtol=1e-10, atol=1e-10)


@PIECES
def test_comba_is_its_recurrence(pieces: list[int]) -> None:
    q, k, v = (torch.nn.functional.normalize(torch.randn(2, 130, 2, 4, dtype=F64), dim=-1) for _ in range(3))
    alpha, eta = torch.rand(2, 2, 130, 2, dtype=F64)
    b, d = torch.randn(2, dtype=F64), torch.rand(2, dtype=F64)
    by_token = {"q": q, "k": k, "v": v, "retention.keep": alpha, "lr": eta}
    found = in_pieces(comba(), pieces, by_token, {"feedback": b, "correction": d})
    m, ys = torch.zeros(2, 2, 4, 4, dtype=F64), []
    for t in range(130):
        p = k[:, t] / (1 + torch.exp(-b))[:, None]
        m = alpha[:, t, :, None, None] * m
        error = v[:, t] - (m @ p[..., None])[..., 0]
        m = m + eta[:, t, :, None, None] * error[..., :, None] * k[:, t, :, None, :]
        ys.append((m @ (q[:, t] - d[:, None] * p)[..., None])[..., 0])
    torch.testing.assert_close(found, (torch.stack(ys, 1), m), rtol=1e-10, atol=1e-10)


def test_full_feedback_without_correction_is_gated_deltanet() -> None:
    q, k, v = (torch.nn.functional.normalize(torch.randn(1, 20, 1, 4, dtype=F64), dim=-1) for _ in range(3))
    learned = {"feedback": torch.full((1,), 50.0, dtype=F64), "correction": torch.zeros(1, dtype=F64)}
    torch.testing.assert_close(run(comba(), q, k, v, learned=learned)[0], run(gated_deltanet(), q, k, v)[0])


def test_the_delta_rule_is_of_rank_one() -> None:
    inputs = CASES["delta, channels"].inputs(2, 70)
    eta, k, alpha = inputs["lr"][..., None], inputs["k"], inputs["decay"]
    general = rank_one(inputs["q"], k, eta * inputs["v"], ask=alpha * k, along=eta * k, decay=alpha)
    torch.testing.assert_close(delta_rule(**inputs), general, rtol=1e-10, atol=1e-10)


def test_a_memory_of_unit_keys_does_not_grow_by_itself() -> None:
    """Where nothing is written, whatever the gates: 10,000 tokens of RWKV-7's transition from a random memory."""
    k, q = torch.randn(2, 1, 10_000, 1, 8)
    gates = {"retention.keep": torch.full_like(k, 0.9999), "rate": torch.rand_like(k)}
    state = run(rwkv7(), q[:, :1], k[:, :1], torch.randn(1, 1, 1, 8))[1]
    before = float(state["level"]["memory"]["m"].norm())
    y, state = run(rwkv7(), q, k, torch.zeros_like(k), gates=gates, state=state)
    assert y.isfinite().all()
    assert float(state["level"]["memory"]["m"].norm()) < before


@pytest.mark.parametrize("name", ["rwkv7", "comba"])
def test_a_layer_learns_all_its_parameters_whose_present_values_a_stream_takes(name: str) -> None:
    layer = nestopt.layer(name, dim=8, heads=2)
    x = torch.randn(2, 9, 8)
    y, _ = layer(x)
    # reads are normalised, so that their sum would not do
    (y * torch.randn_like(y)).sum().backward()
    assert [key for key, p in layer.named_parameters() if p.grad is None] == []
    assert all(p.grad.any() for p in layer.start.values())
    _, state = layer(x[:, :4])
    with torch.no_grad():
        for p in layer.start.values():
            p.mul_(2)
    moved, _ = layer(x[:, 4:], state)
    old = {key: p.detach() / 2 for key, p in layer.start.items()}
    with torch.no_grad():
        for key, p in layer.start.items():
            p.copy_(old[key])
    assert not torch.isclose(moved, layer(x[:, 4:], state)[0]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rwkv7(lr=0.5), r"rwkv7: lr=0.5 is not allowed; it stays 1.0: leave it out"),
        (lambda: rwkv7(rate=2.0), r"rwkv7: rate=2.0 is not allowed; give a number in \[0, 1\]"),
        (lambda: comba(normalized=True), r"comba: normalized=True is not allowed; it stays False: leave it out"),
        (lambda: comba(correction=-1.0), r"comba: correction=-1.0 is not allowed; give a number in \[0, ∞\)"),
    ],
)
def test_says_what_is_not_allowed(make: Callable[[], Level], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        make()
