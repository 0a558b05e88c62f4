"""Heads that share keys and values: grouped-query attention, and any other layer with fewer of them than queries."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestopt
from nestopt.config import ConfigError, load
from nestopt.core.memories import Window
from nestopt.core.tree import leaves
from nestopt.levels import attention, deltanet, self_modifying, titans
from nestopt.models import build_model
from nestopt.nn import SequenceMemory, cat, index
from nestopt.ops import attention as attend
from nestopt.ops import run
from tests.nn.tools import F64, away, in_steps, same, same_states

LEVELS = {
    "attention": attention(),
    "window": attention(memory=Window(3)),
    "reads first": attention(read="before"),
    "deltanet": deltanet(),
    "titans": titans(chunk=4),
    "self_modifying": self_modifying(chunk=2, projection_chunk=4),
    "both": nestopt.parallel(attention(), deltanet()),
}
SHARING = ["attention", "window"]


def make(name: str, heads: int = 4, kv_heads: int = 2) -> SequenceMemory:
    return away(nestopt.layer(LEVELS[name], 8, heads, kv_heads=kv_heads).double())


def inputs(length: int, kv_heads: int) -> list[Tensor]:
    sizes = ((6, 4), (kv_heads, 4), (kv_heads, 5))
    return [torch.randn(2, length, heads, dim, dtype=F64, requires_grad=True) for heads, dim in sizes]


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("window", [None, 3])
def test_equals_torch_with_every_gradient(kv_heads: int, window: int | None) -> None:
    q, k, v = inputs(9, kv_heads)
    y, pairs = attend(q, k, v, window=window)
    ago = torch.arange(9)[:, None] - torch.arange(9)
    seen = (ago >= 0) & (ago < (window or 9))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    same(y, theirs)
    assert pairs["keys"].shape == (2, kv_heads, window or 9, 4)
    weight = torch.randn_like(y)
    mine, right = (torch.autograd.grad((weight * out).sum(), [q, k, v]) for out in (y, theirs))
    same(mine, right, 1e-9)


@pytest.mark.parametrize("window", [None, 3])
def test_pieces_padding_and_packing_are_the_rows_alone(window: int | None) -> None:
    q, k, v = inputs(12, 2)
    level = attention(memory=Window(window))
    whole, _ = run(level, q, k, v)
    ys, state = [], None
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        y, state = run(level, q[:, part], k[:, part], v[:, part], state=state)
        ys.append(y)
    same(torch.cat(ys, 1), whole)
    mask = torch.rand(2, 12) < 0.6
    y, _ = run(level, q, k, v, mask=mask)
    for n in range(2):
        same(y[n : n + 1, mask[n]], run(level, *(x[n : n + 1, mask[n]] for x in (q, k, v)))[0])
    ends = [0, 5, 6, 12]
    y, _ = run(level, q[:1], k[:1], v[:1], cu_seqlens=ends)
    for a, b in itertools.pairwise(ends):
        same(y[:, a:b], run(level, q[:1, a:b], k[:1, a:b], v[:1, a:b])[0])


def test_what_is_not_finite_in_one_query_stays_in_the_heads_that_share_its_key() -> None:
    given = [x.detach() for x in inputs(5, 3)]
    given[0][0, 2, 3, 1] = torch.nan
    y, pairs = attend(*given)
    wrong = torch.zeros(2, 5, 6, dtype=torch.bool)
    wrong[0, 2, 2:4] = True
    assert torch.equal(y.isnan().any(-1), wrong)
    assert not pairs["keys"][0, 1, 2].any()


@pytest.mark.parametrize("name", LEVELS)
def test_a_layer_is_the_one_whose_keys_and_values_come_several_times(name: str) -> None:
    module, whole = make(name), away(SequenceMemory(LEVELS[name], 8, 4).double())
    weights = module.state_dict()
    for part in ("key.weight", "value.weight"):
        assert weights[part].shape == (4, 8)
        weights[part] = weights[part].unflatten(0, (2, 2)).repeat_interleave(2, 0).flatten(0, 1)
    whole.load_state_dict(weights)
    x = torch.randn(2, 9, 8, dtype=F64)
    (y, state), (right, _) = module(x), whole(x)
    same(y, right)
    count = 2 if name in SHARING else 4
    assert all(leaf.shape[1] == count for key, leaf in leaves(state["memory"]) if not key.endswith("mask"))
    same(in_steps(module, x)[0], y)
    first, middle = module(x[:, :4])
    second, end = module(x[:, 4:], middle)
    same(torch.cat([first, second], 1), y)
    same_states(end, state)


@pytest.mark.parametrize("name", LEVELS)
def test_rows_are_what_they_are_alone(name: str) -> None:
    module, x = make(name), torch.randn(2, 6, 8, dtype=F64)
    if name not in ("reads first", "both"):
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]).bool()
        y, state = module(x, mask=mask)
        same(y[0, 2:], module(x[:1, 2:])[0][0])
        begun = module.reset(state, [0])
        same(module(x, begun)[0][0], module(x[:1])[0][0])
        same(module(x, cat([index(state, [1]), index(state, [0])]))[0][1], module(x[1:], index(state, [0]))[0][0])
    assert module(x, module(x)[1], learn=False)[0].shape == x.shape


def test_steps_keep_what_a_piece_keeps_where_one_query_is_not_finite() -> None:
    module = nestopt.layer(attention(), 8, 4, kv_heads=2, conv=0).double()
    with torch.no_grad():
        module.query.weight[6] = torch.inf  # of the last head, and so of the second key
    x = torch.randn(1, 4, 8, dtype=F64)
    (y, state), (steps, end) = module(x), in_steps(module, x)
    same_states(end, state)
    assert y.isnan().all()
    assert steps.isnan().all()
    kept = state["memory"]["level"]["memory"]["keys"][0]
    assert kept[0].all()
    assert not kept[1].any()


def test_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="SequenceMemory: kv_heads=3 is not allowed; give a divisor of heads=4"):
        nestopt.layer(attention(), 8, 4, kv_heads=3)
    with pytest.raises(ValueError, match="SequenceMemory: kv_heads=0 is not allowed; give a whole number, 1 or more"):
        nestopt.layer(attention(), 8, 4, kv_heads=0)
    q, k, v = inputs(5, 4)
    with pytest.raises(
        ValueError, match=r"k has the shape \[2, 5, 4, 4\] and q \[2, 5, 6, 4\]; they must be the same, but"
    ):
        attend(q, k, v)
    with pytest.raises(ValueError, match=r"v has the shape \[2, 5, 4, 5\] and k \[2, 5, 3, 4\]; they must agree"):
        attend(q, k[:, :, :3], v)
    with pytest.raises(
        ValueError, match=r"k has the shape \[2, 5, 3, 4\] and q \[2, 5, 6, 4\]; they must be the same$"
    ):
        run(deltanet(), q, k[:, :, :3], v[:, :, :3])
    with pytest.raises(ConfigError, match=r"model\.kv_heads: 3 is not allowed; give a divisor of heads=4, or 0"):
        load({"model": {"kv_heads": 3}})


def test_a_model_from_its_configuration() -> None:
    section = load({"model": {"mixers": ["attention", "deltanet"], "dim": 16, "heads": 4, "kv_heads": 2}}).model
    model = build_model(section)
    assert [block.mixer.key.out_features for block in model.blocks] == [8, 8]
    tokens = torch.randint(256, (2, 7))
    _, state = model(tokens)
    assert state["block_0"]["mixer"]["memory"]["level"]["memory"]["keys"].shape == (2, 2, 7, 4)
