from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestopt.levels.deep.deep_memory import deep_memory
from tests.levels.deep.deep_cases import BATCH, HEADS, READS, close, example, gradients, outputs, run_twin, weights_of


def cut(x: Any, begin: int, end: int, length: int) -> Any:
    """The tokens from `begin` to `end` of anything `[B, T, ..]`."""
    return x[:, begin:end] if isinstance(x, Tensor) and x.ndim >= 2 and x.shape[1] == length else x


def in_pieces(tokens: list[Tensor], arguments: dict[str, Any], ends: Sequence[int]) -> tuple[Tensor, Any]:
    length, ys, state, begin = tokens[0].shape[1], [], arguments.get("state"), 0
    for end in [*ends, length]:
        given = {name: cut(x, begin, end, length) for name, x in arguments.items() if name not in ("weights", "state")}
        piece = [cut(x, begin, end, length) for x in tokens]
        y, state = deep_memory(*piece, **given, weights=arguments["weights"], state=state)
        ys.append(y)
        begin = end
    return torch.cat(ys, 1), state


@pytest.mark.parametrize("read", READS)
@settings(max_examples=40)
@given(
    length=st.integers(1, 14),
    chunk=st.integers(1, 6),
    cuts=st.sets(st.integers(1, 13)),
    switches=st.tuples(*[st.booleans()] * 5),
    seed=st.integers(0, 9),
)
def test_any_pieces_are_the_whole(
    read: str, length: int, chunk: int, cuts: set[int], switches: tuple[bool, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    delta, has_momentum, has_decay, masked, joint = switches
    tokens, arguments = example(length, read=read, chunk=chunk, delta=float(delta))
    arguments["step"] = "normalized" if joint else "layerwise"
    arguments |= {} if has_momentum else {"momentum": None}
    arguments |= {} if has_decay else {"decay": None}
    arguments |= {"mask": torch.rand(BATCH, length) < 0.7} if masked else {}
    whole, pieces = (
        deep_memory(*tokens, **arguments),
        in_pieces(tokens, arguments, sorted(c for c in cuts if c < length)),
    )
    close(pieces, whole)


@pytest.mark.parametrize("step", ["normalized", "layerwise"])
@pytest.mark.parametrize("read", READS)
def test_one_token_at_a_time_with_gradients(read: str, step: str) -> None:
    tokens, arguments = example(11, read=read, step=step)
    leaves = [x.requires_grad_() for x in (*tokens, *arguments["weights"], arguments["lr"], arguments["momentum"])]
    whole, pieces = deep_memory(*tokens, **arguments), in_pieces(tokens, arguments, range(1, 11))
    close(pieces, whole)
    probes = [torch.randn_like(x) for x in outputs(*whole)]
    close(gradients(outputs(*pieces), leaves, probes), gradients(outputs(*whole), leaves, probes))


def test_a_state_that_was_saved_goes_on_as_if_it_had_not_been() -> None:
    tokens, arguments = example(11)
    first = {name: cut(x, 0, 6, 11) for name, x in arguments.items()}
    rest = {name: cut(x, 6, 11, 11) for name, x in arguments.items()}
    _, state = deep_memory(*(x[:, :6] for x in tokens), **first)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    rest_tokens = [x[:, 6:] for x in tokens]
    torch.testing.assert_close(
        deep_memory(*rest_tokens, **rest, state=loaded), deep_memory(*rest_tokens, **rest, state=state), rtol=0, atol=0
    )


@pytest.mark.parametrize("step", ["normalized", "layerwise"])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("at", [0, 3, 4, 9])
def test_no_token_sees_a_later_one(read: str, at: int, step: str) -> None:
    tokens, arguments = example(11, read=read, step=step)
    y, _ = deep_memory(*tokens, **arguments)
    changed = [x.clone() for x in tokens]
    for x in changed:
        x[0, at] = F.normalize(x[0, at] + 1, dim=-1)
    other, _ = deep_memory(*changed, **arguments)
    assert torch.equal(other[0, :at], y[0, :at])
    assert torch.equal(other[1], y[1])
    seen = {"after": at, "before": at + 1, "chunk": at - at % 4 + 4}[read]
    written = [tokens[0], *changed[1:]]  # the same queries: reads differ from where the write is seen
    other, _ = deep_memory(*written, **arguments)
    assert torch.equal(other[0, :seen], y[0, :seen])
    if seen < 11:
        assert not torch.isclose(other[0, seen:], y[0, seen:]).flatten(1).all(1).any()


@pytest.mark.parametrize("step", ["normalized", "layerwise"])
def test_sequences_and_heads_are_apart(step: str) -> None:
    tokens, arguments = example(11, step=step)
    y, state = deep_memory(*tokens, **arguments)
    for b, h in itertools.product(range(BATCH), range(HEADS)):
        one = [x[b : b + 1, :, h : h + 1] for x in tokens]
        gates = {name: arguments[name][b : b + 1, :, h : h + 1] for name in ("lr", "decay", "momentum")}
        alone, end = deep_memory(*one, **{**arguments, **gates})
        close(alone, y[b : b + 1, :, h : h + 1])
        close(end["weights"], {name: w[b : b + 1, h : h + 1] for name, w in state["weights"].items()})


@pytest.mark.parametrize("step", ["normalized", "raw", "layerwise"])
@pytest.mark.parametrize("read", READS)
def test_padding_neither_writes_nor_fades(read: str, step: str) -> None:
    tokens, arguments = example(14, read=read, step=step)
    mask = torch.rand(BATCH, 14) < 0.6
    leaves = [x.requires_grad_() for x in (*tokens, *arguments["weights"], arguments["lr"], arguments["momentum"])]
    fast, slow = outputs(*deep_memory(*tokens, **arguments, mask=mask)), run_twin(tokens, arguments, mask=mask)
    close(fast, slow)
    probes = [torch.randn_like(x) for x in slow]
    found = gradients(fast, leaves, probes)
    close(found, gradients(slow, leaves, probes))
    assert all((g[~mask] == 0).all() for g in found[:3])


def test_padding_with_anything_in_it_is_nothing() -> None:
    tokens, arguments = example(9, chunk=1)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    y, state = deep_memory(*(x[:, mask] for x in tokens), **{n: cut_mask(x, mask) for n, x in arguments.items()})
    filled = [x.masked_fill(~mask[:, None, None], torch.nan) for x in tokens]
    padded, same = deep_memory(*filled, **arguments, mask=mask.expand(BATCH, -1))
    close(padded[:, mask], y)
    close(same["weights"], state["weights"])
    assert (padded[:, ~mask] == 0).all()


def cut_mask(x: Any, mask: Tensor) -> Any:
    return x[:, mask] if isinstance(x, Tensor) and x.ndim == 3 and x.shape[1] == len(mask) else x


@pytest.mark.parametrize("step", ["normalized", "layerwise"])
@pytest.mark.parametrize("read", READS)
def test_sequences_end_to_end_are_each_alone(read: str, step: str) -> None:
    ends = [0, 3, 4, 13, 18]
    tokens, arguments = example(18, read=read, step=step)
    tokens, gates = [x[:1] for x in tokens], {name: arguments.pop(name)[:1] for name in ("lr", "decay", "momentum")}
    y, _ = deep_memory(*tokens, **arguments, **gates, cu_seqlens=ends)
    for begin, end in itertools.pairwise(ends):
        piece = [x[:, begin:end] for x in tokens]
        alone, _ = deep_memory(*piece, **arguments, **{name: x[:, begin:end] for name, x in gates.items()})
        close(y[:, begin:end], alone)
    arguments["chunk"] = 1  # there are no chunks that are not over: the states are the same, too
    _, state = deep_memory(*tokens, **arguments, **gates, cu_seqlens=torch.tensor(ends))
    for i, (begin, end) in enumerate(itertools.pairwise(ends)):
        piece = [x[:, begin:end] for x in tokens]
        _, alone = deep_memory(*piece, **arguments, **{name: x[:, begin:end] for name, x in gates.items()})
        for kind in ("weights", "momentum"):
            close({name: w[i : i + 1] for name, w in state[kind].items()}, alone[kind])


@pytest.mark.parametrize("step", ["normalized", "layerwise"])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("where", ["q", "k", "v", "lr", "decay", "momentum"])
def test_a_token_that_is_not_finite_is_not_written(read: str, where: str, step: str) -> None:
    tokens, arguments = example(11, read=read, step=step)
    named_tokens = dict(zip("qkv", tokens, strict=True))
    gates = {name: arguments[name] for name in ("lr", "decay", "momentum")}
    mask = torch.ones(BATCH, 11, dtype=torch.bool)
    mask[0, 5] = False
    true = [x.detach() for x in run_twin(tokens, arguments, written=mask)]
    broken = (named_tokens | gates)[where]
    broken[0, 5] = torch.nan if where == "k" else torch.inf
    leaves = [x.requires_grad_() for x in (*tokens, *gates.values(), *arguments["weights"])]
    y, state = deep_memory(*tokens, **arguments)
    assert y[0, 5].isnan().all()
    close(y[mask], true[0][mask])
    close(outputs(y, state)[1:], true[1:])
    found = gradients(outputs(y[mask], state), leaves, [torch.ones_like(x) for x in outputs(y[mask], state)])
    assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("step", ["normalized", "layerwise"])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("every", [1, 20, 40])
@pytest.mark.parametrize("has_momentum", [False, True])
def test_recomputing_changes_nothing(read: str, every: int, has_momentum: bool, step: str) -> None:
    tokens, arguments = example(150, read=read, step=step)  # more than two blocks
    arguments["momentum"] = arguments["momentum"] if has_momentum else None
    leaves = [x.requires_grad_() for x in (*tokens, *arguments["weights"], arguments["lr"], arguments["decay"])]
    kept = deep_memory(*tokens, **arguments)
    again = deep_memory(*tokens, **arguments, checkpoint=every)
    torch.testing.assert_close(again, kept, rtol=0, atol=0)
    probes = [torch.randn_like(x) for x in outputs(*kept)]
    close(gradients(outputs(*again), leaves, probes), gradients(outputs(*kept), leaves, probes), 1e-13)


@pytest.mark.parametrize("step", ["normalized", "layerwise"])
def test_every_weight_gets_a_gradient_however_few_tokens(step: str) -> None:
    for length, read, depth in itertools.product((1, 4, 9), READS, (1, 2, 3)):
        tokens, arguments = example(length, read=read, step=step)
        weights = [w.requires_grad_() for w in weights_of(depth)]
        y, _ = deep_memory(*tokens, **{**arguments, "weights": weights})
        for gradient in torch.autograd.grad(y.square().sum(), weights):
            assert gradient.abs().sum() > 0
