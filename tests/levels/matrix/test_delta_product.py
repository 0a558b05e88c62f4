"""DeltaProduct: several writes a token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import nestopt
from nestopt import Gate, Level
from nestopt.config import to_spec
from nestopt.core.part import FieldError
from nestopt.core.retentions import Decay
from nestopt.levels import deltaproduct, gated_deltanet
from nestopt.ops import run
from tests.levels.matrix.twins import F64


def inputs(writes: int, length: int = 130) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    given = {name: torch.randn(2, length, 2, writes, 4, dtype=F64) for name in "qkv"}
    for name in "qk":
        given[name] = given[name] / given[name].norm(dim=-1, keepdim=True)
    gates = {
        "lr": 2 * torch.rand(2, length, 2, writes, dtype=F64),
        "retention.keep": torch.rand(2, length, 2, dtype=F64),
    }
    return given, gates


@pytest.mark.parametrize("writes", [1, 2, 3])
@pytest.mark.parametrize("pieces", [[130], [3, 60, 1, 66]])
def test_is_the_delta_rule_write_after_write(writes: int, pieces: list[int]) -> None:
    given, gates = inputs(writes)
    level, ys, state = deltaproduct(writes=writes, retention=Decay(Gate(0.9))), [], None
    for at in torch.arange(130).split(pieces):
        q, k, v = (given[name][:, at].flatten(-2) for name in "qkv")
        y, state = run(level, 3 * q, 2 * k, v, gates={path: x[:, at] for path, x in gates.items()}, state=state)
        ys.append(y)
    m, wanted = torch.zeros(2, 2, 4, 4, dtype=F64), []
    for t in range(130):
        m = gates["retention.keep"][:, t, :, None, None] * m
        for i in range(writes):
            k, v, eta = given["k"][:, t, :, i], given["v"][:, t, :, i], gates["lr"][:, t, :, i, None, None]
            m = m - eta * ((m @ k[..., None]) - v[..., None]) @ k[..., None, :]
        reads = [(m @ given["q"][:, t, :, i, :, None])[..., 0] for i in range(writes)]
        wanted.append(torch.cat(reads, -1))
    assert state is not None
    end = state["level"]["memory"]["m"]
    torch.testing.assert_close((torch.cat(ys, 1), end), (torch.stack(wanted, 1), m), rtol=1e-9, atol=1e-9)


def test_with_one_write_it_is_gated_deltanet() -> None:
    given, gates = inputs(1)
    q, k, v = (given[name][..., 0, :] for name in "qkv")
    mine, _ = run(deltaproduct(writes=1, retention=Decay(Gate(0.9))), q, k, v, gates=gates)
    gates = {**gates, "lr": gates["lr"][..., 0]}
    torch.testing.assert_close(mine, run(gated_deltanet(lr=Gate(0.5, 0, 2)), q, k, v, gates=gates)[0])


def test_two_reflections_are_a_rotation_which_one_is_not() -> None:
    """A memory of [1, 0] turned by 1/8 of a circle each token is itself again after 8."""
    half = torch.tensor(torch.pi / 8, dtype=F64)
    keys = torch.stack([torch.tensor([1.0, 0.0], dtype=F64), torch.stack([half.cos(), half.sin()])])
    k, v = keys.flatten().expand(1, 16, 1, 4), torch.zeros(1, 16, 1, 4, dtype=F64)
    q = torch.eye(2, dtype=F64).flatten().expand_as(k)
    state = run(deltaproduct(lr=2.0), q[:, :1], k[:, :1], v[:, :1])[1]
    state["level"]["memory"]["m"] = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=F64)[None, None]
    y, _ = run(deltaproduct(lr=2.0), q, k, v, state=state)
    angle = torch.atan2(y[0, :, 0, 2], y[0, :, 0, 0])  # the first row of M: what both queries read of it
    turned = torch.arange(1, 17, dtype=F64) * torch.pi / 4
    torch.testing.assert_close(angle.cos(), turned.cos(), rtol=1e-9, atol=1e-9)
    assert float(angle.sin().abs().max()) > 0.99


def test_a_layer_learns_a_rate_for_each_write() -> None:
    layer = nestopt.layer("deltaproduct", dim=8, heads=2)
    assert layer.gates is not None
    assert layer.gates.out_features == 2 * 2
    y, state = layer(torch.randn(2, 9, 8))
    assert state["memory"]["level"]["memory"]["m"].shape == (2, 2, 2, 2)
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_is_written_as_it_was_given() -> None:
    level = deltaproduct(writes=3, lr=Gate(0.25))
    spec = to_spec(level)
    assert spec == {"level": "deltaproduct", "writes": 3, "lr": {"gate": 0.25}}
    assert nestopt.build("level", spec) == level
    assert to_spec(deltaproduct()) == "deltaproduct"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: deltaproduct(writes=0), r"deltaproduct: writes=0 is not allowed; give a number in \[1, ∞\)"),
        (lambda: deltaproduct(chunk=2), r"deltaproduct: chunk=2 is not allowed; it stays 1: leave it out"),
        (
            lambda: deltaproduct(retention=Decay(nestopt.Channels(0.9))),
            r"retention=.* give a number or a Gate for keep",
        ),
        (
            lambda: nestopt.layer(deltaproduct(writes=3), dim=8, heads=2),
            r"deltaproduct: writes=3 is not allowed for keys of 4 numbers; give a number that divides it",
        ),
    ],
)
def test_says_what_is_not_allowed(make: Callable[[], Level], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        make()
