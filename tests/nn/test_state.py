"""States of layers as data: cut, copied, chosen from, put together, begun anew, written to files."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.utils import _pytree as pytree

from nestopt.core.tree import leaves, nested
from nestopt.levels import attention, deltanet, titans
from nestopt.models import HopeLM
from nestopt.nn import CMS, SequenceMemory, cat, clone, detach, index, to
from tests.nn.tools import F64, LEVELS, make, same, same_states


def after(module: SequenceMemory, batch: int, tokens: int) -> dict[str, Any]:
    return module(torch.randn(batch, tokens, 8, dtype=F64))[1]


@pytest.mark.parametrize("name", LEVELS)
def test_rows_are_chosen_and_reordered(name: str) -> None:
    module = make(name)
    state, x = after(module, 3, 6), torch.randn(3, 4, 8, dtype=F64)
    whole, _ = module(x, state)
    for rows in ([2, 0], [-1, 0], torch.tensor([2, 0])):
        same(module(x[[2, 0]], index(state, rows))[0], whole[[2, 0]])
    same(module(x[1:].clone(), index(state, [False, True, True]))[0], whole[1:])
    same(module(x[[1, 1, 1, 2]], index(state, [1, 1, 1, 2]))[0], whole[[1, 1, 1, 2]])


@pytest.mark.parametrize("name", LEVELS)
def test_states_put_together_are_one_batch(name: str) -> None:
    module = make(name)
    one, two, x = after(module, 2, 6), after(module, 1, 6), torch.randn(3, 4, 8, dtype=F64)
    y, _ = module(x, cat([one, two]))
    same(y, torch.cat([module(x[:2], one)[0], module(x[2:], two)[0]]))
    same_states(index(cat([one, two]), [0, 1]), one)


@pytest.mark.parametrize("name", LEVELS)
def test_states_of_other_lengths_are_put_together(name: str) -> None:
    module = make(name)
    states, x = [after(module, 1, 2), after(module, 2, 7), after(module, 1, 5)], torch.randn(4, 5, 8, dtype=F64)
    y, end = module(x, cat(states))
    parts = x.split([1, 2, 1])
    same(y, torch.cat([module(part, state)[0] for part, state in zip(parts, states, strict=True)]))
    again, _ = module(x[1:], cat([index(end, [1, 2]), index(end, [3])]))
    same(again[0], module(parts[1], module(parts[1], states[1])[1])[0][0])


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("tokens", [4, 12])
def test_rows_begun_anew_know_nothing_and_others_all(name: str, tokens: int) -> None:
    module = make(name)
    state, x = after(module, 3, tokens), torch.randn(3, 5, 8, dtype=F64)
    same(module(x[[0, 2]], index(module.reset(state, [1]), [0, 2]))[0], module(x, state)[0][[0, 2]])
    again = module.reset(state, torch.tensor([False, True, False]))
    y, end = module(x, again)
    same_states(module.reset(state, torch.tensor([-2])), again)
    other = module.reset(after(module, 3, tokens), [1])
    same(module(x, other)[0][1], y[1], 1e-12)  # whatever it had seen
    same(end["memory"]["step"][:, 0], torch.tensor([tokens + 5, 5, tokens + 5]))
    same(y[1], module(x)[0][1])
    same(module(x[:, :1], again)[0][1], module(x[:, :1])[0][1])


def test_a_row_begun_anew_begins_at_the_learned_start_with_its_gradient() -> None:
    module = make("titans in chunks")
    state = module.reset(detach(after(module, 2, 4)), [0])
    y, _ = module(torch.randn(2, 3, 8, dtype=F64), state)
    assert torch.autograd.grad(y[0].sum(), module.start["W1"], retain_graph=True)[0].any()
    assert not torch.autograd.grad(y[1].sum(), module.start["W1"])[0].any()


def test_attention_begun_anew_goes_on_within_its_window() -> None:
    module = make("short window")
    x = torch.randn(2, 12, 8, dtype=F64)
    _, state = module(x[:, :5])
    y, end = module(x[:, 5:], module.reset(state, [True, False]))
    same(y[0], module(x[:1, 5:])[0][0])
    same(y[1], module(x[1:])[0][0, 5:])
    assert end["memory"]["level"]["memory"]["keys"].shape == (2, 2, 3, 4)


def test_what_cannot_be_begun_anew_is_said() -> None:
    module = make("titans")
    state = after(module, 2, 3)
    with pytest.raises(ValueError, match="rows has 2; the batch has 2 sequences, from 0 to 1"):
        module.reset(state, [0, 2])
    with pytest.raises(ValueError, match="rows has 3 bools; the batch has 2"):
        module.reset(state, [True, False, True])
    with pytest.raises(ValueError, match=r"rows is torch.float32 \[1\]"):
        module.reset(state, torch.tensor([0.0]))
    with pytest.raises(ValueError, match="Is it the state of another layer"):
        module.reset(after(make("deltanet"), 2, 3), [0])
    same_states(module.reset(state, []), state)
    before = SequenceMemory(attention(read="before"), 8, 2).double()
    with pytest.raises(ValueError, match="attention with read='before' keeps every pair"):
        before.reset(after(before, 2, 3), [0])
    with pytest.raises(ValueError, match=r"\['memory'\] has 'mask'"):
        before(torch.randn(2, 1, 8, dtype=F64), cat([after(before, 1, 3), after(before, 1, 4)]))


@pytest.mark.parametrize("name", ["titans in chunks", "attention", "omega", "adam", "deltanet"])
def test_files_and_copies_hold_all_of_it(name: str, tmp_path: Path) -> None:
    module = make(name)
    state, x = after(module, 2, 6), torch.randn(2, 4, 8, dtype=F64)
    whole, _ = module(x, state)
    flat, spec = pytree.tree_flatten(state)
    assert all(isinstance(leaf, torch.Tensor) for leaf in flat)
    same_states(pytree.tree_unflatten(flat, spec), state)
    file = io.BytesIO()
    torch.save(clone(detach(state)), file)
    file.seek(0)
    same(module(x, torch.load(file, weights_only=True))[0], whole, 0)
    path = tmp_path / "state.safetensors"
    safetensors.torch.save_file(dict(leaves(clone(state))), path)
    same(module(x, nested(safetensors.torch.load_file(path)))[0], whole, 0)
    same(module(x, copy.deepcopy(detach(state)))[0], whole, 0)
    same_states(detach(state), state)
    assert not any(leaf.requires_grad for _, leaf in leaves(detach(state)))


def test_a_new_state_is_copied_whole() -> None:
    state = SequenceMemory(titans(), 8, 2).init_state(3)
    own = clone(state)
    assert len({leaf.data_ptr() for _, leaf in leaves(own) if leaf.numel()}) == sum(
        leaf.numel() > 0 for _, leaf in leaves(own)
    )
    assert all(leaf.is_contiguous() for _, leaf in leaves(own))
    next(leaf for path, leaf in leaves(own) if path.endswith("W1"))[0].data.zero_()
    assert own["memory"]["level"]["memory"]["W1"][1].any()


def test_dtypes_and_devices_change_together() -> None:
    module = make("titans in chunks")
    state = after(module, 2, 6)
    short = to(state, dtype=torch.float32)
    kinds = {path: leaf.dtype for path, leaf in leaves(short)}
    assert kinds["memory.step"] == torch.int64
    assert kinds["memory.pending.live"] == torch.bool
    assert set(kinds.values()) == {torch.int64, torch.bool, torch.float32}
    x = torch.randn(2, 3, 8, dtype=F64)
    same(module(x, short)[0], module(x, state)[0], 1e-5)  # taken over into float64
    with pytest.raises(ValueError, match=r"\['conv'\] is torch.float64, and this layer's memory is torch.float32"):
        module.float()(x.float(), state)
    assert {str(leaf.device) for _, leaf in leaves(to(state, "meta"))} == {"meta"}
    with pytest.raises(ValueError, match="is on meta, and the input on cpu"):
        module(x.float(), to(short, "meta"))
    with pytest.raises(ValueError, match=r"dtype=torch.int64 is not allowed"):
        to(state, dtype=torch.int64)


def test_states_of_other_dtypes_are_refused_in_words() -> None:
    module = SequenceMemory(deltanet(), 8, 2)
    x = torch.zeros(1, 2, 8)
    _, state = module(x)
    whole = {**state, "conv": state["conv"].long()}
    with pytest.raises(ValueError, match=r"state\['conv'\] is torch.int64; it must be floating: torch.float32"):
        module(x, whole)
    memory = {**state["memory"], "step": state["memory"]["step"].float()}
    with pytest.raises(ValueError, match=r"\['step'\] is torch.float32; it must be torch.int64"):
        module(x, {**state, "memory": memory})


def test_states_that_are_no_batch_are_refused_in_words() -> None:
    one, two = after(make("titans"), 1, 2), after(make("deltanet"), 1, 2)
    with pytest.raises(ValueError, match="states is empty"):
        cat([])
    with pytest.raises(ValueError, match=r"states\[1\] and states\[0\] differ at state\['memory'\] in pending"):
        cat([one, two])
    with pytest.raises(ValueError, match=r"state\['conv'\] is torch.float32 on cpu in states\[1\]"):
        cat([one, to(one, dtype=torch.float32)])
    with pytest.raises(ValueError, match=r"\['conv'\] is \[1, 1, 8\] in states\[1\] and \[1, 3, 8\] in states\[0\]"):
        cat([two, {**two, "conv": two["conv"][:, :1]}])
    with pytest.raises(ValueError, match="rows has 1; the batch has 1 sequences"):
        index(one, [1])


def test_states_of_whole_models_are_the_same_kind() -> None:
    model = HopeLM(dim=8, heads=2, blocks=2, vocab=5)
    tokens = torch.randint(5, (3, 6))
    _, state = model(tokens[:, :4])
    true = model(tokens[[2, 0], 4:], index(state, [2, 0]))[0]
    torch.testing.assert_close(model(tokens[:, 4:], state)[0][[2, 0]], true)
    _, short = model(tokens[:1, :2])
    y, _ = model(tokens[:2, 4:], cat([index(state, [0]), short]))
    torch.testing.assert_close(y[1:], model(tokens[1:2, 4:], short)[0])
    assert index(CMS(8).init_state(2), [0]) == {}
