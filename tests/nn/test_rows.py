"""Rows of a batch do not disturb each other: each has its own place in a chunk, and is what it is alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from nestopt.core.pending import COUNT, PENDING
from nestopt.core.tree import leaves, tree_map
from nestopt.nn import SequenceMemory, cat, index
from nestopt.ops import run
from tests.nn.tools import F64, LEVELS, level_of, make, same, same_states

CHUNKED = [name for name in LEVELS if make(name).form.chunk > 1]
PATTERNS: dict[str, Callable[[int, int], Tensor]] = {
    "left": lambda n, length: torch.arange(length) >= length - n,
    "right": lambda n, length: torch.arange(length) < n,
    "holes": lambda n, length: torch.arange(length).mul(7).remainder(length).argsort().argsort() < n,
}


def texts(module: SequenceMemory, *, requires_grad: bool = False) -> list[Tensor]:
    """Four sequences `[n, 8]`, whose lengths are at other places of a chunk, of which one is longer than one."""
    span = module.form.chunk
    lengths = [span + 6, 6, (2 if span < 16 else 1) * span + 9, 8]
    return [torch.randn(n, 8, dtype=F64, requires_grad=requires_grad) for n in lengths]


def in_parts(rows: list[Tensor], cuts: list[int]) -> list[list[Tensor]]:
    """Sequences cut where each has had so many of its tokens: a quarter, a half …, but each part has one."""
    ends = [[0, *(max(1, len(row) * cut // 100) for cut in cuts), len(row)] for row in rows]
    return [
        [row[a:b] for row, (a, b) in zip(rows, at, strict=True)]
        for at in zip(*map(itertools.pairwise, ends), strict=True)
    ]


def padded(pattern: str, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Parts as one batch, NaN at padding, and its mask."""
    length = max(map(len, parts)) + 1
    mask = torch.stack([PATTERNS[pattern](len(part), length) for part in parts])
    x = torch.full((len(parts), length, 8), torch.nan, dtype=F64)
    return x.masked_scatter(mask[..., None], torch.cat(parts)), mask


def with_padding(pattern: str) -> Callable[[SequenceMemory, list[Tensor]], list[Tensor]]:
    def read(module: SequenceMemory, rows: list[Tensor]) -> list[Tensor]:
        state, found = None, [[] for _ in rows]
        for parts in in_parts(rows, [30, 55]):
            x, mask = padded(pattern, parts)
            y, state = module(x, state, mask=mask)
            assert not y[~mask].any()
            for row, own, here in zip(found, y, mask, strict=True):
                row.append(own[here])
        return [torch.cat(own) for own in found]

    return read


def packed(module: SequenceMemory, rows: list[Tensor]) -> list[Tensor]:
    state, found = None, [[] for _ in rows]
    for parts in in_parts(rows, [30, 55]):
        ends = [0, *itertools.accumulate(map(len, parts))]
        y, state = module(torch.cat(parts)[None], state, cu_seqlens=ends)
        for row, part in zip(found, y[0].split([len(part) for part in parts]), strict=True):
            row.append(part)
    return [torch.cat(own) for own in found]


def reset(module: SequenceMemory, rows: list[Tensor]) -> list[Tensor]:
    """The last two begin where the first two have their third and second token."""
    y, state = module(torch.stack([rows[0][:3], rows[1][:3], rows[2][:3], rows[3][:3]]))
    z, state = module(torch.stack([rows[0][3:5], rows[1][3:5], rows[2][:2], rows[3][:2]]), module.reset(state, [2, 3]))
    found = [[y[0], z[0]], [y[1], z[1]], [z[2]], [z[3]]]
    rest = [rows[0][5:], rows[1][5:], rows[2][2:], rows[3][2:]]
    x, mask = padded("right", rest)
    y, _ = module(x, state, mask=mask)
    return [torch.cat([*own, part[here]]) for own, part, here in zip(found, y, mask, strict=True)]


