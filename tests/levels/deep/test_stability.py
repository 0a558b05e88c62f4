"""The normalised steps of a deep memory do not diverge, whatever keys they are given."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.levels.deep.deep_memory import deep_memory

DIM, HIDDEN = 32, 64
KEYS = ("random", "near-equal", "constant", "huge values", "huge keys", "mixed lengths")
RATES = (0.1, 1.0)
MOMENTA = (0.0, 0.9, 0.99)
PARTS = 8


def stream(length: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[kinds, T, DIM]`: the values are a linear function of the keys, for there to be one to learn."""
    one, teacher = torch.randn(DIM), torch.randn(DIM, DIM)
    keys = {
        "random": torch.randn(length, DIM),
        "near-equal": one + 0.05 * torch.randn(length, DIM),
        "constant": one.expand(length, DIM),
    }
    units = F.normalize(torch.stack([keys.get(kind, torch.randn(length, DIM)) for kind in KEYS]), dim=-1)
    k, v = units.clone(), units @ teacher.T
    v[KEYS.index("huge values")] *= 1e4
    k[KEYS.index("huge keys")] *= 1e4
    sizes = 10 ** (4 * torch.rand(length, 1) - 2)
    k[KEYS.index("mixed lengths")] *= sizes
    v[KEYS.index("mixed lengths")] *= sizes
    return k, v


