"""Padding and sequences end to end: every sequence as it is alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import nestopt
from nestopt.core.tree import leaves
from nestopt.levels import attention, titans
from nestopt.nn import SequenceMemory, index
from tests.nn.tools import F64, LEVELS, level_of, make, same

LENGTHS = [6, 3, 1, 9]
PATTERNS = {
    "left": lambda n, length: torch.arange(length) >= length - n,
    "right": lambda n, length: torch.arange(length) < n,
    "between": lambda n, length: torch.arange(length).mul(7).remainder(length).argsort().argsort() < n,
}


def padded(pattern: str, x: list[Tensor], junk: float) -> tuple[Tensor, Tensor]:
    """Sequences in one batch, with `junk` at padding, and the mask."""
    length = max(len(one) for one in x) + 1
    mask = torch.stack([PATTERNS[pattern](len(one), length) for one in x])
    batch = torch.full((len(x), length, x[0].shape[-1]), junk, dtype=x[0].dtype)
    for row, where, one in zip(batch, mask, x, strict=True):
        row[where] = one
    return batch, mask


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_padded_sequence_is_what_it_is_alone(name: str, pattern: str) -> None:
    module = make(name)
    alone = [torch.randn(n, 8, dtype=F64) for n in LENGTHS]
    x, mask = padded(pattern, alone, junk=torch.nan)
    y, state = module(x, mask=mask)
    assert not y[~mask].any()
    for i, one in enumerate(alone):
        true, end = module(one[None])
        same(y[i][mask[i]], true[0])
        row = dict(leaves(index(state, [i])))
        same(row["conv"], end["conv"])
        same(row["memory.step"], end["memory"]["step"])
        # keys are as many as the batch has, and directions that no token has are any
        if not any(key.endswith((".keys", ".basis")) for key in row):
            same(row, dict(leaves(end)), 1e-8)  # roots of nearly singular matrices lose digits


@pytest.mark.parametrize("name", LEVELS)
def test_a_mask_of_tokens_only_changes_nothing(name: str) -> None:
    module = make(name)
    x = torch.randn(2, 6, 8, dtype=F64)
    y, _ = module(x)
    same(module(x, mask=torch.ones(2, 6, dtype=torch.bool))[0], y)


@pytest.mark.parametrize("name", ["titans", "gated_deltanet", "attention", "omega", "momentum", "adam"])
def test_gradients_are_those_of_the_sequences_alone(name: str) -> None:
    module = make(name)
    alone = [torch.randn(n, 8, dtype=F64, requires_grad=True) for n in LENGTHS]
    inputs = [*alone, *module.parameters()]
    true = torch.autograd.grad(sum(module(one[None])[0].sin().sum() for one in alone), inputs)
    for pattern in PATTERNS:
        x, mask = padded(pattern, [one.detach() for one in alone], junk=torch.nan)
        x.requires_grad_()
        y, _ = module(x, mask=mask)
        grads = torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])
        assert not grads[0][~mask].any()
        same([grads[0][i][mask[i]] for i in range(len(alone))], list(true[: len(alone)]), 1e-9)
        same(grads[1:], true[len(alone) :], 1e-9)


@pytest.mark.parametrize("name", LEVELS)
def test_sequences_end_to_end_are_what_they_are_alone(name: str) -> None:
    module = make(name)
    x = torch.randn(1, 10, 8, dtype=F64)
    ends = [0, 4, 5, 10]
    y, state = module(x, cu_seqlens=torch.tensor(ends))
    assert state["memory"]["step"].shape == (3, 2)
    for i, (a, b) in enumerate(itertools.pairwise(ends)):
        true, end = module(x[:, a:b])
        same(y[:, a:b], true)
        same(state["conv"][i], end["conv"][0])
    again, _ = module(x, state, cu_seqlens=ends)
    same(again[:, 4:5], module(torch.cat([x[:, 4:5]] * 2, 1))[0][:, 1:])


def test_a_row_without_tokens_stays_where_it_was() -> None:
    module = make("gated_deltanet")
    _, state = module(torch.randn(2, 3, 8, dtype=F64))
    mask = torch.tensor([[True, True], [False, False]])
    y, after = module(torch.randn(2, 2, 8, dtype=F64), state, mask=mask)
    assert not y[1].any()
    same(dict(leaves(index(after, [1]))), dict(leaves(index(state, [1]))))


def test_says_what_does_not_fit() -> None:
    module = SequenceMemory(titans(), 8, 2)
    x = torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match=r"mask is torch.float32; it must be bool"):
        module(x, mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"mask has the shape \[2, 4\].*\[2, 5\]"):
        module(x, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"one row; x has the shape \[2, 5, 8\]"):
        module(x, cu_seqlens=[0, 5])
    for wrong in ([0, 4], [0, 2, 2, 5], [1, 5], [0]):
        with pytest.raises(ValueError, match=r"rising whole numbers from 0 to the 5 tokens"):
            module(x[:1], cu_seqlens=wrong)
    with pytest.raises(ValueError, match="cu_seqlens and mask are both given"):
        module(x[:1], cu_seqlens=[0, 5], mask=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"of a batch of 1, and the input of 2"):
        module(x[:1], module.init_state(1), cu_seqlens=[0, 2, 5])
    before = SequenceMemory(attention(read="before"), 8, 2)
    with pytest.raises(ValueError, match="mask is not for attention with read='before'"):
        before(x, mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"q\[0, 1, 0, 0\] is nan"):
        module(torch.full((1, 2, 8), torch.nan).index_fill(1, torch.tensor([0]), 0.0), validate=True)


@pytest.mark.parametrize("name", LEVELS)
def test_padding_and_tokens_of_zeros_have_gradients_in_float16(name: str) -> None:
    torch.manual_seed(0)
    module = SequenceMemory(level_of(name), 16, 2).half()
    x, mask = torch.randn(2, 10, 16).half(), torch.ones(2, 10, dtype=torch.bool)
    mask[0, 7:], mask[1, :2] = False, False
    x[0, 3] = 0
    x[1, 5:] = 0
    for options in ({}, {"mask": mask}):
        given = x.clone().requires_grad_()
        y, _ = module(given, **options)
        module.zero_grad()
        y.float().square().mean().backward()
        found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None} | {"x": given.grad}
        assert not [name for name, grad in found.items() if not grad.isfinite().all()]


@pytest.mark.parametrize("learn", ["static", "context"])
def test_padding_of_nan_is_in_no_gradient_of_a_continuum(learn: str) -> None:
    module = nestopt.layer(nestopt.levels.cms(periods=(2, 4), learn=learn), dim=8)
    alone = [torch.randn(n, 8) for n in LENGTHS]
    x, mask = padded("right", alone, junk=torch.nan)
    y, _ = module(x, mask=mask)
    y[mask].square().sum().backward()
    grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    assert grads
    module.zero_grad()
    sum(module(one[None])[0].square().sum() for one in alone).backward()
    torch.testing.assert_close(grads, [p.grad for p in module.parameters() if p.grad is not None])
