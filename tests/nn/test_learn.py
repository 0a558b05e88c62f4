"""`learn=False`: a layer reads its memory and writes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nestopt.core.tree import leaves
from nestopt.levels import attention
from nestopt.nn import SequenceMemory, detach
from nestopt.nn.rotary import rotary
from tests.nn.tools import F64, LEVELS, in_steps, make, same, same_states

SELF = ["self_modifying", "self_modifying in chunks", "self_modifying queries"]
READ_FIRST = ["titans in chunks", "titans before", "titans, matrix", "ttt in chunks", *SELF]


def begun(name: str, count: int = 5, **options: Any) -> tuple[SequenceMemory, dict[str, Any]]:
    module = make(name, **options)
    return module, module(torch.randn(2, count, 8, dtype=F64))[1]


def identical(a: dict[str, Any], b: dict[str, Any]) -> None:
    one, two = dict(leaves(a)), dict(leaves(b))
    assert sorted(one) == sorted(two)
    assert all(torch.equal(leaf, two[path]) for path, leaf in one.items())


@pytest.mark.parametrize("name", LEVELS)
def test_only_the_convolution_moves_on(name: str) -> None:
    module, state = begun(name)
    before = {path: leaf.clone() for path, leaf in leaves(state)}
    x = torch.randn(2, 7, 8, dtype=F64)
    y, after = module(x, state, learn=False)
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert all(torch.equal(leaf, before[path]) for path, leaf in leaves(state))
    identical(after["memory"], state["memory"])
    same(after["conv"], module(x, state)[1]["conv"])


@pytest.mark.parametrize("name", LEVELS)
def test_a_token_is_answered_as_if_it_came_alone_but_for_the_convolution(name: str) -> None:
    module, state = begun(name, conv=0)
    x = torch.randn(2, 5, 8, dtype=F64)
    y, _ = module(x, state, learn=False)
    for t in range(5):
        alone, _ = module(x[:, t : t + 1], state, learn=False)
        same(alone[:, 0], y[:, t])
    turned, _ = module(x.flip(1), state, learn=False)
    same(turned.flip(1), y)


@pytest.mark.parametrize("name", LEVELS)
def test_in_pieces_and_in_steps(name: str) -> None:
    module, state = begun(name)
    x = torch.randn(2, 6, 8, dtype=F64)
    y, end = module(x, state, learn=False)
    first, middle = module(x[:, :2], state, learn=False)
    second, last = module(x[:, 2:], middle, learn=False)
    same(torch.cat([first, second], 1), y)
    same_states(last, end)
    ys, now = [], state
    for x_t in x.unbind(1):
        y_t, now = module.step(x_t, now, learn=False)
        ys.append(y_t)
    same(torch.stack(ys, 1), y)
    same_states(now, end)


@pytest.mark.parametrize("name", LEVELS)
def test_between_tokens_that_are_learned_it_leaves_no_trace(name: str) -> None:
    module, state = begun(name, conv=0)
    x = torch.randn(2, 4, 8, dtype=F64)
    _, read = module(torch.randn(2, 9, 8, dtype=F64), state, learn=False)
    y, end = module(x, read)
    plain, plain_end = module(x, state)
    assert torch.equal(y, plain)
    identical(end, plain_end)


@pytest.mark.parametrize("name", LEVELS)
def test_new_sequences(name: str) -> None:
    module = make(name)
    x = torch.randn(2, 4, 8, dtype=F64)
    torch.manual_seed(0)  # some start at random
    y, state = module(x, learn=False)
    torch.manual_seed(0)
    identical(state["memory"], module.init_state(2)["memory"])
    same(module(x, module.init_state(2) | {"memory": state["memory"]}, learn=False)[0], y)


@pytest.mark.parametrize("name", READ_FIRST)
@pytest.mark.parametrize("count", [1, 4, 5])
def test_is_what_a_token_is_answered_that_is_read_before_its_write(name: str, count: int) -> None:
    module, state = begun(name, count)
    x = torch.randn(2, 1, 8, dtype=F64)
    same(module(x, state, learn=False)[0], module(x, state)[0])


@pytest.mark.parametrize("name", ["attention", "gated_deltanet", "titans", "self_modifying", "adam"])
def test_padding_packing_and_looking(name: str) -> None:
    module, state = begun(name)
    x = torch.randn(2, 4, 8, dtype=F64)
    y, end = module(x, state, learn=False)
    mask = torch.tensor([[1, 0, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1]], dtype=torch.bool)
    spread = torch.zeros(2, 6, 8, dtype=F64).masked_scatter(mask[..., None], x)
    padded, after = module(spread, state, mask=mask, learn=False)
    same(padded[mask], y.flatten(0, 1))
    assert (padded[~mask] == 0).all()
    identical(after["memory"], state["memory"])
    packed, _ = module(x.flatten(0, 1)[None], state, cu_seqlens=[0, 4, 8], learn=False)
    same(packed[0], y.flatten(0, 1))
    looked, seen, stats = module(x, state, learn=False, return_stats=True)
    same(looked, y)
    same_states(seen, end)
    assert stats["memory_norm"].isfinite().all()


def test_what_keeps_every_pair_can_read_padding() -> None:
    module = SequenceMemory(attention(read="before"), 8, 2).double()
    x, mask = torch.randn(2, 4, 8, dtype=F64), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    _, state = module(x)
    y, _ = module(x, state, learn=False)
    same(module(x, state, mask=mask, learn=False)[0][mask], y[mask])


def test_positions_of_what_is_only_read_are_all_the_next() -> None:
    """With rotary positions, too, a query is asked as the next token."""
    module, state = begun("attention", conv=0)
    x = torch.randn(2, 3, 8, dtype=F64)
    y, _ = module(x, state, learn=False)

    def by_hand(token: Tensor) -> Tensor:
        _, longer = module(token[:, None], state)
        pairs = longer["memory"]["level"]["memory"]
        q = module.query(token).unflatten(-1, (2, -1))
        turned = rotary(q[:, None], torch.full((2, 1), 5), module.rope)[:, 0]
        scores = torch.einsum("bhd,bhnd->bhn", turned, pairs["keys"][:, :, :-1]) / 2
        read = torch.einsum("bhn,bhnd->bhd", scores.softmax(-1), pairs["values"][:, :, :-1])
        return module.out(read.flatten(1))

    same(y, torch.stack([by_hand(token) for token in x.unbind(1)], 1))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, as it traces
@pytest.mark.parametrize("name", ["gated_deltanet", "titans", "self_modifying"])
def test_compiled_in_one_graph(name: str) -> None:
    module, state = begun(name)
    x = torch.randn(2, 3, 8, dtype=F64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    same(compiled(x, detach(state), learn=False)[0], module(x, state, learn=False)[0])


def test_steps_with_and_without_writing_may_be_mixed() -> None:
    module = make("self_modifying", conv=0)
    x = torch.randn(2, 6, 8, dtype=F64)
    y, end = in_steps(module, x)
    ys, state = [], None
    for x_t in x.unbind(1):
        module.step(x_t, state, learn=False)
        y_t, state = module.step(x_t, state)
        ys.append(y_t)
    assert torch.equal(torch.stack(ys, 1), y)
    assert state is not None
    identical(state, end)
