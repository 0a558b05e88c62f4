"""What is true of a `HopeLM` that its own loss teaches, by whichever signal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import nestopt.nn as nn_
from nestopt.core.tree import leaves
from nestopt.models import HopeLM


def some(batch: int = 2, length: int = 14, seed: int = 1) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(seed))


def check_loop(model: HopeLM, tokens: Tensor, loop: Tensor, unread: str = "none") -> None:
    """`loop` are the logits that a loop over tokens gives: these, and all gradients but those of what is `unread`."""
    fast, _ = model(tokens)
    torch.testing.assert_close(fast, loop, rtol=1e-10, atol=1e-10)
    still, _ = model(tokens, learn="mixer")
    assert not torch.isclose(still[:, -1], fast[:, -1]).any()  # it did learn
    target = some(*tokens.shape, seed=3).flatten()
    names, parameters = zip(*model.named_parameters(), strict=True)
    mine, theirs = (
        torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), target), parameters, materialize_grads=True)
        for logits in (fast, loop)
    )
    for name, a, b in zip(names, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
        assert a.any() or name.endswith(unread), name


def check_pieces(model: HopeLM, cuts: Sequence[int]) -> None:
    """A text of 14 tokens read in pieces, cut in these places, is what it is as a whole."""
    tokens = some()
    with torch.no_grad():
        whole, end = model(tokens)
        state, found = None, []
        for a, b in itertools.pairwise([0, *sorted(cuts), 14]):
            logits, state = model(tokens[:, a:b], state)
            found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dict(leaves(state or {})), dict(leaves(end)), rtol=1e-10, atol=1e-10)


def check_causal_and_alone(model: HopeLM) -> None:
    """Each sequence of a batch is what it is alone, and no token changes an answer before it."""
    tokens = some(3)
    logits, _ = model(tokens)
    for row in range(3):
        torch.testing.assert_close(model(tokens[row : row + 1])[0][0], logits[row], rtol=1e-10, atol=1e-10)
    other = tokens.clone()
    other[:, 9] = (other[:, 9] + 1) % 11
    again, _ = model(other)
    torch.testing.assert_close(again[:, :9], logits[:, :9], rtol=0, atol=1e-12)
    assert not torch.isclose(again[:, 9], logits[:, 9]).any()


def check_rows(model: HopeLM) -> None:
    """Rows are begun anew, chosen and put together, each as if alone."""
    tokens, more = some(3), some(3, 8, seed=4)
    _, state = model(tokens)
    fresh, went_on = model(more)[0], model(more, state)[0]
    after = model(more, model.reset(state, [1]))[0]
    torch.testing.assert_close(after[1], fresh[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after[[0, 2]], went_on[[0, 2]], rtol=1e-10, atol=1e-10)
    two = nn_.cat([nn_.index(state, [2]), model(tokens[:1, :5])[1]])  # of different places in their periods
    third = model(more[[2, 0]], two)[0]
    torch.testing.assert_close(third[0], went_on[2], rtol=1e-10, atol=1e-10)
    other = model(more[:1], model(tokens[:1, :5])[1])[0]
    torch.testing.assert_close(third[1], other[0], rtol=1e-10, atol=1e-10)


def check_recomputing(model: HopeLM, recomputed: HopeLM) -> None:
    """Two models with the same weights have the same gradients, though one recomputes."""
    tokens, found = some(2, 15), []
    for one, piece in ((model, 1024), (recomputed, 3)):
        loss, _ = one.loss(tokens, piece=piece)
        loss.backward()
        found.append({key: p.grad for key, p in one.named_parameters()})
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)
