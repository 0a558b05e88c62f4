"""Which tokens `nestopt.ops.self_modifying` sees and writes, and when."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestopt.ops import self_modifying
from tests.levels.deep.deep_cases import close, gradients
from tests.levels.self_modifying.self_cases import BATCH, HEADS, SUBSETS, example, flat, in_pieces, run_twin, trimmed


@settings(max_examples=60)
@given(
    length=st.integers(1, 14),
    chunks=st.sampled_from([(1, 1), (2, 6), (6, 2), (3, 3), (1, 5), (4, 1)]),
    names=st.sampled_from(SUBSETS),
    cuts=st.sets(st.integers(1, 13)),
    switches=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 9),
)
def test_any_pieces_are_the_whole(
    length: int,
    chunks: tuple[int, int],
    names: tuple[str, ...],
    cuts: set[int],
    switches: tuple[bool, ...],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    delta, has_momentum, raw, masked = switches
    options = {"delta": float(delta), "has_momentum": has_momentum, "step": "raw" if raw else "normalized"}
    tokens, arguments, _ = example(length, chunk=chunks[0], projection_chunk=chunks[1], names=names, **options)
    arguments |= {"mask": torch.rand(BATCH, length) < 0.7} if masked else {}
    with torch.no_grad():
        whole = self_modifying(*tokens, **arguments)
        close(in_pieces(self_modifying, tokens, arguments, sorted(c for c in cuts if c < length)), whole)


@pytest.mark.parametrize(("chunk", "projection_chunk"), [(2, 4), (4, 2), (3, 3)])
def test_one_token_at_a_time_with_gradients(chunk: int, projection_chunk: int) -> None:
    tokens, arguments, leaves = example(11, chunk=chunk, projection_chunk=projection_chunk)
    whole = self_modifying(*tokens, **arguments)
    pieces = in_pieces(self_modifying, tokens, arguments, range(1, 11))
    close(pieces, whole)
    probes = [torch.randn_like(x) for x in flat(*whole)]
    close(gradients(flat(*pieces), leaves, probes), gradients(flat(*whole), leaves, probes))


def test_a_token_costs_the_same_however_long_the_chunk() -> None:
    """What was made of earlier tokens is kept, and not made again: their graph is not gone through twice."""
    tokens, arguments, _ = example(7, chunk=8, projection_chunk=8)
    _, state = self_modifying(*tokens, **arguments)
    again = [x[:, :1] for x in tokens]
    _, after = self_modifying(*again, **trimmed(arguments, 0, 1), state=state)
    for part, other in ((state["memory"], after["memory"]), (state["projections"], after["projections"])):
        assert part["pending"]["k"].shape[2] == 7
        assert other["pending"]["k"].shape[2] == 0
    _, shorter = self_modifying(*(x[:, :5] for x in tokens), **trimmed(arguments, 0, 5))
    _, longer = self_modifying(*(x[:, 5:6] for x in tokens), **trimmed(arguments, 5, 6), state=shorter)
    assert torch.equal(longer["memory"]["pending"]["k"][:, :, :5], shorter["memory"]["pending"]["k"])


def test_a_state_that_was_saved_goes_on_as_if_it_had_not_been() -> None:
    tokens, arguments, _ = example(11)
    _, state = self_modifying(*(x[:, :6] for x in tokens), **trimmed(arguments, 0, 6))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    rest, given = [x[:, 6:] for x in tokens], trimmed(arguments, 6, 11)
    loaded = torch.load(file, weights_only=True)
    torch.testing.assert_close(
        self_modifying(*rest, **given, state=loaded), self_modifying(*rest, **given, state=state), rtol=0, atol=0
    )


@pytest.mark.parametrize("at", [0, 3, 4, 9])
@pytest.mark.parametrize(("chunk", "projection_chunk"), [(2, 4), (4, 2)])
def test_no_token_sees_a_later_one(chunk: int, projection_chunk: int, at: int) -> None:
    with torch.no_grad():
        tokens, arguments, _ = example(13, chunk=chunk, projection_chunk=projection_chunk)
        y, _ = self_modifying(*tokens, **arguments)
        changed = [x.clone() for x in tokens]
        for x in changed:
            x[0, at] += 1
        other, _ = self_modifying(*changed, **arguments)
        assert torch.equal(other[0, :at], y[0, :at])
        assert torch.equal(other[1], y[1])
        # the same queries: reads differ from the end of the first chunk on
        other, _ = self_modifying(tokens[0], *changed[1:], **arguments)
    first = min(at - at % size + size for size in (chunk, projection_chunk))
    assert torch.equal(other[0, :first], y[0, :first])
    assert not torch.isclose(other[0, first:], y[0, first:]).flatten(1).all(1).any()


def test_sequences_and_heads_are_apart() -> None:
    tokens, arguments, _ = example(11)
    y, state = self_modifying(*tokens, **arguments)
    for b, h in itertools.product(range(BATCH), range(HEADS)):
        one = [x[b : b + 1, :, h : h + 1] for x in tokens]
        given = {**arguments, "momentum": arguments["momentum"][b : b + 1, :, h : h + 1]}
        given["starts"] = {name: [w[h : h + 1] for w in weights] for name, weights in arguments["starts"].items()}
        given["readout"] = {name: tuple(x[h : h + 1] for x in parts) for name, parts in arguments["readout"].items()}
        alone, end = self_modifying(*one, **given)
        close(alone, y[b : b + 1, :, h : h + 1])
        mine = flat(alone, end)[1:]
        close(mine, [x[b : b + 1, h : h + 1] for x in flat(y, state)[1:]])


def test_padding_with_anything_in_it_is_nothing() -> None:
    tokens, arguments, _ = example(9, chunk=1, projection_chunk=1)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    short = {**arguments, "momentum": arguments["momentum"][:, mask]}
    y, state = self_modifying(*(x[:, mask] for x in tokens), **short)
    filled = [x.masked_fill(~mask[:, None, None], torch.nan) for x in tokens]
    padded, same = self_modifying(*filled, **arguments, mask=mask.expand(BATCH, -1))
    close(padded[:, mask], y)
    close(flat(y, same)[1:], flat(y, state)[1:])
    assert (padded[:, ~mask] == 0).all()


def test_sequences_end_to_end_are_each_alone() -> None:
    ends = [0, 3, 4, 13, 18]
    tokens, arguments, _ = example(18)
    tokens, arguments["momentum"] = [x[:1] for x in tokens], arguments["momentum"][:1]
    y, _ = self_modifying(*tokens, **arguments, cu_seqlens=ends)
    for begin, end in itertools.pairwise(ends):
        alone, _ = self_modifying(*(x[:, begin:end] for x in tokens), **trimmed(arguments, begin, end))
        close(y[:, begin:end], alone)


@pytest.mark.parametrize("where", ["q", "k", "v", "momentum"])
def test_a_token_that_is_not_finite_is_not_written(where: str) -> None:
    tokens, arguments, leaves = example(11)
    mask = torch.ones(BATCH, 11, dtype=torch.bool)
    mask[0, 5] = False
    true = [x.detach() for x in run_twin(tokens, arguments, written=mask)]
    named = dict(zip("qkv", tokens, strict=True)) | {"momentum": arguments["momentum"]}
    with torch.no_grad():
        named[where][0, 5] = torch.nan if where == "k" else torch.inf
    y, state = self_modifying(*tokens, **arguments)
    assert y[0, 5].isnan().all()
    close(y[mask], true[0][mask])
    close(flat(y, state)[1:], true[1:])
    outs = [y[mask], *flat(y, state)[1:]]
    found = gradients(outs, leaves, [torch.ones_like(x) for x in outs])
    assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("every", [1, 3, 40])
@pytest.mark.parametrize("has_momentum", [False, True])
def test_recomputing_changes_nothing(every: int, has_momentum: bool) -> None:
    tokens, arguments, leaves = example(150, chunk=8, projection_chunk=16, has_momentum=has_momentum)
    kept = self_modifying(*tokens, **arguments)
    again = self_modifying(*tokens, **arguments, checkpoint=every)
    torch.testing.assert_close(again, kept, rtol=0, atol=0)
    probes = [torch.randn_like(x) for x in flat(*kept)]
    close(gradients(flat(*again), leaves, probes), gradients(flat(*kept), leaves, probes), 1e-12)
