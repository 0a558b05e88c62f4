"""The schema: defaults, limits, and one error for all that is wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from nestopt import levels as L
from nestopt.config import (
    Config,
    ConfigError,
    DataConfig,
    GroupConfig,
    ModelConfig,
    OptimizerConfig,
    RestConfig,
    TrainConfig,
    ViewConfig,
)
from nestopt.config.io import parse
from nestopt.core import chain
from nestopt.core.memories import Window
from nestopt.train.data import Dataset

SECTIONS = [Config, ModelConfig, OptimizerConfig, GroupConfig, RestConfig, ViewConfig, DataConfig, TrainConfig]


def errors_of(data: Any) -> dict[str, str]:
    """Each line of the error that `data` makes, by path."""
    with pytest.raises(ConfigError) as caught:
        Config.from_data(data)
    lines = str(caught.value).splitlines()
    assert lines == [str(error) for error in caught.value.errors]
    return {error.path: line for error, line in zip(caught.value.errors, lines, strict=True)}


# -- defaults --------------------------------------------------------------------------------------------------------


def test_the_default_run() -> None:
    config = Config()
    assert config.model.mixers == [L.window_attention(memory=Window(128))]
    learning = L.cms((32,), learn="context", teach="loss", rate=0.05, keep=0.99, through="first_order")
    assert config.model.mlps == [L.cms((1,)), learning]
    assert (config.model.dim, config.model.blocks, config.model.heads, config.model.vocab) == (160, 2, 4, 256)
    assert (config.optimizer.stack, config.optimizer.lr, config.optimizer.weight_decay) == (L.muon(), 0.02, 0.05)
    assert Config.from_data({"optimizer": {"stack": "adamw"}}).optimizer.weight_decay == 0
    assert Config.from_data({"optimizer": {"stack": "adamw", "weight_decay": 0.1}}).optimizer.weight_decay == 0.1
    assert config.optimizer.rest == RestConfig(stack=L.adamw((0.9, 0.95), weight_decay=0.0), lr=0.003)
    assert isinstance(config.data.dataset, Dataset)
    assert (config.train.steps, config.train.decay, config.train.engine) == (10_000, 0.8, "single")
    assert (config.train.seconds, config.threads, config.train.learn) == (180, 1, "mixer")
    assert Config.from_data(None) == Config.from_data({}) == Config.from_data({"model": None, "train": {}}) == config


def test_defaults_survive() -> None:
    config = Config()
    data = parse(config.to_yaml())
    assert list(data) == ["model", "optimizer", "data", "train"]
    assert Config.from_data(data) == config
    for (
        name,
        section,
    ) in Config.model_fields.items():  # every key is written, so that a run is not changed by new defaults
        assert list(data[name]) == list(section.annotation.model_fields)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_documented(section: type[BaseModel]) -> None:
    assert all(field.description for field in section.model_fields.values())


def test_defaults_are_not_shared() -> None:
    one = Config()
    one.optimizer.groups.append(GroupConfig(match="x"))
    one.optimizer.rest.lr = 7.0
    assert Config().optimizer.groups == []
    assert Config().optimizer.rest.lr == 0.003


@settings(max_examples=25)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "model": st.fixed_dictionaries(
                {"heads": st.sampled_from([1, 2, 3]), "dim": st.sampled_from([6, 12])},
                optional={"mixer": st.sampled_from(["titans", {"level": "deltanet", "lr": {"gate": 0.2}}])},
            ),
            "optimizer": st.fixed_dictionaries(
                {},
                optional={
                    "stack": st.sampled_from(
                        ["adam", ["momentum", "newton_schulz"], {"level": "momentum", "beta": 0.3}]
                    ),
                    "rest": st.sampled_from(["adam", ["adam", "gd"], {"lr": 1}, {"level": "adam", "eps": "1e-3"}]),
                    "groups": st.lists(
                        st.fixed_dictionaries(
                            {"match": st.sampled_from(["", "é", "a|b", r"^blocks\.\d+\.", "'#: "])},
                            optional={"stack": st.just("gd"), "period": st.integers(1, 2**63 - 1)},
                        )
                    ),
                    "lr": st.floats(0, 10),
                    "strict": st.booleans(),
                },
            ),
            "train": st.fixed_dictionaries(
                {},
                optional={
                    "steps": st.integers(1, 2**63 - 1),
                    "seconds": st.none() | st.floats(1, 1e9),
                    "clip": st.none() | st.floats(0.1, 9),
                    "zero_stage": st.just(0),
                    "out": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=60),
                },
            ),
        },
    )
)
def test_configurations_survive_yaml(data: dict[str, Any]) -> None:
    given_data = copy.deepcopy(data)
    config = Config.from_data(data)
    again = Config.from_data(parse(config.to_yaml()))
    assert again == config
    assert repr(again) == repr(config)
    assert data == given_data


def test_parts_may_be_given_as_objects() -> None:
    mine = L.titans(rule=L.adam())
    config = Config(model=ModelConfig(mixer=mine), optimizer={"stack": [L.momentum(0.5), "muon"]})
    assert config.model.mixer is mine
    assert config.optimizer.stack == chain(L.momentum(0.5), L.muon())


def test_rest_may_be_just_a_level() -> None:
    for spec in ("adam", {"level": "adam"}, L.adam()):
        assert OptimizerConfig(rest=spec).rest == RestConfig(stack=L.adam())
    assert OptimizerConfig(rest=["adam", "gd"]).rest == RestConfig(stack=chain(L.adam(), L.gd()))
    rest = OptimizerConfig(rest={"lr": 0.5}).rest
    assert (rest.stack, rest.lr, rest.weight_decay) == (RestConfig().stack, 0.5, None)


def test_numbers_that_yaml_takes_for_text() -> None:
    config = Config.from_data(parse("optimizer: {lr: 1e-3}\ntrain: {steps: 100.0}"))
    assert (config.optimizer.lr, config.train.steps) == (1e-3, 100)
    assert type(config.train.steps) is int


# -- errors ----------------------------------------------------------------------------------------------------------


def test_one_error_lists_all_problems() -> None:
    lines = errors_of(
        {
            "model": {"mixer": "titens", "dim": 0},
            "optimizer": {
                "stack": ["adam", {"level": "momentum", "beta": -1}],
                "lr": -0.5,
                "groups": [{"match": "ok"}, {"match": "(", "stac": "adam"}],
            },
            "train": {"stepss": 5, "clip": True, "dtype": "float8"},
            "optimiser": {},
        }
    )
    assert lines["model.mixer"].startswith("model.mixer: 'titens' is not allowed; no level is called 'titens'.")
    assert "Did you mean 'titans'?" in lines["model.mixer"]
    assert lines["model.dim"] == "model.dim: 0 is not allowed; give more than 0"
    assert lines["optimizer.stack[1].beta"].startswith(
        "optimizer.stack[1].beta: -1.0 is not allowed; give a number in [0"
    )
    assert lines["optimizer.lr"] == "optimizer.lr: -0.5 is not allowed; give 0 or more"
    assert lines["optimizer.groups[1].match"].startswith(
        "optimizer.groups[1].match: '(' is not allowed; give a regular exp"
    )
    assert "Did you mean 'stack'?" in lines["optimizer.groups[1].stac"]
    assert "train has no key 'stepss'. Did you mean 'steps'?" in lines["train.stepss"]
    assert lines["train.clip"] == "train.clip: True is not allowed; give a number"
    assert lines["train.dtype"].startswith(
        "train.dtype: 'float8' is not allowed; give 'float32', 'float64', 'bfloat16' or 'float16'."
    )
    assert "a configuration has no key 'optimiser'. Did you mean 'optimizer'?" in lines["optimiser"]
    assert len(lines) == 10


@pytest.mark.parametrize(
    ("data", "path", "hint"),
    [
        ({"modle": {}}, "modle", "'model'"),
        ({"model": {"mixr": 1}}, "model.mixr", "'mixer'"),
        ({"optimizer": {"rest": {"stak": 1}}}, "optimizer.rest.stak", "'stack'"),
        ({"optimizer": {"rest": {"level": "adamw", "betass": 1}}}, "optimizer.rest.betass", "'betas'"),
        ({"optimizer": {"groups": [{"match": "x", "lrr": 1}]}}, "optimizer.groups[0].lrr", "'lr'"),
        (
            {"model": {"mlp": {"level": "cms", "memory": {"memory": "mlp", "hiden": 1}}}},
            "model.mlp.memory.hiden",
            "'hidden'",
        ),
        ({"data": {"widnow": 1}}, "data.widnow", "'window'"),
        ({"data": {"dataset": "stdlb"}}, "data.dataset", "'stdlib'"),
    ],
)
def test_an_unknown_name_at_every_depth(data: Any, path: str, hint: str) -> None:
    lines = errors_of(data)
    assert list(lines) == [path]
    assert f"Did you mean {hint}?" in lines[path]


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("model.dim", 1.5, "give a whole number"),
        ("model.dim", True, "give a whole number"),
        ("model.dim", "wide", "give a whole number"),
        ("model.blocks", 0, "give 1 or more"),
        ("model.heads", 0, "give 1 or more"),
        ("model.conv", -1, "give 0 or more"),
        ("model.mixer", None, "{level: NAME, ...}"),
        ("optimizer.lr", float("inf"), "give a finite number"),
        ("optimizer.lr", None, "give a number"),
        ("optimizer.strict", 1, "give true or false"),
        ("optimizer.groups", "x", "give a list"),
        ("optimizer.route", "al", "Did you mean 'all'?"),
        ("data.path", 3, "give text"),
        ("train.warmup", 1.5, "give 1 or less"),
        ("train.seconds", 0, "give more than 0"),
        ("train.zero_stage", 4, "give 0, 1, 2 or 3"),
        ("train.zero_stage", True, "give 0, 1, 2 or 3"),
        ("train.engine", "deepsped", "Did you mean 'deepspeed'?"),
        ("train.threads", 0, "give 1 or more"),
    ],
)
def test_values_that_are_not_allowed(key: str, value: Any, allowed: str) -> None:
    section, name = key.split(".")
    lines = errors_of({section: {name: value}})
    assert list(lines) == [key]
    shown = "null" if value is None else repr(value)
    assert lines[key].startswith(f"{key}: {shown} is not allowed; ")
    assert allowed in lines[key]


def test_heads_must_divide_dim() -> None:
    near = {3: "2 or 4", 6: "5 or 8", 100: "80 or 160", 300: "160"}
    for heads, divisors in near.items():
        lines = errors_of({"model": {"heads": heads}})
        assert lines == {
            "model.heads": f"model.heads: {heads} is not allowed; give a divisor of dim=160, such as {divisors}"
        }


def test_warmup_and_decay_share_the_run() -> None:
    assert list(errors_of({"train": {"warmup": 0.5}})) == ["train.decay"]
    assert Config.from_data({"train": {"warmup": 0.3, "decay": 0.7}}).train.warmup == 0.3


def test_a_section_that_is_none() -> None:
    assert "give a mapping" in errors_of({"optimizer": "muon"})["optimizer"]
    assert "a regular expression" in errors_of({"optimizer": {"groups": [{"lr": 1}]}})["optimizer.groups[0].match"]
    assert "give a mapping with the sections model, optimizer, data, train" in errors_of(3)[""]
    assert "keys must be text" in errors_of({"model": {"dim": 4, True: 2}})["model.True"]


def test_the_file_is_named_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_data({"model": {"dim": 0, "conv": -1}}, "hope.yaml")
    assert str(caught.value).splitlines() == [
        "hope.yaml:",
        "  model.dim: 0 is not allowed; give more than 0",
        "  model.conv: -1 is not allowed; give 0 or more",
    ]
    with pytest.raises(ConfigError, match=r"^hope.yaml: model.dim: 0 is not allowed; give more than 0$"):
        Config.from_data({"model": {"dim": 0}}, "hope.yaml")


def test_what_is_assigned_is_checked() -> None:
    config = Config()
    config.optimizer.stack = "momentum"
    assert config.optimizer.stack == L.momentum()
    before = copy.deepcopy(config)
    with pytest.raises(ConfigError, match=r"^lr: -1 is not allowed; give 0 or more$"):
        config.optimizer.lr = -1
    with pytest.raises(ConfigError, match=r"^heads: 3 is not allowed; give a divisor of dim=160"):
        config.model.heads = 3
    with pytest.raises(ConfigError, match=r"Did you mean 'stack'\?"):
        config.optimizer.stak = "adam"
    assert config == before


def test_python_users_get_the_same_error() -> None:
    with pytest.raises(ConfigError, match=r"^dim: 0 is not allowed; give more than 0$"):
        ModelConfig(dim=0)
    with pytest.raises(ConfigError, match=r"^optimizer.stack: 'mun' is not allowed; .*Did you mean 'muon'\?"):
        Config(optimizer={"stack": "mun"})
