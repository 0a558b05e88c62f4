"""Parts to plain data and back, and what users are told when a spec is wrong."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from pydantic import Field

from nestopt import levels as L
from nestopt.config import ConfigError, build, to_spec
from nestopt.config.io import dump, parse
from nestopt.core import Gate, Heads, Level, Part, chain, hookimpl, nest, parallel, registry
from nestopt.core.features import Elu, Polynomial
from nestopt.core.memories import Matrix, Memory, Mlp, Vector, Window
from nestopt.core.objectives import L2, Dot
from nestopt.core.outputs import Plain, RmsNorm, Sign
from nestopt.core.part import FieldError, FieldTypeError, is_subclass
from nestopt.core.registry import KINDS, base_of
from nestopt.core.retentions import Decay, Keep
from nestopt.levels.gradient.muon import Scale

# -- round trips -----------------------------------------------------------------------------------------------------

share = st.floats(0.0, 1.0)
gates = st.one_of(
    st.floats(0.01, 0.99).map(Gate),
    st.builds(Heads, st.floats(0.01, 0.99), ratio=st.floats(0.1, 1.0)),
    st.tuples(st.floats(-3, -1), st.floats(-0.5, 0.5), st.floats(1, 3)).map(lambda t: Gate(t[1], low=t[0], high=t[2])),
)
numbers = share | gates
periods = st.integers(1, 64)
small = st.floats(1e-12, 1e-3)

memories = st.one_of(
    st.just(Vector()),
    st.just(Matrix()),
    st.builds(Window, size=st.none() | periods),
    st.builds(
        Mlp, hidden=st.none() | periods, depth=st.integers(1, 4), activation=st.sampled_from(["silu", "gelu", "tanh"])
    ),
)
retentions = st.just(Keep()) | st.builds(Decay, keep=numbers)
features = st.sampled_from([None, Elu(), Polynomial(3)])
outputs = (
    st.just(Plain()) | st.just(Sign()) | st.builds(RmsNorm, eps=small) | st.builds(L.NewtonSchulzOutput, steps=periods)
)

simple = st.one_of(
    st.builds(L.gd, period=periods),
    st.builds(L.momentum, beta=numbers, dampening=numbers, nesterov=st.booleans(), period=periods),
    st.builds(L.delta_momentum, beta=numbers, normalize=st.sampled_from(["clip", "unit", None]), period=periods),
    st.builds(L.adam, betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)), eps=small, amsgrad=st.booleans()),
    st.builds(L.adamw, weight_decay=numbers, period=periods),
    st.builds(L.muon, scale=st.sampled_from([*get_args(Scale), None]), dtype=st.sampled_from([None, "float32"])),
)


def compose(children: st.SearchStrategy[Level]) -> st.SearchStrategy[Level]:
    """One level more around `children`, in each way that there is."""
    some = st.lists(children, min_size=1, max_size=3)
    named = st.dictionaries(st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True), children, min_size=1, max_size=3)

    @st.composite
    def weighted(draw: st.DrawFn) -> Level:
        inner = draw(some)
        return parallel(inner, weights=draw(st.none() | st.lists(share, min_size=len(inner), max_size=len(inner))))

    @st.composite
    def memory(draw: st.DrawFn) -> Level:
        store, phi = draw(memories), draw(features)
        if isinstance(store, Window):  # learns by no rule, and takes no arguments for one
            window = L.attention(memory=store, output=draw(outputs), read=draw(st.sampled_from(["after", "before"])))
            return chain(window, draw(children))
        cls = draw(st.sampled_from([L.associative_memory, L.titans, L.deltanet]))
        normalizes = isinstance(store, Matrix | Mlp)
        return cls(
            memory=store,
            objective=draw(st.sampled_from([Dot(), L2()])),
            rule=draw(children),
            retention=draw(retentions),
            output=draw(outputs),
            normalized=normalizes and draw(st.booleans()),
            bound=draw(st.sampled_from([0.5, 1.0])),
            lr=draw(numbers),
            chunk=draw(periods),
            read=draw(st.sampled_from(["after", "before", "chunk"])),
            period=draw(periods),
            **({} if phi is None else {"features": phi}),
        )

    return st.one_of(
        some.map(chain),
        named.map(lambda levels: chain(**levels)),
        weighted(),
        st.builds(nest, children, children.filter(lambda level: not keeps_pairs(level)), step_size=st.floats(0, 2)),
        st.builds(L.cms, periods=st.lists(periods, min_size=1, max_size=3).map(tuple), rule=children, memory=memories),
        memory(),
    )


def keeps_pairs(part: Part) -> bool:
    return getattr(part, "appends", False) or any(keeps_pairs(inner) for _, inner in part.parts())


def depth(part: Part) -> int:
    return 1 + max((depth(inner) for _, inner in part.parts() if isinstance(inner, Level)), default=0)


def identical(a: Any, b: Any) -> bool:
    """Equal, of one class, and (as `==` of dicts does not say) with levels in the same order."""
    return a == b and repr(a) == repr(b)


three_deep = compose(compose(simple))
deeper = compose(compose(simple | compose(simple)))


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(three_deep | deeper)
def test_random_stacks_survive_yaml(stack: Level) -> None:
    assert depth(stack) >= 3
    event(f"depth {depth(stack)}")
    text = dump(to_spec(stack))
    again = build("level", parse(text))
    assert identical(again, stack)
    assert dump(to_spec(again)) == text


NEEDS: dict[str, dict[str, Any]] = {
    "documents": {"path": "some/folder", "tokenizer": "tokenizer.json"},
    "files": {"path": "some/folder"},
    "chain": {"levels": {"a": L.momentum(), "b": L.adam()}},
    "parallel": {"levels": {"momentum": L.momentum(), "adam": L.adam()}},
    "nest": {"outer": L.momentum(period=4), "inner": L.adam()},
}


SPECS = [kind for kind in KINDS if kind != "token_form" and is_subclass(base_of(kind), Part)]  # a form is chosen


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in SPECS for name in registry.names(kind)])
def test_everything_registered_survives(kind: str, name: str) -> None:
    part = registry.get(kind, name)(**NEEDS.get(name, {}))
    spec = to_spec(part)
    assert identical(build(kind, parse(dump(spec))), part)
    if name not in NEEDS:
        assert spec == name


def test_a_spec_holds_what_differs_from_the_defaults() -> None:
    assert to_spec(L.momentum()) == "momentum"
    assert to_spec(L.momentum(0.5, period=16)) == {"level": "momentum", "period": 16, "beta": 0.5}
    assert to_spec(L.deltanet()) == "deltanet"  # its lr is a gate by default
    assert to_spec(L.deltanet(lr=1.0)) == {"level": "deltanet", "lr": 1.0}
    assert to_spec(L.adam((0.8, 0.9))) == {"level": "adam", "betas": [0.8, 0.9]}
    assert to_spec(Mlp(hidden=4)) == {"memory": "mlp", "hidden": 4}


def test_a_spec_of_gates() -> None:
    assert to_spec(L.momentum(Gate(0.9))) == {"level": "momentum", "beta": {"gate": 0.9}}
    wide = {"level": "momentum", "beta": {"gate": {"init": 0.5, "low": 0.0, "high": 2.0}}}
    assert to_spec(L.momentum(Gate(0.5, high=2))) == wide
    assert build("level", wide) == L.momentum(Gate(0.5, 0, 2))


def test_levels_of_a_composition_keep_their_names_and_order() -> None:
    assert to_spec(chain(L.momentum(), L.adam())) == {"level": "chain", "levels": ["momentum", "adam"]}
    spec = {"level": "chain", "levels": {"slow": "momentum", "fast": "adam"}}
    assert to_spec(chain(slow=L.momentum(), fast=L.adam())) == spec
    assert list(build("level", {"level": "chain", "levels": {"b": "momentum", "a": "adam"}}).levels) == ["b", "a"]
    twice = chain(L.momentum(), L.momentum(period=4), L.momentum())
    assert list(twice.levels) == ["momentum", "momentum_every_4", "momentum_2"]
    assert identical(build("level", to_spec(twice)), twice)


def test_the_ways_to_write_a_level() -> None:
    made = L.momentum(0.5)
    assert build("level", made) is made
    assert (
        build("level", "momentum")
        == build("level", L.momentum)
        == build("level", {"level": L.momentum})
        == L.momentum()
    )
    assert build("level", ["momentum", {"level": "adam"}]) == chain(L.momentum(), L.adam())
    assert build("level", {"level": "titans", "memory": "matrix", "rule": ["momentum", "adam"]}) == L.titans(
        memory=Matrix(), rule=chain(L.momentum(), L.adam())
    )


def test_values_become_what_the_fields_ask_for() -> None:
    read = parse("{level: adam, eps: 1e-3, betas: [0, 5e-1], period: 2.0}")
    assert read["eps"] == "1e-3"  # YAML takes it for text
    adam = build("level", read)
    assert adam == L.adam((0.0, 0.5), eps=1e-3, period=2)
    assert (type(adam.eps), type(adam.betas), type(adam.period)) == (float, tuple, int)
    assert type(build("level", {"level": "momentum", "beta": "1e-3"}).beta) is float


def test_numpy_numbers_are_written_as_plain_ones() -> None:
    spec = to_spec(L.momentum(np.float64(0.5), period=2))
    assert type(spec["beta"]) is float
    assert build("level", parse(dump(spec))) == L.momentum(0.5, period=2)


# -- errors ----------------------------------------------------------------------------------------------------------


def refused(spec: Any, path: str, *parts: str, kind: str = "level") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build(kind, spec, "optimizer.stack")
    error = caught.value
    assert error.path == path
    assert str(error).startswith(f"{path}: ")
    for part in parts:
        assert part in str(error)
    return error


MISSPELT = {"level": "momentum", "bta": 0.5}


def test_an_unknown_name() -> None:
    error = refused("momentun", "optimizer.stack", "'momentun' is not allowed", "Did you mean 'momentum'?")
    assert error.value == "momentun"
    refused({"level": "momentun"}, "optimizer.stack.level", "Did you mean 'momentum'?")
    refused({"level": "titans", "memory": "mpl"}, "optimizer.stack.memory", "'mpl'", "Did you mean 'mlp'?")


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        (MISSPELT, "optimizer.stack.bta"),
        (["adam", MISSPELT], "optimizer.stack[1].bta"),
        ({"level": "titans", "rule": MISSPELT}, "optimizer.stack.rule.bta"),
        (
            {"level": "chain", "levels": {"slow": ["adam", {"level": "nest", "outer": "gd", "inner": MISSPELT}]}},
            "optimizer.stack.levels.slow[1].inner.bta",
        ),
    ],
)
def test_an_unknown_key_at_any_depth(spec: Any, path: str) -> None:
    error = refused(spec, path, "0.5 is not allowed", "momentum has no key 'bta'", "Did you mean 'beta'?", "nesterov")
    assert error.value == 0.5


@pytest.mark.parametrize(
    ("field", "value", "path", "allowed"),
    [
        ("period", 1.5, "period", "give a whole number"),
        ("period", True, "period", "give a whole number"),
        ("period", "often", "period", "give a whole number"),
        ("beta", True, "beta", "give a number, or {gate: NUMBER}"),
        ("beta", "much", "beta", "give a number, or {gate: NUMBER}"),
        ("beta", None, "beta", "give a number, or {gate: NUMBER}"),
        ("beta", {}, "beta", "give a number, or {gate: NUMBER}"),
        ("beta", 1.5, "beta", "give a number in [0, 1]"),
        ("beta", {"gat": 0.5}, "beta.gat", "Did you mean 'gate'?"),
        ("beta", {"gate": "x"}, "beta.gate", "give a number"),
        ("beta", {"gate": {"init": 0.5, "hi": 2}}, "beta.hi", "Did you mean 'high'?"),
        ("beta", {"gate": {"low": 0.5}}, "beta.gate", "give init"),
        ("beta", {"gate": 1.5}, "beta.gate", "strictly between 0.0 and 1.0"),
        ("nesterov", 1, "nesterov", "give true or false"),
        ("nesterov", "true", "nesterov", "give true or false"),
        ("coefficients", [1, 2], "coefficients", "give a list of 3"),
        ("coefficients", 3, "coefficients", "give a list"),
        ("coefficients", [1, "b", 2], "coefficients", "give"),
        ("scale", "orignal", "scale", "or 'spectral_unclamped'. Did you mean 'original'?"),
        ("dtype", 32, "dtype", "give text"),
        ("dtype", "floaty", "dtype", "give one of [null, 'bfloat16', 'float32', 'float64', 'float16']"),
    ],
)
def test_a_value_that_is_not_allowed(field: str, value: Any, path: str, allowed: str) -> None:
    if path == "beta.hi":
        path = "beta.gate.hi"
    refused({"level": "muon", field: value}, f"optimizer.stack.{path}", allowed)


def test_what_a_part_checks_itself_is_told_at_its_field() -> None:
    error = refused(
        ["adam", {"level": "titans", "retention": {"retention": "decay", "keep": 2}}],
        "optimizer.stack[1].retention.keep",
        "optimizer.stack[1].retention.keep: 2.0 is not allowed; give a number in [0, 1]",
    )
    assert error.value == 2.0
    assert isinstance(error.__cause__, FieldError)


def test_bools_inside_lists_are_not_numbers() -> None:
    refused({"level": "cms", "periods": [1, True]}, "optimizer.stack.periods[1]", "True", "give a whole number")
    refused({"level": "cms", "weights": [True, 1]}, "optimizer.stack.weights[0]", "True", "give a number")


@pytest.mark.parametrize(
    ("spec", "path", "text"),
    [
        (3, "optimizer.stack", "{level: NAME, ...}"),
        (None, "optimizer.stack", "{level: NAME, ...}"),
        ([], "optimizer.stack", "give one level or more"),
        ({"name": "momentum"}, "optimizer.stack", "the key 'level' is missing"),
        ({"level": 3}, "optimizer.stack.level", "give the name of a level"),
        ({"level": "chain"}, "optimizer.stack", "chain needs 'levels'"),
        ({"level": "nest"}, "optimizer.stack", "nest needs 'outer' and 'inner'"),
        ({"level": "chain", "levels": []}, "optimizer.stack.levels", "one level or more"),
        ({"level": "chain", "levels": "adam"}, "optimizer.stack.levels", "give a list or a mapping"),
        ({"level": "chain", "levels": {1: "adam"}}, "optimizer.stack.levels", "names must be text"),
        ({"level": "chain", "levels": {"a b": "adam"}}, "optimizer.stack", "'a b' can't name a level"),
        ({"level": "titans", "rule": Matrix()}, "optimizer.stack.rule", "it is a memory; give a level"),
        ({"level": "titans", "rule": Matrix}, "optimizer.stack.rule", "give a subclass of Level"),
        (tuple[float, float], "optimizer.stack", "is not allowed; "),
        ({"level": "titans", "memory": ["mlp"]}, "optimizer.stack.memory", "{memory: NAME, ...}"),
    ],
)
def test_a_spec_that_is_no_spec(spec: Any, path: str, text: str) -> None:
    refused(spec, path, text)


def test_a_path_at_the_root() -> None:
    with pytest.raises(ConfigError) as caught:
        build("level", [{"level": "muon", "beta": 7}])
    assert caught.value.path == "[0].beta"
    with pytest.raises(ConfigError, match=r"^'nope' is not allowed; no level") as caught:
        build("level", "nope")
    assert caught.value.path == ""


def test_what_cannot_be_written() -> None:
    class Unregistered(Vector):
        pass

    with pytest.raises(
        ConfigError, match=r"^levels\[0\].memory: .*Unregistered has no name.*nestopt_register_memories"
    ):
        to_spec(chain(L.associative_memory(memory=Unregistered())))
    with pytest.raises(ConfigError, match=r"^rule.beta: tensor.* can't be written as plain data"):
        to_spec(L.titans(rule=L.momentum(torch.tensor(0.5))))


def test_errors_can_be_sent_to_another_process() -> None:
    for error in (
        FieldTypeError("momentum", "beta", "x", "is not a number"),
        ConfigError("is wrong", "a.b", 3, "f.yaml"),
        ConfigError.of([ConfigError("is wrong", "a"), ConfigError("too", "b")], "f.yaml"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))


def test_python_users_get_the_errors_they_expect() -> None:
    with pytest.raises(ValueError, match=r"^muon: beta=2 is not allowed; give a number in \[0, 1\]$") as range_error:
        L.muon(2)
    assert (range_error.value.key, range_error.value.value) == ("beta", 2)
    with pytest.raises(TypeError, match=r"^momentum: beta='x' is not a number$") as type_error:
        L.momentum("x")
    assert type_error.value.key == "beta"
    with pytest.raises(
        ValueError, match=r"^rule: 'adm' is not allowed; no level is called 'adm'\. Did you mean 'adam'"
    ):
        L.titans(rule="adm")


# -- plugins ---------------------------------------------------------------------------------------------------------


class Exotic(Level):
    """Fields of every sort, as a stranger may write them."""

    teacher: Level | None = None
    stores: tuple[Memory, ...] = ()
    named: dict[str, Memory] = dataclasses.field(default_factory=dict)
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    mode: Literal[0, 1] = 0
    size: int | Literal["all"] = "all"
    dims: list[int] = dataclasses.field(default_factory=list)
    pair: tuple[float, float] = (0.9, 0.99)
    shares: dict[str, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dims and self.size == "all":
            raise ValueError("dims are of no use here")

    def step(self, grad, state, signal):
        return grad, state


class Plugin:
    @hookimpl
    def nestopt_register_levels(self, register) -> None:
        register("exotic", Exotic)


@pytest.fixture
def plugin() -> Iterator[None]:
    registry.add(Plugin(), "test_plugin")
    yield
    registry.remove("test_plugin")


@pytest.mark.usefixtures("plugin")
def test_a_plugin_level_is_built_from_yaml() -> None:
    stack = build(
        "level",
        parse(
            """
            - {level: momentum, beta: 0.5}
            - level: exotic
              teacher: {level: exotic, teacher: adam}
              stores: [mlp, {memory: window, size: 3}]
              named: {one: matrix}
              share: 1e-1
              mode: 1
              size: 3
              dims: [1, 2]
              pair: [0.5, 1e-1]
              shares: {a: 1}
            """
        ),
    )
    exotic = Exotic(Exotic(L.adam()), (Mlp(), Window(3)), {"one": Matrix()}, 0.1, 1, 3, [1, 2], (0.5, 0.1), {"a": 1.0})
    assert stack == chain(L.momentum(0.5), exotic)
    assert identical(build("level", parse(dump(to_spec(stack)))), stack)


@pytest.mark.usefixtures("plugin")
def test_errors_in_a_plugin_level() -> None:
    refused({"level": "exotic", "techer": "adam"}, "optimizer.stack.techer", "Did you mean 'teacher'?")
    refused({"level": "exotic", "teacher": "adm"}, "optimizer.stack.teacher", "Did you mean 'adam'?")
    refused({"level": "exotic", "stores": ["mlp", "adam"]}, "optimizer.stack.stores[1]", "no memory is called 'adam'")
    refused({"level": "exotic", "named": ["mlp"]}, "optimizer.stack.named", "give a list or a mapping")
    refused({"level": "exotic", "share": 2}, "optimizer.stack.share", "2 is not allowed; give 1 or less")
    refused({"level": "exotic", "mode": True}, "optimizer.stack.mode", "True", "give one of 0, 1")
    refused({"level": "exotic", "size": "al"}, "optimizer.stack.size", "give a whole number; or give 'all'", "'all'?")
    refused({"level": "exotic", "pair": [1]}, "optimizer.stack.pair", "give a list of 2")
    refused({"level": "exotic", "shares": {"a": "b"}}, "optimizer.stack.shares.a", "give a number")
    refused({"level": "exotic", "dims": [1, 2]}, "optimizer.stack", "optimizer.stack: dims are of no use here")


def test_a_removed_plugin_is_unknown_again() -> None:
    registry.add(Plugin(), "test_plugin")
    assert build("level", "exotic") == Exotic()
    registry.remove("test_plugin")
    refused("exotic", "optimizer.stack", "no level is called 'exotic'")
    with pytest.raises(ConfigError, match="Exotic has no name"):
        to_spec(Exotic())
