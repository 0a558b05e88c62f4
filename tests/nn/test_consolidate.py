"""From fast to slow: what a level has learned is still answered when it is back at its start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nestopt.core.memories import Mlp, Window
from nestopt.core.tree import State, leaves
from nestopt.levels import cms, window_attention
from nestopt.models import HopeLM
from nestopt.nn import CMS, Replay, consolidate

D = 6


def make(**options: Any) -> CMS:
    torch.manual_seed(0)
    given = {
        "periods": (2, 8, 32),
        "learn": "context",
        "memory": Mlp(hidden=32, residual=False),
        "rate": 0.7,
        **options,
    }
    return CMS(D, cms(**given)).double()


def some(batch: int = 3, length: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def taught(module: CMS) -> tuple[Tensor, State]:
    """Inputs that it was to answer with zeros, and the state after it."""
    x, state = some(), None
    with torch.no_grad():
        for _ in range(3):
            _, state = module(x, state)
    assert state is not None
    return x, state


def put_back(module: CMS, state: State, names: list[str]) -> State:
    start = module.init_state(len(state["step"]))["levels"]
    return {**state, "levels": {name: start[name] if name in names else own for name, own in state["levels"].items()}}


def lost(module: CMS, x: Tensor, before: State, after: State) -> float:
    y, now, none = (module.read(x, state) for state in (before, after, None))
    return ((now - y).norm() / (none - y).norm()).item()


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_what_the_fast_levels_knew_is_still_answered(variant: str) -> None:
    module = make(variant=variant)
    x, state = taught(module)
    after, found = consolidate(module, state, x)
    fast = ["every_2", "every_8"]
    start = module.init_state(3)["levels"]["every_2"]
    want = state["levels"]["every_8"]["below"] if variant == "nested" else start
    torch.testing.assert_close(after["levels"]["every_2"]["weights"], want["weights"])
    for name in fast:
        assert not any(leaf.any() for _, leaf in leaves(after["levels"][name]["sum"]))
    assert lost(module, x, state, after) < 0.1 * lost(module, x, state, put_back(module, state, fast))
    assert [(pair.fast, pair.slow) for pair in found.pairs] == [("every_8", "every_32"), ("every_2", "every_8")]
    # of nested ones the fastest may just have been put back, and knows nothing of its own
    assert all((pair.after <= 0.5 * pair.before + 1e-12).all() for pair in found.pairs)
    assert all(text in found.table() for text in ("every_2", "every_32", "lost without"))


def test_the_slow_side_goes_first() -> None:
    """Of three levels the middle one's knowledge is in the slowest one, and the fastest one's in the middle one."""
    module = make(periods=(2, 8, 32), rate=0.7)
    x, state = taught(module)
    after, _ = consolidate(module, state, x)
    start, now = module.init_state(3)["levels"], after["levels"]

    def answered(fast: State, middle: State, slow: State) -> Tensor:
        levels = dict(zip(("every_2", "every_8", "every_32"), (fast, middle, slow), strict=True))
        return module.read(x, {**state, "levels": levels})

    old = state["levels"]
    # the slowest one answers for itself and the middle one
    both = answered(old["every_2"], old["every_8"], old["every_32"])
    alone = answered(old["every_2"], start["every_8"], now["every_32"])
    assert (alone - both).norm() < 0.1 * (answered(old["every_2"], start["every_8"], old["every_32"]) - both).norm()


def test_each_sequence_by_itself() -> None:
    module = make(periods=(2, 8))
    x, state = taught(module)
    after, _ = consolidate(module, state, x, steps=20)
    row = {key: _row(value) for key, value in state.items()}
    alone, _ = consolidate(module, row, x[1:2], steps=20)
    for name in ("every_2", "every_8"):
        mine = {key: weight[1:2] for key, weight in after["levels"][name]["weights"].items()}
        torch.testing.assert_close(mine, dict(alone["levels"][name]["weights"]), rtol=1e-6, atol=1e-8)


def _row(value: Any) -> Any:
    return {key: _row(child) for key, child in value.items()} if isinstance(value, dict) else value[1:2]


class Plain(Mlp):
    """An `Mlp` that is not known to be one."""


def test_regression_and_descent_each_help() -> None:
    module = make(periods=(2, 8))
    x, state = taught(module)
    _, found = consolidate(module, state, x, steps=0)
    _, further = consolidate(module, state, x, steps=100)
    assert (found.pairs[0].after < 0.8 * found.pairs[0].before).all()
    assert (further.pairs[0].after <= found.pairs[0].after).all()
    assert (further.pairs[0].after < found.pairs[0].after).any()
    plain = make(periods=(2, 8), memory=Plain(hidden=32, residual=False))
    plain.load_state_dict(module.state_dict())
    _, descended = consolidate(plain, state, x, steps=100)
    assert (descended.pairs[0].after < 0.8 * descended.pairs[0].before).all()


def test_a_buffer_is_replayed() -> None:
    module = make(periods=(2, 8))
    x, state = taught(module)
    replay = Replay(24)
    replay.add(x)
    assert len(replay) == 24
    after, found = consolidate(module, state, replay)
    assert found.inputs == 24
    assert lost(module, x, state, after) < 0.5 * lost(module, x, state, put_back(module, state, ["every_2"]))


def test_it_says_what_does_not_fit() -> None:
    module = make(periods=(2, 8))
    x, state = taught(module)
    one = make(periods=(2,))
    with pytest.raises(ValueError, match="one level"):
        consolidate(one, one.init_state(3), x)
    with pytest.raises(ValueError, match="static"):
        consolidate(make(learn="static"), {}, x)
    with pytest.raises(ValueError, match=r"replay has the shape \[3, 40, 5\]; it must be \[3, n >= 1, 6\]"):
        consolidate(module, state, x[..., :5])
    with pytest.raises(ValueError, match="Replay is empty"):
        consolidate(module, state, Replay(4))
    with pytest.raises(ValueError, match="consolidate"):
        consolidate(module, make(memory=Mlp(hidden=5, residual=False)).init_state(3), x)


# -- a model that sleeps ----------------------------------------------------------------------------------------------


def reader(periods: tuple[int, ...] = (4, 10_000)) -> HopeLM:
    torch.manual_seed(0)
    mlp = cms(periods=periods, learn="context", teach="loss", rate=0.5)
    return HopeLM(vocab=20, dim=16, blocks=1, heads=2, mixer=window_attention(memory=Window(2)), mlp=mlp)


def facts(batch: int = 2) -> Tensor:
    """Of each sequence a cycle of its own: the token after each."""
    g = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(20, generator=g).repeat(12) for _ in range(batch)])


@torch.no_grad()
def right(model: HopeLM, state: State | None, tokens: Tensor) -> float:
    """How many of the next tokens are answered right, with nothing in the mixers."""
    if state is not None:
        fresh = model.init_state(len(tokens))
        state = {**fresh, "block_0": {**fresh["block_0"], "mlp": state["block_0"]["mlp"]}}
    logits, _ = model(tokens[:, :40], state, learn="mixer")
    return float((logits[:, :-1].argmax(-1) == tokens[:, 1:40]).double().mean())


def test_facts_in_the_fast_level_are_answered_after_it_was_put_back() -> None:
    model, tokens = reader(), facts()
    with torch.no_grad():
        _, state = model(tokens)
    assert right(model, None, tokens) < 0.2
    assert right(model, state, tokens) > 0.8
    cms_ = model.blocks[0].mlp
    mlp = put_back(cms_, state["block_0"]["mlp"], ["every_4"])
    only_put_back = {**state, "block_0": {**state["block_0"], "mlp": mlp}}
    assert right(model, only_put_back, tokens) < 0.2  # they were in the fast level alone
    after, found = model.consolidate(state, tokens)
    start = model.init_state(2)["block_0"]["mlp"]["levels"]["every_4"]["weights"]
    torch.testing.assert_close(after["block_0"]["mlp"]["levels"]["every_4"]["weights"], start)
    assert right(model, after, tokens) > 0.8
    assert list(found) == ["block_0"]
    model(tokens, after)  # and on it goes


@pytest.mark.parametrize("periods", [(4, 10_000), (4,)])
def test_what_is_in_the_parameters_outlives_the_state(periods: tuple[int, ...]) -> None:
    model, tokens = reader(periods), facts(1)
    with torch.no_grad():
        _, state = model(tokens)
    after, _ = model.consolidate(state, tokens, into="parameters")
    assert right(model, None, tokens) > 0.8
    for name, own in after["block_0"]["mlp"]["levels"].items():  # all begin anew, where the parameters now are
        start = model.init_state(1)["block_0"]["mlp"]["levels"][name]["weights"]
        torch.testing.assert_close(own["weights"], start)


def test_models_that_have_nothing_to_move() -> None:
    tokens = facts(1)
    one, static = reader((4,)), HopeLM(vocab=20, dim=16, blocks=1, heads=2)
    for model, wanted in ((one, "two levels or more"), (static, 'learn="context"')):
        _, state = model(tokens)
        with pytest.raises(ValueError, match=wanted):
            model.consolidate(state, tokens)
    with pytest.raises(ValueError, match="into='file'"):
        one.consolidate({}, tokens, into="file")  # type: ignore[arg-type]
