"""Queries and values from other streams than the keys, and tokens that a memory answers and does not write."""

from __future__ import annotations

import pytest
import torch

from nestopt.nn import SequenceMemory
from tests.nn.tools import F64, make, same, same_states

WRITTEN = ["linear_attention", "gated_linear", "gated_deltanet", "oja", "omega", "ttt", "titans in chunks", "moneta"]
WRITTEN += ["self_modifying", "titans with adam", "deltanet of 2"]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_not_stored_changes_nothing_and_is_answered(name: str) -> None:
    """By the level's own form as by the reference machine; whatever the token's own value is."""
    module, length = make(name, conv=0), 18
    store = torch.rand(2, length) < 0.6
    x, values = torch.randn(2, 2, length, 8, dtype=F64)
    y, state = module(x, values=values, store_mask=store)
    slow = SequenceMemory(module.level, 8, 2, conv=0, form=None if module.form.reference else "reference").double()
    slow.load_state_dict(module.state_dict())
    other = torch.where(store[..., None], values, torch.randn_like(values))
    want, wanted = slow(x, values=other, store_mask=store)
    same(y, want, 1e-8)
    if slow.form.choice.name != "reference" or module.form.choice.name in ("reference", "rule_by_chunk"):
        same_states(state["memory"]["level"], wanted["memory"]["level"], 1e-8)
    assert not torch.allclose(y, module(x, values=values)[0])
    first, between = module(x[:, :4], values=values[:, :4], store_mask=store[:, :4])
    second, _ = module(x[:, 4:], between, values=values[:, 4:], store_mask=store[:, 4:])
    same(torch.cat([first, second], 1), y, 1e-8)


def test_streams_are_what_they_are_made_of() -> None:
    module = make("titans in chunks", conv=0)
    x, q, v = torch.randn(3, 2, 9, 8, dtype=F64)
    y, _ = module(x, queries=q, values=v)
    same(module(x, queries=x, values=x)[0], module(x)[0])
    for name, weight in (("queries", module.query.weight), ("values", module.value.weight)):
        moved = {"queries": q, "values": v} | {name: torch.randn_like(x)}
        assert not torch.allclose(module(x, **moved)[0], y)
        (grad,) = torch.autograd.grad(module(x, queries=q, values=v)[0].square().sum(), weight)
        assert grad.any()
    mask = torch.tensor([[True] * 9, [False] * 4 + [True] * 5])
    store = torch.arange(9).expand(2, -1) % 3 > 0
    padded, _ = module(x, queries=q, values=v, store_mask=store, mask=mask)
    alone, _ = module(x[1:, 4:], queries=q[1:, 4:], values=v[1:, 4:], store_mask=store[1:, 4:])
    same(padded[1, 4:], alone[0])


def test_what_is_not_allowed() -> None:
    module, x = make("deltanet"), torch.zeros(2, 3, 8, dtype=F64)
    for given, words in (
        ({"queries": x[:, :2]}, "queries is torch.float64"),
        ({"store_mask": torch.ones(2, 3)}, r"store_mask is torch.float32 \[2, 3\]; it must be bool"),
        ({"store_mask": torch.ones(2, 3, dtype=torch.bool), "return_stats": True}, "store_mask is not allowed with"),
    ):
        with pytest.raises(ValueError, match=words):
            module(x, **given)
    with pytest.raises(ValueError, match="attention, whose memory keeps every pair"):
        make("attention")(x, store_mask=torch.ones(2, 3, dtype=torch.bool))
