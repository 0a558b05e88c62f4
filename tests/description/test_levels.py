"""Levels and stacks: their order, and the sizes of their memories."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import nestopt
from nestopt.core.clock import start
from nestopt.core.compose import Chain, Parallel, chain, parallel
from nestopt.core.gates import bind
from nestopt.core.level import Level
from nestopt.core.memories import Window
from nestopt.core.nesting import nest
from nestopt.core.tree import leaves
from nestopt.description import Description, describe
from nestopt.levels import (
    adam,
    attention,
    cms,
    deep_momentum,
    delta_momentum,
    gd,
    momentum,
    muon,
    newton_schulz,
    titans,
)

COMPOSED = ("chain", "parallel", "nest")


def names(description: Description) -> list[list[str]]:
    return [[memory.name for memory in level] for level in description.levels]


def test_adams_two_moments_share_a_level() -> None:
    assert names(describe(adam())) == [["adam.exp_avg", "adam.exp_avg_sq"]]


def test_what_keeps_nothing_is_on_no_level() -> None:
    found = describe(chain(momentum(), newton_schulz(), adam()))
    assert names(found) == [["chain.adam.exp_avg", "chain.adam.exp_avg_sq"], ["chain.momentum"]]
    assert found.memories[0].needs == ("chain.momentum",)  # by way of what keeps nothing
    assert str(found).splitlines()[-2:] == [
        "3 memories on 2 levels",
        "newton_schulz keeps no memory of its own, and is on no level.",
    ]
    alone = describe(gd())
    assert (alone.levels, alone.summary()) == ((), "0 memories on 0 levels")
    assert alone.to_svg().endswith("</svg>\n")
    both = describe(parallel(gd(), newton_schulz()))
    assert both.notes == ("gd and newton_schulz keep no memory of their own, and are on no level.",)
    sized = describe(chain(momentum(), newton_schulz()), shape=(3, 2))
    assert [(memory.name, memory.state) for memory in sized.memories] == [("chain.momentum", 24)]


def test_the_sum_of_a_clock_is_a_memory() -> None:
    for stack, name in (
        (newton_schulz(period=4), "newton_schulz"),
        (chain(newton_schulz(), gd(), period=4), "chain.newton_schulz"),
    ):
        for shape in (None, (3, 2)):
            (memory,) = describe(stack, shape=shape).memories
            assert (memory.name, memory.memory, memory.frequency) == (name, "sum", "every 4 steps")
            assert memory.state in ((None,) if shape is None else (24, 48))  # with what was last read, or without


def test_a_nest_around_what_keeps_nothing_learns_no_start() -> None:
    assert describe(nest(momentum(period=4), gd())).levels == ()
    assert names(describe(nest(momentum(period=4), momentum()))) == [["nest.start"], ["nest.outer"], ["nest.inner"]]


@pytest.mark.parametrize("name", [name for name in nestopt.registry.names("level") if name not in COMPOSED])
def test_every_level_that_runs_on_a_context_is_described(name: str) -> None:
    level = nestopt.build("level", name)
    for context in ("gradients", "tokens"):
        if context == "tokens" and (level.of_weights or not level.needs.isdisjoint(("inputs", "param"))):
            with pytest.raises(ValueError, match=r"can't run on tokens|not allowed on tokens"):
                describe(level, context=context)
            continue
        found = describe(level, context=context)
        assert found.memories or not list(leaves(start(bind(level), torch.zeros(3, 2))))
        if not isinstance(level, Chain):  # which also says what in it keeps nothing
            assert bool(found.notes) == (not found.memories)


def test_a_layer_whose_level_keeps_nothing_says_so() -> None:
    found = describe(nestopt.layer(gd(), dim=8))
    assert [memory.context for memory in found.memories] == ["gradients"]
    assert found.notes == (
        "gd keeps no memory of its own, and is on no level.",
        "gd runs on tokens as reference: the reference machine, a token at a time",
    )


def test_what_a_chain_needs_first_is_faster() -> None:
    assert names(describe(chain(momentum(), muon()))) == [["chain.muon"], ["chain.momentum"]]


def test_parallel_levels_are_ordered_by_their_clocks_alone() -> None:
    stack = parallel(momentum(), muon(period=16), adam(period=16))
    found = describe(stack)
    assert names(found) == [
        ["parallel.muon_every_16", "parallel.adam_every_16.exp_avg", "parallel.adam_every_16.exp_avg_sq"],
        ["parallel.momentum"],
    ]
    assert [level[0].frequency for level in found.levels] == ["every 16 steps", "every step"]


def test_clocks_of_nested_levels_multiply() -> None:
    stack = Chain({"fast": momentum(), "slow": Parallel({"deep": momentum(period=4)}, period=2)}, period=3)
    assert {memory.name: memory.period for memory in describe(stack).memories} == {
        "chain.fast": 3,
        "chain.slow.deep": 24,
    }


def test_a_memory_is_slower_than_the_rule_it_learns_by() -> None:
    found = describe(titans(rule=adam()), context="tokens")
    assert names(found) == [["titans"], ["titans.rule.exp_avg", "titans.rule.exp_avg_sq"]]
    assert [level[0].frequency for level in found.levels] == ["every token"] * 2
    memory = found.memories[0]
    assert (memory.memory, memory.objective, memory.rule) == ("mlp", "l2", "adam")


def test_the_outer_level_of_a_nest_is_slower() -> None:
    assert names(describe(nest(momentum(period=64), adam()))) == [
        ["nest.start"],
        ["nest.outer"],
        ["nest.inner.exp_avg", "nest.inner.exp_avg_sq"],
    ]


def test_sizes_are_left_out_without_a_shape() -> None:
    assert all(memory.parameters is None and memory.state is None for memory in describe(adam()).memories)


SIZED: list[Level] = [
    adam(amsgrad=True),
    momentum(period=4),
    delta_momentum(),
    deep_momentum(),
    deep_momentum(rule=chain(momentum(), adam(period=2)), period=3),
    cms(periods=(1, 4), rule=muon()),
    nest(adam(period=8), chain(momentum(), adam())),
    nest(gd(period=8), momentum()),
    Chain({"a": momentum(), "b": parallel(momentum(period=2), newton_schulz(period=4))}, period=2),
    titans(rule=adam()),
]


@pytest.mark.parametrize("level", SIZED, ids=lambda level: level.label)
def test_every_byte_of_the_state_belongs_to_one_memory(level: Level) -> None:
    found = describe(level, shape=(6, 4))
    state = list(leaves(start(bind(level), torch.zeros(6, 4))))
    assert found.state == sum(leaf.numel() * leaf.element_size() for _, leaf in state)


def test_each_memory_has_its_own_size() -> None:
    sizes = {memory.name: (memory.parameters, memory.state) for memory in describe(SIZED[4], shape=(6, 4)).memories}
    theta = 4 * 4 + 4 * 4
    assert sizes == {
        # W1 and W2, with an average, and a sum and a last direction for the clock, of 24 numbers each
        "deep_momentum": (theta, 4 * theta + 3 * 4 * 24),
        "deep_momentum.rule.momentum": (theta, 4 * theta),
        "deep_momentum.rule.adam_every_2.exp_avg": (theta, 3 * 4 * theta),
        "deep_momentum.rule.adam_every_2.exp_avg_sq": (theta, 4 * theta),
    }


def test_sizes_on_tokens_are_of_one_sequence() -> None:
    found = describe(titans(rule=momentum(), chunk=4), shape=(8, 8), context="tokens")
    theta = 2 * (16 * 8)
    sizes = {memory.name: (memory.parameters, memory.state) for memory in found.memories}
    assert sizes == {"titans": (theta, 4 * theta), "titans.rule": (theta, 4 * theta)}
    assert found.sequence_state == 2 * 4 * theta
    assert found.state == 0


def test_a_window_is_counted_full_and_one_without_bound_grows() -> None:
    full = describe(attention(memory=Window(4)), shape=(3, 5)).memories[0]
    assert (full.parameters, full.state, full.grows) == (2 * 4 * 15, 4 * 2 * 4 * 15, False)
    endless = describe(attention(), shape=(3, 5), context="tokens").memories[0]
    assert (endless.parameters, endless.state, endless.grows) == (None, None, True)
    assert "grows" in str(describe(attention(), shape=(3, 5), context="tokens"))


def test_one_memory_that_grows_does_not_make_others_grow() -> None:
    both = parallel(attention(memory=Window(2)), momentum())
    assert [memory.grows for memory in describe(both, shape=(3, 5)).memories] == [False, False]


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        (chain(momentum(), muon()), "momentum → muon"),
        (parallel(momentum(), adam(period=16)), "momentum + (adam every 16)"),
        (chain(momentum(), Parallel([adam(), momentum()], period=2)), "momentum → ((adam + momentum) every 2)"),
        (nest(momentum(period=8), adam()), "nest(momentum every 8, adam)"),
    ],
)
def test_a_stack_is_titled_by_what_it_does(stack: Level, words: str) -> None:
    assert describe(stack).title == words


LEAVES = st.builds(
    lambda make, period: make(period=period),
    st.sampled_from([momentum, adam, muon, delta_momentum, deep_momentum, newton_schulz, titans]),
    st.sampled_from([1, 2, 5]),
)
KEYS = st.sampled_from(["a", "b", "memory", "rule", "exp_avg", "start", "W1"])


def _deeper(inner: st.SearchStrategy[Level]) -> st.SearchStrategy[Level]:
    named = st.dictionaries(KEYS, inner, min_size=1, max_size=3)
    return st.one_of(
        st.builds(Chain, named, period=st.sampled_from([1, 3])),
        st.builds(Parallel, named, period=st.sampled_from([1, 3])),
        st.builds(nest, inner, inner),
        st.builds(lambda rule: deep_momentum(rule=rule), inner),
    )


@given(st.recursive(LEAVES, _deeper, max_leaves=5))
@settings(max_examples=60)
def test_any_nest_has_each_memory_once_slow_levels_first(level: Level) -> None:
    found = describe(level, shape=(3, 2))
    listed = [memory.name for memory in found.memories]
    nodes = {node.name: node for node in level.nodes(level.label)}
    assert set(listed) <= nodes.keys()
    assert all(memory.state for memory in found.memories)  # so that what is not listed keeps nothing
    assert {memory.name: memory.period for memory in found.memories}.items() <= {
        name: node.period for name, node in nodes.items()
    }.items()
    assert len(set(listed)) == len(listed)
    periods = [{memory.period for memory in level} for level in found.levels]
    assert all(len(same) == 1 for same in periods)
    assert [min(same) for same in periods] == sorted((min(same) for same in periods), reverse=True)  # type: ignore[type-var]
    place = {memory.name: i for i, level in enumerate(found.levels) for memory in level}
    for memory in found.memories:
        same = [need for need in memory.needs if found.memories[listed.index(need)].period == memory.period]
        assert all(place[need] > place[memory.name] for need in same)
    state = leaves(start(bind(level), torch.zeros(3, 2)))
    assert found.state == sum(leaf.numel() * leaf.element_size() for _, leaf in state)
    for row in (row for level in found.rows() for row in level):
        assert set(row.names) <= set(listed)
    assert sum(len(row.names) for level in found.rows() for row in level) == len(listed)


def test_what_can_not_be_described_is_refused() -> None:
    with pytest.raises(TypeError, match="3 is not a level"):
        describe(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer= goes with a module"):
        describe(adam(), torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
    with pytest.raises(TypeError, match="shape= and context= go with a level"):
        describe(torch.nn.Linear(2, 2), shape=(2, 2))
    with pytest.raises(ValueError, match="context='time' is not allowed"):
        describe(adam(), context="time")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"give \(D_v, D_k\)"):
        describe(adam(), shape=(2,), context="tokens")
