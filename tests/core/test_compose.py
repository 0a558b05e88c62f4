"""Levels of levels: names, state keys, and that composition means what it says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestopt.core import Level, Signal, advance, chain, nest, parallel, start
from nestopt.core.clock import advance_
from nestopt.core.compose import Chain
from nestopt.core.memories import Window
from nestopt.core.tree import leaves, nested
from nestopt.levels import adam, attention, gd, m3, momentum, muon, regression_optimum, second_moment


def run(level, grads):
    state, out = start(level, grads[0]), []
    for t, grad in enumerate(grads, start=1):
        u, state = advance(level, grad, state, Signal(t, grad))
        out.append(u)
    return torch.stack(out), state


@pytest.fixture
def grads():
    return [torch.randn(3, 2, dtype=torch.float64) for _ in range(8)]


def test_chain_feeds_each_level_the_direction_of_the_one_before(grads):
    got, _ = run(chain(momentum(0.9), adam()), grads)
    first, _ = run(momentum(0.9), grads)
    want, _ = run(adam(), list(first))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_parallel_sums_what_levels_say_of_the_same_gradient(grads):
    got, _ = run(parallel(momentum(0.9), adam(), weights=[0.5, -2]), grads)
    torch.testing.assert_close(got, 0.5 * run(momentum(0.9), grads)[0] - 2 * run(adam(), grads)[0])


def test_a_chain_of_one_is_that_level(grads):
    assert torch.equal(run(chain(adam()), grads)[0], run(adam(), grads)[0])


def test_a_nest_whose_start_moves_all_the_way_is_its_inner_level(grads):
    got, _ = run(nest(gd(period=3), adam()), grads)
    torch.testing.assert_close(got, run(adam(), grads)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1.0, 0.3, 0.0])
def test_a_nest_learns_the_start_of_its_inner_level(grads, size):
    """By hand: momentum inside; outside, momentum over (start - arrived), every three steps."""
    got, state = run(nest(momentum(0.5, period=3), momentum(0.9), step_size=size), grads)
    m, begin, outer = (torch.zeros_like(grads[0]) for _ in range(3))
    for t, g in enumerate(grads, start=1):
        m = 0.9 * m + g
        torch.testing.assert_close(got[t - 1], m)
        if t % 3 == 0:
            outer = 0.5 * outer + (begin - m)
            begin = begin - size * outer
            m = begin
    torch.testing.assert_close(state["start"]["momentum"], begin)


INNER = [adam(), adam(amsgrad=True), second_moment(of=momentum()), regression_optimum(), m3(slow_period=2)]
OUTER = [adam(period=2), momentum(0.9, period=3), second_moment(period=2), muon(period=2), gd(period=2)]


@settings(max_examples=60)
@given(
    st.sampled_from([*INNER, chain(momentum(), adam()), nest(momentum(period=2), adam())]),
    st.sampled_from(OUTER),
    st.floats(0.0, 2.0),
    st.floats(-6, 3),
)
def test_what_is_never_negative_begins_no_context_below_where_it_was(inner, outer, size, exponent):
    level, random = nest(outer, inner, step_size=size), torch.Generator().manual_seed(0)
    state = start(level, torch.zeros(4, 3, dtype=torch.float64))
    for t in range(1, 16):
        grad = torch.randn(4, 3, generator=random, dtype=torch.float64) * 10**exponent
        _, plain = advance(inner, grad, state["inner"], Signal(t, grad))
        before, arrived = dict(leaves(state["start"])), dict(leaves(plain))
        direction, state = advance(level, grad, state, Signal(t, grad))
        assert direction.isfinite().all()
        if t % outer.period:
            continue
        for path, leaf in leaves(state["start"]):
            if path.endswith(("exp_avg_sq", "rms")):
                assert (leaf >= torch.minimum(before[path], arrived[path])).all()
                assert (leaf >= 0).all()


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_adam_inside_adam_keeps_the_size_of_its_steps(scale):
    grads = [scale * torch.randn(5, 4, dtype=torch.float64) for _ in range(40)]
    got, _ = run(nest(adam(period=4), adam(), step_size=scale), grads)
    assert 0.1 < got.abs().max() < 3  # √v of a negative v would make it 1e8


class Grows(Level):
    def init(self, param):
        return {"kept": param.new_zeros(0, *param.shape)}

    def step(self, grad, state, signal):
        return grad, {"kept": torch.cat([state["kept"], grad[None]])}


def test_state_keys_are_readable_and_do_not_depend_on_order():
    param = torch.zeros(2, 2)
    one = chain(slow=parallel(long=momentum(0.99), every=muon(period=4)), fast=adam())
    keys = [key for key, _ in leaves(start(one, param))]
    assert keys == [
        "slow.long.momentum",
        "slow.every.clock_sum",
        "slow.every.clock_read",
        "slow.every.momentum",
        "fast.exp_avg",
        "fast.exp_avg_sq",
    ]
    two = chain(fast=adam(), slow=parallel(every=muon(period=4), long=momentum(0.99)))
    assert set(keys) == {key for key, _ in leaves(start(two, param))}


def test_children_without_a_name_are_called_after_what_they_are():
    assert list(parallel(muon(), muon(period=16), muon()).levels) == ["muon", "muon_every_16", "muon_2"]
    assert list(chain([momentum(), adam()], last=gd()).levels) == ["momentum", "adam", "last"]
    assert list(Chain([gd()]).levels) == ["gd"]


def test_trees_round_trip():
    tree = {"a": {"b": torch.ones(1), "c": {"d": torch.zeros(2)}}, "e": torch.ones(3)}
    torch.testing.assert_close(nested(dict(leaves(tree))), tree)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (chain, ValueError, "no levels given"),
        (lambda: chain(x=3), ValueError, r"levels\.x: 3 is not allowed; a level is written as a name"),
        (lambda: Chain({"a.b": gd()}), ValueError, "'a.b'"),
        (lambda: nest(gd(), "adm"), ValueError, "inner: 'adm' is not allowed; no level is called 'adm'"),
        (lambda: nest(gd(), gd(), transfer="inti"), ValueError, "Did you mean 'init'"),
        (lambda: nest(gd(), gd(), step_size=-1.0), ValueError, "step_size=-1.0"),
        (lambda: nest(gd(), Grows()), ValueError, "grows otherwise, and has no start"),
        (lambda: nest(gd(), chain(gd(), second_moment(of=attention(memory=Window(3))))), ValueError, "keeps its pairs"),
    ],
)
def test_mistakes_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_equal_stacks_are_equal():
    assert chain(momentum(0.9), adam()) == chain(momentum(0.9), adam())
    assert chain(momentum(0.9), adam()) != chain(momentum(0.8), adam())


def test_names_do_not_depend_on_the_order_of_siblings() -> None:
    several = [momentum(0.9), momentum(0.99), momentum(0.9, period=4), adam(), adam((0.8, 0.9))]
    one, other = parallel(*several), parallel(*reversed(several))
    assert dict(one.levels) == dict(other.levels)
    assert set(one.levels) == {
        "momentum_beta_0_9",
        "momentum_beta_0_99",
        "momentum_every_4",
        "adam_betas_0_9_0_999",
        "adam_betas_0_8_0_9",
    }


@pytest.mark.parametrize(
    "level",
    [
        chain(adam(), parallel(chain(momentum(0.9), adam()), momentum(0.5))),
        chain(adam(), second_moment(of=chain(momentum(0.9), adam()))),
        chain(adam(), chain(momentum(0.9), parallel(chain(momentum(0.5), adam()), gd())), adam()),
        chain(second_moment(), parallel(second_moment(of=momentum(0.5)), gd())),
    ],
    ids=repr,
)
def test_a_gradient_that_several_levels_see_stays_what_it_was(level):
    """In place, directions may share a place for intermediate results: not with what is still to be read."""
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros(6, dtype=torch.float64)
    state, own = (start(level, like) for _ in range(2))
    for t in range(1, 5):
        grad = torch.randn(6, generator=generator, dtype=torch.float64)
        wanted, state = advance(level, grad, state, Signal(t, like))
        torch.testing.assert_close(advance_(level, grad, own, Signal(t, like)), wanted, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(dict(leaves(own)), dict(leaves(state)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("body", "new"),
    [
        ({"entrywise": True}, "elementwise"),
        ({"follows": {}}, "depends_on"),
        ({"damping": property(lambda self: 0.5)}, "steady_gain"),
        ({"descend_": lambda self: None}, "step_"),
        ({"attend": lambda self, q, k, v, state, signal: (v, state)}, "token_step"),
        ({"attend_chunk": lambda self, *given: given}, "chunk_step"),
        ({"begin": lambda self, dim_k, dim_v, like, learned: {}}, "init_tokens"),
        ({"recall": lambda self, q, dim_v, state, signal: q}, "token_read"),
        ({"span": property(lambda self: 4)}, "chunk_size"),
        ({"fixed": ("m",)}, "constant_keys"),
        ({"keeps_pending": True}, "owns_partial_chunk"),
    ],
)
def test_an_old_name_in_a_level_is_refused_with_the_new_one(body, new):
    (old,) = body
    with pytest.raises(TypeError, match=f"Own: a level's '{old}' is called '{new}' now"):
        type("Own", (Level,), {"step": lambda self, grad, state, signal: (grad, state), **body})


def test_a_number_of_a_level_may_be_called_damping():
    class Damped(Level):
        damping: float = 0.5

        def step(self, grad, state, signal):
            return grad * self.damping, state

    assert Damped().field_names == ("period", "clock", "damping")
    assert Damped().steady_gain == 1.0