def generated(module: SequenceMemory, rows: list[Tensor]) -> list[Tensor]:
    """A batch of prompts with padding on the left, then a token of each at a time; rows that are over are left out."""
    prompts = [row[: len(row) // 2 + i % 2] for i, row in enumerate(rows)]
    x, mask = padded("left", prompts)
    y, state = module(x, mask=mask)
    found = [[own[here]] for own, here in zip(y, mask, strict=True)]
    going = list(range(len(rows)))
    for t in range(max(map(len, rows))):
        alive = [i for i, row in enumerate(going) if len(prompts[row]) + t < len(rows[row])]
        if not alive:
            break
        state, going = index(state, alive), [going[i] for i in alive]
        y, state = module.step(torch.stack([rows[row][len(prompts[row]) + t] for row in going]), state)
        for row, own in zip(going, y, strict=True):
            found[row].append(own[None])
    return [torch.cat(own) for own in found]


def together(module: SequenceMemory, rows: list[Tensor]) -> list[Tensor]:
    """Sequences that were begun one by one are gone on with as a batch, in another order, then alone again."""
    begun = [module(row[None, : len(row) // 2]) for row in rows]
    order = [2, 0, 3, 1]
    state = index(cat([state for _, state in begun]), order)
    y, state = module(torch.stack([rows[row][len(rows[row]) // 2 :][:2] for row in order]), state)
    found = {}
    for i, row in enumerate(order):
        last, _ = module(rows[row][None, len(rows[row]) // 2 + 2 :], index(state, [i]))
        found[row] = torch.cat([begun[row][0][0], y[i], last[0]])
    return [found[row] for row in range(len(rows))]


WAYS = {
    **{name: with_padding(name) for name in PATTERNS},
    "packed": packed,
    "reset": reset,
    "batched generation": generated,
    "put together": together,
}
QUICK = ("holes", "packed", "reset", "batched generation")
"""Those that are tried by default; levels without chunks, which have no place in one, in the first two."""


TABLE = [
    pytest.param(name, way, marks=[] if way in QUICK[: 4 if name in CHUNKED else 2] else [pytest.mark.slow])
    for name, way in itertools.product(LEVELS, WAYS)
]


@pytest.mark.parametrize(("name", "way"), TABLE)
def test_a_row_is_what_it_is_alone(name: str, way: str) -> None:
    module = make(name)
    rows = texts(module)
    for y, row in zip(WAYS[way](module, rows), rows, strict=True):
        same(y, module(row[None])[0][0], 1e-9)


@pytest.mark.parametrize("name", CHUNKED)
def test_gradients_through_rows_at_places_of_their_own(name: str) -> None:
    module = make(name)
    rows = texts(module, requires_grad=True)
    inputs = [*rows, *module.parameters()]
    true = torch.autograd.grad(sum(module(row[None])[0].sin().sum() for row in rows), inputs, allow_unused=True)
    found = torch.autograd.grad(sum(y.sin().sum() for y in WAYS["holes"](module, rows)), inputs, allow_unused=True)
    for one, other in zip(found, true, strict=True):
        same(one, other, 1e-9)


@pytest.mark.parametrize("name", CHUNKED)
def test_a_row_of_a_state_is_the_state_it_has_alone(name: str) -> None:
    module = make(name)
    rows = texts(module)
    x, mask = padded("left", rows)
    _, state = module(x, mask=mask)
    for i, row in enumerate(rows):
        same_states(index(state, [i]), module(row[None])[1], 1e-9)
    begun = module.reset(state, [1, 2])
    same_states(index(begun, [0]), index(state, [0]))
    same_states(index(begun, [1]), index(module.init_state(1), [0]))
    again = cat([index(state, [i]) for i in range(len(rows))])
    for i in range(len(rows)):
        same_states(index(again, [i]), index(state, [i]))


@pytest.mark.parametrize("name", CHUNKED)
def test_rows_at_places_of_their_own_are_read_and_not_written(name: str) -> None:
    module = make(name)
    rows, asked = texts(module), torch.randn(4, 3, 8, dtype=F64)
    x, mask = padded("holes", rows)
    _, state = module(x, mask=mask)
    y, after = module(asked, state, learn=False)
    for i, row in enumerate(rows):
        same(y[i], module(asked[i : i + 1], module(row[None])[1], learn=False)[0][0], 1e-9)
    same_states(after["memory"], state["memory"])


@pytest.mark.parametrize("name", [name for name in CHUNKED if name != "nest"])  # which has another layout there
def test_the_reference_machine_goes_on_with_rows_of_another_form(name: str) -> None:
    level, form = level_of(name), make(name).form
    begun = form.init(3, 2, 4, 4, torch.empty(0, dtype=F64), {})
    q, k, v = torch.randn(3, 3, 9, 2, 4, dtype=F64)
    mask = torch.tensor([[1] * 9, [0, 1, 1, 0, 1, 0, 1, 0, 0], [0] * 9], dtype=torch.bool)
    more = torch.randn(3, 3, 5, 2, 4, dtype=F64)
    found = []
    for first, then in itertools.product((None, "reference"), repeat=2):
        y, state = run(level, q, k, v, state=begun, mask=mask, form=first)
        z, state = run(level, *more, state=state, form=then)
        ends = [dict(leaves(index(state, [row]))) for row in range(3)]
        found.append({"y": torch.where(mask[..., None, None], y, 0), "z": z, "ends": ends})
    for one in found[1:]:
        same(one, found[0], 1e-9)


@pytest.mark.parametrize(
    "name", ["titans in chunks", "titans before", "ttt, a write a chunk", "self_modifying in chunks"]
)
@settings(deadline=None, max_examples=15)
@given(st.data())
def test_any_calls_with_any_padding(name: str, data: st.DataObject) -> None:
    module, batch = make(name), 3
    bools = st.lists(st.booleans(), min_size=batch, max_size=batch)
    state, rows, found = module.init_state(batch), [[] for _ in range(batch)], [[] for _ in range(batch)]
    for _ in range(data.draw(st.integers(1, 4))):
        anew = data.draw(bools)
        state = module.reset(state, anew)
        for row in range(batch):
            if anew[row]:
                rows[row], found[row] = [], []
        mask = torch.tensor(data.draw(st.lists(bools, min_size=1, max_size=9))).T
        x = torch.randn(*mask.shape, 8, dtype=F64)
        y, state = module(x, state, mask=mask)
        for row in range(batch):
            rows[row].append(x[row][mask[row]])
            found[row].append(y[row][mask[row]])
    for own, y in zip(rows, found, strict=True):
        if sum(map(len, own)):
            same(torch.cat(y), module(torch.cat(own)[None])[0][0], 1e-9)


def test_where_all_rows_are_at_one_place_nothing_is_counted() -> None:
    """What costs nothing: no number of a row's own is in the state, and none is asked for."""
    module = make("titans in chunks")
    x = torch.randn(3, 6, 8, dtype=F64)
    _, state = module(x)
    assert COUNT not in state["memory"][PENDING]
    _, masked = module(x, mask=torch.ones(3, 6, dtype=torch.bool))
    same_states(masked, state)
    assert COUNT in module.reset(state, [0])["memory"][PENDING]
    same_states(index(module.reset(state, [0]), [1, 2]), index(state, [1, 2]))


@pytest.mark.parametrize("name", ["titans in chunks", "titans before", "ttt in chunks"])
def test_states_of_before_in_which_padding_had_places_are_gone_on_with(name: str) -> None:
    """They have no count: the places of a chunk that are not live count to it, as they did when it was begun."""
    module = make(name)
    _, state = module(torch.randn(2, module.form.chunk + 1, 8, dtype=F64))
    held = state["memory"][PENDING]
    first = {key: torch.cat([x[:, :, :1], x], dim=2) for key, x in held.items() if key != "gates"}
    first = {key: x.clone() for key, x in first.items()}
    for x in first.values():
        x[0, :, 0] = 0
    gates = tree_map(lambda x: torch.cat([x[:, :, :1], x], dim=2), held["gates"])
    before = {**state, "memory": {**state["memory"], PENDING: {**first, "gates": gates}}}
    x = torch.randn(2, 6, 8, dtype=F64)
    y, end = module(x, before)
    assert y.isfinite().all()
    again, _ = module(x[:, 3:], module(x[:, :3], before)[1])
    same(again, y[:, 3:])
    assert COUNT not in end["memory"][PENDING]


@pytest.mark.parametrize("way", QUICK)
@pytest.mark.parametrize(
    "name", ["titans before", "titans in chunks", "self_modifying in chunks", "ttt, a write a chunk"]
)
def test_rows_whose_places_only_a_device_knows(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As within a CUDA graph: the host never learns where rows are, and shapes are those of any places."""
    monkeypatch.setattr("nestopt.core.pending.told", lambda tensor: None)
    monkeypatch.setattr("nestopt.core.pending._captured", lambda tensor: True)
    test_a_row_is_what_it_is_alone(name, way)
