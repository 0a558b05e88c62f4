"""`key=value` overrides."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestopt import levels as L
from nestopt.config import Config, ConfigError, ModelConfig, build, load
from nestopt.config.io import dump
from nestopt.config.overrides import apply
from nestopt.config.sizes import named
from nestopt.core import chain
from nestopt.models import build_model

names = st.sampled_from(["a", "b", "c", "d"])
values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text("xyz:= []#'*&é", max_size=6)
    | st.lists(st.integers())
)
trees = st.dictionaries(names, st.recursive(st.integers(), lambda t: st.dictionaries(names, t, max_size=3)), max_size=4)


def plainly(tree: dict[str, Any], keys: list[str], value: Any) -> bool:
    """The meaning of an override on a tree without parts; False where a number stands in the way."""
    for key in keys[:-1]:
        if tree.get(key) is None:  # null is as good as not there
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            return False
    tree[keys[-1]] = value
    return True


@given(trees, st.lists(st.tuples(st.lists(names, min_size=1, max_size=4), values), max_size=4))
def test_overrides_are_assignments_in_order(tree: dict[str, Any], assignments: list[tuple[list[str], Any]]) -> None:
    before, expected, texts = copy.deepcopy(tree), copy.deepcopy(tree), []
    for keys, value in assignments:
        texts.append(f"{'.'.join(keys)}={dump(value).strip()}")
        if not plainly(expected, keys, copy.deepcopy(value)):
            with pytest.raises(ConfigError, match="which has no keys"):
                apply(tree, texts)
            return
    assert apply(tree, texts) == expected
    assert tree == before


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("", None),
        ("a=b", "a=b"),
        ("[1, 16]", [1, 16]),
        ("{level: momentum, beta: 0.5}", {"level": "momentum", "beta": 0.5}),
    ],
)
def test_values_are_yaml(text: str, value: Any) -> None:
    assert apply({"model": {"x": 7}}, [f"model.x={text}"]) == {"model": {"x": value}}


@pytest.mark.parametrize(
    ("stack", "override", "expected"),
    [
        ("momentum", "beta=0.5", {"level": "momentum", "beta": 0.5}),
        ({"level": "momentum", "period": 2}, "beta=0.5", {"level": "momentum", "period": 2, "beta": 0.5}),
        (["momentum", "adam"], "[0].period=4", [{"level": "momentum", "period": 4}, "adam"]),
        (["momentum", "adam"], "[1]=muon", ["momentum", "muon"]),
        (["momentum", "adam"], "period=4", {"level": "chain", "levels": ["momentum", "adam"], "period": 4}),
        (
            {"level": "chain", "levels": ["momentum", "adam"]},
            "[0].period=4",
            {"level": "chain", "levels": [{"level": "momentum", "period": 4}, "adam"]},
        ),
        (
            {"level": "chain", "levels": ["momentum", "adam"]},
            "levels[1].eps=1",
            {"level": "chain", "levels": ["momentum", {"level": "adam", "eps": 1}]},
        ),
        (
            {"level": "chain", "levels": {"slow": "momentum", "memory": "adam"}},
            "levels.memory.eps=1",
            {"level": "chain", "levels": {"slow": "momentum", "memory": {"level": "adam", "eps": 1}}},
        ),
        (
            {"level": "titans", "memory": "mlp"},
            "memory.hidden=4",
            {"level": "titans", "memory": {"memory": "mlp", "hidden": 4}},
        ),
        ({"level": "titans", "rule": "adam"}, "rule.eps=1", {"level": "titans", "rule": {"level": "adam", "eps": 1}}),
        (
            {"level": "titans", "retention": "decay", "output": "rms_norm", "features": "polynomial"},
            "features.degree=3",
            {
                "level": "titans",
                "retention": "decay",
                "output": "rms_norm",
                "features": {"features": "polynomial", "degree": 3},
            },
        ),
        (
            {"level": "nest", "outer": "momentum", "inner": ["adam"]},
            "inner[0].eps=1",
            {"level": "nest", "outer": "momentum", "inner": [{"level": "adam", "eps": 1}]},
        ),
    ],
)
def test_short_forms_open_where_a_key_is_set(stack: Any, override: str, expected: Any) -> None:
    assert apply(stack, [override]) == expected
    assert apply(
        {"optimizer": {"stack": stack}}, [f"optimizer.stack{'' if override[0] == '[' else '.'}{override}"]
    ) == {"optimizer": {"stack": expected}}
    build("level", expected)


def test_what_is_not_written_starts_from_its_default() -> None:
    titans = load({"level": "titans"}, ["memory.hidden=7", "rule.beta=0.1", "retention.keep=0.5"])
    assert titans.memory == build("memory", {"memory": "mlp", "residual": False, "hidden": 7})
    assert (titans.rule, titans.retention.keep) == (L.momentum(0.1), 0.5)

    config = load(
        {}, ["optimizer.stack.beta=0.5", "optimizer.rest.lr=0.1", "model.mlp.memory.hidden=3", "train.steps=7"]
    )
    expected = Config()
    expected.optimizer.stack = L.muon(0.5)
    expected.optimizer.rest.lr = 0.1  # and its betas stay those of the default
    expected.model.mlp = dataclasses.replace(
        expected.model.mlp, memory=build("memory", {"memory": "mlp", "residual": False, "hidden": 3})
    )
    expected.train.steps = 7
    assert config == expected


def test_later_overrides_see_earlier_ones() -> None:
    overrides = ["optimizer.stack=[momentum, muon]", "optimizer.stack[0].beta=0.5", "optimizer.groups=[{match: a}]"]
    config = load({}, [*overrides, "optimizer.groups[0].stack=adam", "optimizer.groups[0].stack.eps=1e-3"])
    assert config.optimizer.stack == chain(L.momentum(0.5), L.muon())
    assert config.optimizer.groups[0].stack == L.adam(eps=1e-3)


def test_rest_is_a_section_or_a_level() -> None:
    bare = {"optimizer": {"rest": "adamw"}}
    assert apply(bare, ["optimizer.rest.lr=1"]) == {"optimizer": {"rest": {"stack": "adamw", "lr": 1}}}
    assert apply(bare, ["optimizer.rest.eps=1"]) == {"optimizer": {"rest": {"level": "adamw", "eps": 1}}}
    assert apply(bare, ["optimizer.rest.stack.eps=1"]) == {
        "optimizer": {"rest": {"stack": {"level": "adamw", "eps": 1}}}
    }
    section = {"optimizer": {"rest": {"stack": "adamw"}}}
    assert apply(section, ["optimizer.rest.stack.eps=1", "optimizer.rest.lr=2"]) == {
        "optimizer": {"rest": {"stack": {"level": "adamw", "eps": 1}, "lr": 2}}
    }


ATTENTION = {"level": "window_attention", "memory": {"memory": "window", "size": 9}}


@pytest.mark.parametrize("written", [{}, {"model": {"mixers": ["deltanet"]}}, {"model": {"mixer": "titans"}}])
def test_an_override_of_what_another_key_stands_for_acts(written: Any) -> None:
    one = load(written, ["model.mixer=linear_attention"]).model
    assert (one.mixer, one.mixers) == (L.linear_attention(), [])
    each = load(written, ["model.mixers=[titans, deltanet]"]).model
    assert (each.mixer, each.mixers) == (L.attention(), [L.titans(), L.deltanet()])
    whole = Config.from_data(written).to_data()  # as a run is saved
    assert load(whole, ["model.mixer=linear_attention"]).model.mixers == []
    assert load(whole, ["model=hope-340m", "model.mixers=[gd]"]).model.mixers == [L.gd()]
    one.mixers = [L.gd()]
    assert (one.mixer, one.mixers) == (L.attention(), [L.gd()])
    one.mixer = L.titans()
    assert (one.mixer, one.mixers) == (L.titans(), [])


def test_an_mlp_for_each_block_takes_the_place_of_one_for_all() -> None:
    each = load({}, ["model.mlps=[cms, {level: cms, periods: [4]}]"]).model
    assert (each.mlp, each.mlps) == (ModelConfig().mlp, [L.cms(), L.cms(periods=(4,))])
    assert load({"model": {"mlps": ["cms"]}}, ["model.mlps[0].periods=[3]"]).model.mlps == [L.cms(periods=(3,))]
    with pytest.raises(ConfigError, match=r"model.mlps\[1\]: .*give a cms"):
        build_model(load({}, ["model.mlps=[cms, gd]"]).model)


def test_an_override_reaches_into_a_list_of_mixers() -> None:
    assert load({}, ["model.mixers[0].memory.size=9"]).model.mixers[0] == build("level", ATTENTION)
    assert load({"model": {"mixers": ["titans"]}}, ["model.mixers[0].period=3"]).model.mixers == [L.titans(period=3)]


def test_a_dataset_and_a_path_of_which_one_is_overridden() -> None:
    other = {"dataset": "fineweb_edu", "path": "y"}
    assert load({"data": {"path": "x"}}, ["data.dataset=stdlib"]).data.path is None
    found = load({"data": {"dataset": other}}, ["data.path=x"]).data
    assert (found.dataset, found.path) == (Config().data.dataset, "x")
    assert load({"data": {"dataset": other}}, ["data.path=null"]).data.dataset == build("dataset", other)


@pytest.mark.parametrize(
    ("data", "overrides", "key"),
    [
        ({"model": {"mixer": "titans", "mixers": ["gd"]}}, [], "model.mixer"),
        ({}, ["model.mixer=titans", "model.mixers=[gd]"], "model.mixer"),
        ({}, ["model.mixers=[gd]", "model.mixer=titans"], "model.mixer"),
        ({}, ["data.path=x", "data.dataset=fineweb_edu"], "data.dataset"),
    ],
)
def test_two_keys_of_which_one_would_do_nothing(data: Any, overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match="does nothing beside") as caught:
        load(data, overrides)
    assert caught.value.path == key


def test_steps_alone_have_no_limit_in_time() -> None:
    assert load({}, ["train.seed=1"]).train.seconds == 180
    assert load({}, ["train.steps=7"]).train.seconds is None
    assert load({}, ["train.steps=7", "train.seconds=9"]).train.seconds == 9
    assert load({"train": {"seconds": 9}}, ["train.steps=7"]).train.seconds == 9


def test_a_dataset_by_name_and_its_fields() -> None:
    assert apply({}, ["data.dataset=stdlib"]) == {"data": {"dataset": "stdlib"}}
    assert apply({"data": {"dataset": "stdlib"}}, ["data.dataset.share=1"]) == {
        "data": {"dataset": {"dataset": "stdlib", "share": 1}}
    }


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", " =3", "lr", ""])
def test_an_override_without_key_or_value(override: str) -> None:
    with pytest.raises(ConfigError, match=r"an override is KEY=VALUE, such as optimizer\.lr=0\.01") as caught:
        apply({}, [override])
    assert caught.value.value == override


@pytest.mark.parametrize("key", ["a..b", ".a", "a.", "a[x]", "a[", "a[-1]", "a b", "a[0]b", "a]"])
def test_a_key_that_is_no_key(key: str) -> None:
    with pytest.raises(ConfigError, match="is not a key; write it like") as caught:
        apply({}, [f"{key}=3"])
    assert repr(key) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "path", "text"),
    [
        ("optimizer.stack[2].period=4", "optimizer.stack[2]", "optimizer.stack has no such item; there are 2"),
        ("optimizer.groups[0].lr=4", "optimizer.groups[0]", "optimizer.groups is {}, not a list"),
        ("optimizer.lr.x=4", "optimizer.lr.x", "optimizer.lr is 0.1, which has no keys"),
        ("optimizer.lr[0]=4", "optimizer.lr[0]", "optimizer.lr is 0.1, not a list"),
        ("optimizer.stack[0][1].lr=4", "optimizer.stack[0][1]", "'momentum', not a list"),
    ],
)
def test_a_place_that_is_not_there(override: str, path: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply({"optimizer": {"lr": 0.1, "stack": ["momentum", "adam"]}}, [override])
    assert caught.value.path == path
    assert text in str(caught.value)


def test_a_value_that_is_not_yaml() -> None:
    with pytest.raises(ConfigError, match=r"'optimizer.lr=\[1' is not allowed; '\[1' is not YAML"):
        apply({}, ["optimizer.lr=[1"])


def test_a_new_key_is_left_to_the_schema() -> None:
    assert apply({}, ["optimizer.lrr=1"]) == {"optimizer": {"lrr": 1}}
    with pytest.raises(ConfigError, match=r"^optimizer.lrr: 1 is not allowed; .*Did you mean 'lr'\?"):
        load({}, ["optimizer.lrr=1"])
    with pytest.raises(ConfigError, match=r"^optimizer.stack.bta: 1 is not allowed; .*Did you mean 'beta'\?"):
        load({}, ["optimizer.stack.bta=1"])


def test_a_model_that_is_named_opens_into_its_keys() -> None:
    found = apply({"model": "hope-1.3b"}, ["model.segment=256"])["model"]
    assert found == {**named("hope-1.3b"), "segment": 256}
    assert Config.from_data({"model": found}).model.segment == 256
