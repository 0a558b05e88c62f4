"""Documents end to end in rows: each is what it is alone, in logits, losses, states and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestopt.core.memories import Window
from nestopt.core.tree import leaves
from nestopt.levels import (
    attention,
    cms,
    deltanet,
    linear_attention,
    oja,
    omega,
    retnet,
    titans,
    ttt,
    window_attention,
)
from nestopt.levels.self_modifying.level import SelfModifying
from nestopt.models import HopeLM
from nestopt.models.documents import Pieces
from nestopt.nn import index
from tests.nn.tools import same

CONTEXT = {"learn": "context", "rate": 0.7, "normalized": True, "periods": (3, 5)}

MODELS: dict[str, dict[str, Any]] = {
    "attention": {"mixer": attention()},
    "window_attention": {"mixer": window_attention(memory=Window(4))},
    "linear_attention": {"mixer": linear_attention()},
    "retnet": {"mixer": retnet()},
    "deltanet": {"mixer": deltanet()},
    "oja": {"mixer": oja()},
    "omega": {"mixer": omega()},
    "titans": {"mixer": titans()},
    "titans in chunks": {"mixer": titans(chunk=4, read="chunk")},
    "ttt in chunks": {"mixer": ttt(chunk=3, read="chunk")},
    "self_modifying": {"mixer": SelfModifying(chunk=2, projection_chunk=4)},
    "two mixers": {"mixers": [deltanet(), attention()], "gate_output": True},
    "in context": {"mlp": cms(**CONTEXT)},
    "taught": {"mixer": deltanet(), "mlp": cms(teach="loss", **CONTEXT)},
    "hope": {
        "mixer": SelfModifying(chunk=2, projection_chunk=4),
        "mlp": cms(teach="loss", through="first_order", **CONTEXT),
    },
    "the last learns": {"mlps": [cms(), cms(teach="loss", **CONTEXT)]},
    "hope, segments": {
        "mixer": SelfModifying(chunk=2, projection_chunk=4),
        "mlp": cms(teach="loss", **CONTEXT),
        "segment": 4,
    },
}

EVERY_TOKEN = [
    name
    for name, options in MODELS.items()
    if all(m.chunk_size == 1 for m in options.get("mixers", [options.get("mixer", attention())]))
]
"""Those that write at every token: a sequence goes on after padding as if there had been none."""


def make(name: str, **options: Any) -> HopeLM:
    torch.manual_seed(0)
    given = {"vocab": 11, "dim": 8, "blocks": 2, "heads": 2, **MODELS[name], **options}
    model = HopeLM(**given).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens_of(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(seed))


def starts_of(rows: list[list[int]], length: int) -> Tensor:
    starts = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, places in zip(starts, rows, strict=True):
        row[places] = True
    return starts


ROWS = [[0, 5, 6], [], [0], [3, 11], [1, 2, 3, 4]]
LENGTH = 12


def documents(rows: list[list[int]], length: int) -> list[tuple[int, int, int]]:
    """Row, begin and end of each document."""
    return [(i, a, b) for i, places in enumerate(rows) for a, b in itertools.pairwise(sorted({0, *places, length}))]


def gradients(loss: Tensor, model: HopeLM) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, materialize_grads=True), strict=True))


@contextmanager
def watched(model: HopeLM) -> Iterator[list[tuple[int, int]]]:
    """How many rows of how many tokens each call of the first block's mixer has."""
    calls: list[tuple[int, int]] = []
    hook = model.blocks[0].mixer.register_forward_pre_hook(lambda _, given: calls.append(tuple(given[0].shape[:2])))
    yield calls
    hook.remove()


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_each_document_is_what_it_is_alone(name: str, lockstep: bool) -> None:
    model, tokens, starts = make(name), tokens_of(len(ROWS), LENGTH), starts_of(ROWS, LENGTH)
    model.lockstep = lockstep
    logits, state = model(tokens, starts=starts)
    targets = tokens_of(len(ROWS), LENGTH, seed=2)
    total, ends = logits.new_zeros(()), {}
    for i, a, b in documents(ROWS, LENGTH):
        alone, ends[i] = model(tokens[i : i + 1, a:b])
        same(logits[i : i + 1, a:b], alone)
        total = total + F.cross_entropy(alone[0], targets[i, a:b], reduction="sum")
    true = gradients(total, model)
    mine = gradients(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), model)
    for key in true:
        torch.testing.assert_close(mine[key], true[key], rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
    if lockstep:
        assert state == {}
        return
    for i, end in ends.items():
        row, alone = dict(leaves(index(state, [i]))), dict(leaves(end))
        assert {key: row[key].tolist() for key in row if key.endswith("step")} == {
            key: alone[key].tolist() for key in alone if key.endswith("step")
        }
    if name in EVERY_TOKEN:
        more = tokens_of(len(ROWS), 4, seed=3)
        for i, end in ends.items():
            same(model(more, state)[0][i], model(more[i : i + 1], end)[0][0])


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_counts_no_guess_of_a_document_s_first_token(name: str) -> None:
    model, tokens, starts = make(name), tokens_of(len(ROWS), LENGTH + 1), starts_of(ROWS, LENGTH + 1)
    starts[2, LENGTH] = True  # the last target of all begins a document
    loss, _ = model.loss(tokens, starts=starts, piece=5)
    total, count = loss.new_zeros(()), 0
    rows = [[*places, LENGTH] if i == 2 else places for i, places in enumerate(ROWS)]
    for i, a, b in documents(rows, LENGTH + 1):
        if b - a > 1:
            total = total + model.loss(tokens[i : i + 1, a:b])[0] * (b - a - 1)
            count += b - a - 1
    same(loss, total / count)
    same(model.loss(tokens, starts=starts, reduction="sum")[0], total)
    true, mine = gradients(total / count, model), gradients(loss, model)
    for key in true:
        torch.testing.assert_close(mine[key], true[key], rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", EVERY_TOKEN)
def test_rows_go_on_where_no_document_begins(name: str) -> None:
    model, tokens, cut = make(name), tokens_of(len(ROWS), 2 * LENGTH), LENGTH
    rows = [[0, 5, 17], [14], [0, 12], [3, 11, 12, 13], [1, 2, 3]]
    starts = starts_of(rows, 2 * LENGTH)
    whole, end = model(tokens, starts=starts)
    first, middle = model(tokens[:, :cut], starts=starts[:, :cut])
    second, last = model(tokens[:, cut:], middle, starts=starts[:, cut:])
    same(torch.cat([first, second], 1), whole)
    third = tokens_of(len(ROWS), 3, seed=5)
    none = torch.zeros(len(ROWS), 3, dtype=torch.bool)
    same(model(third, last, starts=none)[0], model(third, end)[0])
    same(model(third, last)[0], model(third, end)[0])


@pytest.mark.parametrize("name", MODELS)
def test_a_chunk_goes_on_in_a_row_as_in_a_row_alone(name: str) -> None:
    """From one state, rows that go on and rows that begin do so side by side as they do by themselves."""
    model, tokens = make(name), tokens_of(3, 17)
    _, state = model(tokens[:, :5])
    rest, starts = tokens[:, 5:], starts_of([[], [0], [4, 9]], 12)
    logits, _ = model(rest, state, starts=starts)
    same(logits[:1], model(rest[:1], index(state, [0]))[0])
    same(logits[1:2], model(rest[1:2])[0])
    same(logits[2:, :4], model(rest[2:, :4], index(state, [2]))[0])
    same(logits[2:, 4:9], model(rest[2:, 4:9])[0])
    same(logits[2:, 9:], model(rest[2:, 9:])[0])


@pytest.mark.parametrize("name", ["deltanet", "taught", "titans in chunks"])
def test_padding_belongs_to_no_document(name: str) -> None:
    model, tokens, starts = make(name), tokens_of(3, 12), starts_of([[0, 5], [2, 7], [4]], 12)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, 3:7] = False  # with the first token of a document, which then begins nothing
    mask[1, :2] = False
    mask[2] = False
    logits, state = model(tokens, mask=mask, starts=starts)
    same(logits[0, mask[0]], model(tokens[:1, mask[0]])[0][0])
    same(logits[1, 2:7], model(tokens[1:2, 2:7])[0][0])
    same(logits[1, 7:], model(tokens[1:2, 7:])[0][0])
    row = dict(leaves(index(state, [2])))
    assert all(not row[key].any() for key in row if key.endswith("step"))
    again, _ = model(tokens, index(state, [2, 2, 2]))
    same(again[0], model(tokens)[0][0])
    loss, _ = model.loss(tokens, mask=mask, starts=starts)
    assert loss.isfinite()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_token_is_guessed_from_padding(reduction: Any) -> None:
    """Neither padding is counted, nor the token behind it, which nothing of its sequence was read before."""
    model, tokens = make("deltanet"), tokens_of(2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    counted = {0: [3, 4, 5, 6, 7, 8], 1: [1, 2, 6, 7]}  # places of the tokens that are guessed
    logits, _ = model(tokens[:, :-1], mask=mask[:, :-1])
    losses = [
        F.cross_entropy(logits[row, place - 1], tokens[row, place])
        for row, places in counted.items()
        for place in places
    ]
    loss, _ = model.loss(tokens, mask=mask, reduction=reduction)
    same(loss, torch.stack(losses).sum() / (10 if reduction == "mean" else 1))


@pytest.mark.parametrize("learn", [False, "mixer", "mlp"])
def test_what_is_only_read_is_read_in_each_document(learn: Any) -> None:
    model, tokens, starts = make("taught"), tokens_of(len(ROWS), LENGTH), starts_of(ROWS, LENGTH)
    logits, state = model(tokens, starts=starts, learn=learn)
    for i, a, b in documents(ROWS, LENGTH):
        same(logits[i : i + 1, a:b], model(tokens[i : i + 1, a:b], learn=learn)[0])
    _, full = model(tokens)
    more, _ = model(tokens, full, starts=starts, learn=learn)  # some carry a position, others do not
    same(more[1:2], model(tokens[1:2], index(full, [1]), learn=learn)[0])
    same(more[2:3], logits[2:3])
    assert model(tokens, state)[0].isfinite().all()


@pytest.mark.parametrize("name", ["attention", "hope"])
def test_without_a_boundary_it_is_the_plain_call(name: str) -> None:
    model, tokens = make(name), tokens_of(2, 9)
    plain, _ = model(tokens)
    for starts in (starts_of([[], []], 9), starts_of([[0], [0]], 9), starts_of([[0], []], 9)):
        assert torch.equal(model(tokens, starts=starts)[0], plain)
    _, state = model(tokens)
    assert torch.equal(model(tokens, state, starts=starts_of([[0], [0]], 9))[0], plain)
    assert torch.equal(model(tokens, state, starts=starts_of([[], []], 9))[0], model(tokens, state)[0])


@settings(max_examples=60)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=300, max_size=300), min_size=1, max_size=3),
    every=st.integers(1, 200),
    shift=st.integers(0, 199),
)
def test_places_at_most_double(rows: list[list[bool]], every: int, shift: int) -> None:
    keep = torch.arange(300) % every == shift % every
    starts = torch.tensor(rows) & keep
    pieces = Pieces.of(starts, None, goes_on=False)
    assert sorted(pieces.token.tolist()) == list(range(starts.numel()))
    model = make("linear_attention", blocks=1)
    calls: list[int] = []
    mixed = model.blocks[0].mixed
    model.blocks[0].mixed = lambda x, *rest, **options: (
        calls.append(x.shape[0] * x.shape[1]),
        mixed(x, *rest, **options),
    )[1]
    with torch.no_grad():
        model(tokens_of(len(rows), 300), starts=starts)
    short = int((pieces.length <= 64).sum())
    assert sum(calls) <= 2 * starts.numel() + 64 * short


