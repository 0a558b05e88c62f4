"""The order of levels (Def. 2)."""

import pytest

from nestopt.core import Node, chain, nest, ordered, parallel
from nestopt.levels import adam, gd, momentum, muon, titans


def names(level):
    return [[node.name for node in group] for group in ordered(level.nodes("x"))]


def test_adams_moments_are_one_level():
    assert names(adam()) == [["x.exp_avg", "x.exp_avg_sq"]]


def test_amsgrads_maximum_needs_the_second_moment():
    assert names(adam(amsgrad=True)) == [["x.max_exp_avg_sq"], ["x.exp_avg", "x.exp_avg_sq"]]


def test_what_is_needed_first_is_faster():
    assert names(chain(momentum(), adam())) == [["x.adam.exp_avg", "x.adam.exp_avg_sq"], ["x.momentum"]]


def test_a_longer_period_is_slower_whatever_needs_what():
    assert names(parallel(momentum(), muon(period=16))) == [["x.muon_every_16"], ["x.momentum"]]
    assert names(chain(momentum(period=4), momentum())) == [["x.momentum_every_4"], ["x.momentum"]]


def test_needs_count_by_way_of_memories_of_other_periods():
    """Def. 2: c's state at t needs b's, and b's needs a's: a, as often updated as c, comes before it."""
    assert names(chain(a=momentum(), b=momentum(0.8, period=2), c=momentum(0.7))) == [["x.b"], ["x.c"], ["x.a"]]
    by_slower_and_faster = [
        Node("a", 4),
        Node("b", 1, ("a",)),
        Node("c", 8, ("b",)),
        Node("d", 4, ("c",)),
        Node("e", 4, ("d", "a")),
        Node("f", 4),
    ]
    assert [[n.name for n in level] for level in ordered(by_slower_and_faster)] == [
        ["c"],
        ["e"],
        ["d"],
        ["a", "f"],
        ["b"],
    ]


def test_a_rule_is_faster_than_the_memory_it_writes():
    assert names(titans(rule=chain(momentum(), adam()))) == [
        ["x"],
        ["x.rule.adam.exp_avg", "x.rule.adam.exp_avg_sq"],
        ["x.rule.momentum"],
    ]


def test_nests_multiply_periods():
    nodes = {node.name: node.period for node in nest(momentum(period=8), adam(period=2)).nodes("x")}
    assert nodes == {"x.outer": 8, "x.start": 8, "x.inner.exp_avg": 2, "x.inner.exp_avg_sq": 2}


def test_a_level_without_memory_is_still_listed():
    assert [node.memory for node in gd().nodes("x")] == ["none"]


def test_circles_and_names_given_twice_are_refused():
    with pytest.raises(ValueError, match="a -> b -> a"):
        ordered([Node("a", 1, ("b",)), Node("b", 1, ("a",))])
    with pytest.raises(ValueError, match="a -> b -> a"):
        ordered([Node("a", 1, ("b",)), Node("b", 2, ("a",))])
    with pytest.raises(ValueError, match=r"given twice: \['a'\]"):
        ordered([Node("a", 1), Node("a", 2)])
