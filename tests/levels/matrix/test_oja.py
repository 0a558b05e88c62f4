"""Oja's rule beyond what holds of every matrix memory (`test_matrix_memories`)."""

from __future__ import annotations

import torch

from nestopt.ops import delta_rule, oja
from tests.levels.matrix.twins import CASES, F64


def test_its_memory_is_the_delta_rules_transposed_with_keys_and_values_in_each_others_place() -> None:
    inputs = CASES["oja, decay"].inputs(2, 13)
    _, memory = oja(**inputs, chunk=4)
    q, k, v = inputs["v"], inputs["v"], inputs["k"]
    _, transposed = delta_rule(q, k, v, lr=inputs["lr"], decay=inputs["decay"], decay_first=False, chunk=4)
    torch.testing.assert_close(memory, transposed.mT, rtol=1e-12, atol=1e-12)


def test_it_finds_the_first_principal_component() -> None:
    """With D_v = 1, v = M k and a small lr, this is Oja's neuron: it comes to the direction of most variance."""
    spread = torch.tensor([3.0, 1.0, 0.5, 0.2], dtype=F64)
    memory = torch.full((1, 1, 1, 4), 0.5, dtype=F64)
    for k in torch.randn(3000, 4, dtype=F64) * spread:
        v = (memory[0, 0] @ k)[None, None, None]
        _, memory = oja(k[None, None, None], k[None, None, None], v, lr=0.003, state=memory)
    assert float(memory[0, 0, 0, 0].abs()) > 0.98
    torch.testing.assert_close(memory.norm(), torch.ones((), dtype=F64), rtol=0, atol=0.05)