def test_in_lockstep_all_documents_take_the_same_calls() -> None:
    model = make("taught")
    model.lockstep = True
    seen: list[list[int]] = []
    back: list[int] = []
    model.blocks[0].norm.register_full_backward_hook(lambda _, given, __: back.append(given[0].shape[1]))
    for rows in ([[], []], [[0, 1, 2], [140]], [[70, 90], list(range(200))]):
        with watched(model) as calls:
            loss, _ = model.loss(tokens_of(2, 201), starts=starts_of(rows, 201))
            loss.backward()
        seen.append([length for _, length in calls])
        assert sorted(back) == sorted(seen[-1])  # also through calls on nothing
        back.clear()
    assert seen[0] == seen[1] == seen[2]
    assert sum(seen[0]) == 200 + 100 + 50


def test_refuses_a_state_in_lockstep() -> None:
    model = make("attention")
    model.lockstep = True
    _, state = model(tokens_of(2, 9))
    with pytest.raises(ValueError, match="lockstep is set; give no state"):
        model(tokens_of(2, 9), state, starts=starts_of([[3], []], 9))


def test_refuses_another_reduction() -> None:
    with pytest.raises(ValueError, match='reduction=\'none\' is not allowed; give "mean" or "sum"'):
        make("attention").loss(tokens_of(2, 9), reduction="none")


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (torch.zeros(2, 9), r"starts is torch.float32 \[2, 9\]; it must be bool \[2, 9\]"),
        (torch.zeros(2, 8, dtype=torch.bool), r"starts is torch.bool \[2, 8\]; it must be bool \[2, 9\]"),
    ],
)
def test_refuses_other_starts(starts: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("attention")(tokens_of(2, 9), starts=starts)
    with pytest.raises(ValueError, match=message):
        make("attention").loss(tokens_of(2, 9), starts=starts)
