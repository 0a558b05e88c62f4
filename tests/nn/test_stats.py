"""What `return_stats=True` shows."""

from __future__ import annotations

import pytest
import torch

from nestopt.core.tree import leaves
from nestopt.levels import retnet
from nestopt.nn import SequenceMemory
from nestopt.nn.stats import PIECE
from tests.nn.tools import F64, LEVELS, make, same, same_states


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("masked", [False, True])
def test_looking_changes_nothing(name: str, masked: bool) -> None:
    module = make(name)
    span = module.form.chunk
    x = torch.randn(2, 2 * span + 3, 8, dtype=F64)
    mask = torch.arange(x.shape[1]) >= torch.tensor([[0], [4]]) if masked else None
    _, state = module(torch.randn(2, 2, 8, dtype=F64))
    y, end = module(x, state, mask=mask)
    looked, after, stats = module(x, state, mask=mask, return_stats=True)
    same(looked, y)
    same_states(after, end)
    pieces = -(-(x.shape[1] + 2) // span) if span > 1 else 1
    assert stats["memory_norm"].shape == (2, 2, pieces)
    assert set(stats) <= {"memory_norm", "surprise", "gates"}
    assert set(stats["gates"]) == set(module.level_gates.learned)
    assert all(quantiles.shape == (5, 2, pieces) for quantiles in stats["gates"].values())
    assert not any(leaf.requires_grad for _, leaf in leaves(stats))


def test_pieces_without_chunks_are_of_64_tokens() -> None:
    module = make("gated_deltanet")
    x = torch.randn(1, 2 * PIECE + 5, 8, dtype=F64)
    y, _, stats = module(x, return_stats=True)
    same(y, module(x)[0])
    assert stats["surprise"].shape == (1, 2, 3)


def test_surprise_and_norm_are_those_of_the_memory_that_a_piece_found() -> None:
    module = make("gated_deltanet", conv=0)
    x = torch.randn(2, 2 * PIECE, 8, dtype=F64)
    _, middle = module(x[:, :PIECE])
    _, _, stats = module(x, return_stats=True)
    memory = middle["memory"]["level"]["memory"]["m"]
    same(stats["memory_norm"], torch.stack([torch.zeros(2, 2, dtype=F64), memory.norm(dim=(-2, -1))], -1))
    for i, m in enumerate([torch.zeros_like(memory), memory]):
        part = x[:, i * PIECE : (i + 1) * PIECE]
        for b in range(2):
            for h in range(2):
                k, v = ((part[b] @ p.weight.mT).split(4, -1)[h] for p in (module.key, module.value))
                k = k / k.norm(dim=-1, keepdim=True)
                errors = torch.stack([m[b, h] @ k[t] - v[t] for t in range(PIECE)])
                same(stats["surprise"][b, h, i], errors.square().mean().sqrt())


def test_surprise_of_an_mlp_with_features_and_padding() -> None:
    module = make("ttt in chunks", conv=0)
    x = torch.randn(2, 3, 8, dtype=F64)
    mask = torch.tensor([[True, True, True], [False, True, False]])
    _, _, stats = module(x, mask=mask, return_stats=True)
    w1, w2 = module.start["W1"], module.start["W2"]
    for b, live in enumerate([[0, 1, 2], [1]]):
        for h in range(2):
            k, v = ((x[b, live] @ p.weight.mT).split(4, -1)[h] for p in (module.key, module.value))
            phi = torch.nn.functional.elu(k / k.norm(dim=-1, keepdim=True)) + 1
            read = torch.nn.functional.silu(phi @ w2[h].mT) @ w1[h].mT
            same(stats["surprise"][b, h, 0], (read - v).square().mean().sqrt())


def test_gates_are_counted_over_batch_and_tokens() -> None:
    module = make("gated_linear", conv=0)
    x = torch.randn(2, 5, 8, dtype=F64)
    mask = torch.tensor([[True] * 5, [False] * 3 + [True] * 2])
    _, _, stats = module(x, mask=mask, return_stats=True)
    gate = module.gates_at(x)["retention.keep"][mask]
    want = torch.stack([gate.quantile(q, dim=0) for q in (0, 0.25, 0.5, 0.75, 1)])
    same(stats["gates"]["retention.keep"][..., 0], want)


def test_levels_without_gates_or_errors_leave_them_out() -> None:
    _, _, stats = make("attention")(torch.randn(1, 3, 8, dtype=F64), return_stats=True)
    assert set(stats) == {"memory_norm", "gates"}
    assert stats["gates"] == {}
    _, _, stats = SequenceMemory(retnet(), 8, 2)(torch.randn(1, 3, 8), return_stats=True)
    assert stats["gates"] == {}  # constants per head are no gates that a layer learns
    _, _, stats = make("titans", gates=False)(torch.randn(1, 3, 8, dtype=F64), return_stats=True)
    assert stats["gates"] == {}
    assert stats["surprise"].shape == (1, 2, 1)