def in_pieces(k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Answers, and the norms of all weights `[B, H, pieces + 1]` at the start of each piece and in the end."""
    size, answers, state = max(arguments["chunk"], 64), [], None
    first = sum(w.square().sum() for w in arguments["weights"]).sqrt()
    norms = [first.expand(k.shape[0], k.shape[2])]
    for begin in range(0, k.shape[1], size):
        part = slice(begin, begin + size)
        gates = {key: x[:, part] for key, x in arguments.items() if isinstance(x, Tensor) and x.ndim == 3}
        with torch.no_grad():
            y, state = deep_memory(k[:, part], k[:, part], v[:, part], **{**arguments, **gates}, state=state)
        answers.append(y)
        norms.append(sum(w.square().sum((-2, -1)) for w in state["weights"].values()).sqrt())
    return torch.cat(answers, 1), torch.stack(norms, -1)


def run(
    length: int, chunk: int, read: Literal["after", "chunk"], delta: float, dtype: torch.dtype, **how: Any
) -> tuple[Tensor, Tensor]:
    """The errors of the reads and the norms of the weights, of all keys and rates (12), and of all momenta (3).

    Errors `[12, 8, 3]` are by eighths of the sequence and relative to those of the memory at its start; norms
    `[12, 3, pieces + 1]` are of every 64 tokens and relative to the first.
    """
    k, v = (x.repeat_interleave(len(RATES), 0)[:, :, None].expand(-1, -1, 3, -1).to(dtype) for x in stream(length))
    lr = torch.tensor(RATES).repeat(len(KEYS))[:, None, None].expand(*k.shape[:3])
    weights = [0.5 * torch.randn(DIM, HIDDEN) / HIDDEN**0.5, torch.randn(HIDDEN, DIM) / DIM**0.5]
    how = {"delta": delta, "chunk": chunk, "read": read, "residual": True} | how
    y, norms = in_pieces(k, v, weights=weights, lr=lr, momentum=torch.tensor(MOMENTA), **how)
    start = k.float() * how["residual"] + F.silu(k.float() @ weights[1].T) @ weights[0].T
    before = (start - v.float()).square().mean((1, 3)).sqrt()
    errors = (y.float() - v.float()).square().mean(-1).unflatten(1, (PARTS, -1)).mean(2).sqrt()
    return errors / before[:, None], norms / norms[..., :1]


def check(errors: Tensor, norms: Tensor, huge: float = 1e4) -> None:
    """Nothing grows; norms of memories of values of length 10,000 are at most `huge`."""
    assert errors.isfinite().all()
    assert norms.isfinite().all()
    worst, largest = errors.amax((1, 2)), norms.amax((1, 2))
    for i, (kind, rate) in enumerate(itertools.product(KEYS, RATES)):
        # values 10,000 times the memory's own size are far from where it was linearised: it passes them at first
        assert worst[i] <= (100 if kind == "huge values" else 1.2), (kind, rate)
        assert largest[i] <= (huge if kind == "huge values" else 10), (kind, rate)
    assert (errors[:, -1] <= 1.1 * errors[:, :-1].amax(1)).all()
    half = norms.shape[-1] // 2
    assert (norms[..., half:].amax(-1) <= 2 * norms[..., :half].amax(-1)).all()


def half(*grid: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Half of a grid, in which any two of the values come together."""
    places = itertools.product(*(range(len(values)) for values in grid))
    return [case for case, place in zip(itertools.product(*grid), places, strict=True) if sum(place) % 2 == 0]


ALL = half((1, 16, 64, 256), ("chunk", "after"), (0.0, 1.0), (torch.float32, torch.bfloat16))
SOME = [case for case in ALL if case[0] in (1, 64)]


@pytest.mark.parametrize(("chunk", "read", "delta", "dtype"), SOME)
def test_no_keys_make_it_diverge(chunk: int, read: Literal["after", "chunk"], delta: float, dtype: torch.dtype) -> None:
    check(*run(512 if chunk == 1 else 2048, chunk, read, delta, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("chunk", "read", "delta", "dtype"), ALL)
def test_no_keys_make_it_diverge_ever(
    chunk: int, read: Literal["after", "chunk"], delta: float, dtype: torch.dtype
) -> None:
    check(*run(16384, chunk, read, delta, dtype))


LAYERWISE = [
    pytest.param(chunk, read, delta, residual, marks=() if chunk == 64 else pytest.mark.slow)
    for chunk, read, delta, residual in itertools.product((16, 64), ("chunk", "after"), (0.0, 1.0), (True, False))
]


@pytest.mark.parametrize(("chunk", "read", "delta", "residual"), LAYERWISE)
def test_no_keys_make_the_layerwise_step_diverge(
    chunk: int, read: Literal["after", "chunk"], delta: float, residual: bool
) -> None:
    check(*run(2048, chunk, read, delta, torch.float32, step="layerwise", residual=residual))


@pytest.mark.slow
@pytest.mark.parametrize("forget", ["all", "outer"])
@pytest.mark.parametrize(("chunk", "read", "delta", "residual"), LAYERWISE)
def test_no_keys_make_the_layerwise_step_diverge_ever(
    chunk: int, read: Literal["after", "chunk"], delta: float, residual: bool, forget: Literal["all", "outer"]
) -> None:
    decay = None if forget == "all" else 0.999
    how = {"step": "layerwise", "residual": residual, "decay": decay, "forget": forget}
    check(*run(16384, chunk, read, delta, torch.float32, **how), huge=1.1e4)


@pytest.mark.parametrize("lr", [0.5, 1.0])
def test_the_raw_step_does_diverge_on_these_keys(lr: float) -> None:
    k, v = (x[:, :, None] for x in stream(2048))
    weights = [0.5 * torch.randn(DIM, HIDDEN) / HIDDEN**0.5, torch.randn(HIDDEN, DIM) / DIM**0.5]
    with torch.no_grad():
        y, _ = deep_memory(k, k, v, weights=weights, lr=lr, step="raw")
    assert (~y.isfinite()).flatten(1).any(1).all()


@pytest.mark.parametrize("objective", ["l2", "dot"])
@pytest.mark.parametrize("pattern", [[0.0, 0.99], [0.0, 0.99, 0.99, 0.99]], ids=str)
def test_momenta_that_come_and_go(pattern: list[float], objective: Literal["l2", "dot"]) -> None:
    """They are not what the step is derived for; the memory stays bounded here. With `dot` by the delta decay alone."""
    length = 2048
    k, v = (x[:, :, None] for x in stream(length))
    weights = [0.5 * torch.randn(DIM, HIDDEN) / HIDDEN**0.5, torch.randn(HIDDEN, DIM) / DIM**0.5]
    momentum = torch.tensor(pattern).repeat(length // len(pattern))[None, :, None].expand(*k.shape[:3])
    for chunk, read in itertools.product((16, 64), ("chunk", "after")):
        how = {"lr": 1.0, "momentum": momentum, "delta": 1.0, "objective": objective, "chunk": chunk, "read": read}
        _, norms = in_pieces(k, v, weights=weights, **how)
        norms = norms / norms[..., :1]
        assert norms.isfinite().all()
        half = norms.shape[-1] // 2
        assert (norms[..., half:].amax(-1) <= 2 * norms[..., :half].amax(-1)).all()
        assert norms.amax() <= 1e4
