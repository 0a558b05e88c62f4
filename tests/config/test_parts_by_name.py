"""Parts in Python by what they are in YAML: names, mappings and lists, in every field, with the same errors."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import nestopt
from nestopt import ConfigError, Gate, chain, levels, nest, parallel
from nestopt.config.spec import field_hints, kind_of
from nestopt.core.compose import Chain
from nestopt.core.memories import Mlp
from nestopt.core.part import Part
from nestopt.core.registry import KINDS
from nestopt.core.retentions import Decay
from nestopt.levels import adam, momentum, muon, titans

CLASSES = [nestopt.registry.get(kind, name) for kind in KINDS for name in nestopt.registry.names(kind)]
FIELDS = [
    (cls, key, kind)
    for cls in CLASSES
    if inspect.isclass(cls) and issubclass(cls, Part)
    for key, hint in field_hints(cls).items()
    if (kind := kind_of(hint)) is not None
]
NEEDED: dict[str, Any] = {"outer": "gd", "inner": "gd"}
"""What has no default."""


def made(cls: type[Part], key: str, value: object) -> Part:
    needed = {name: spec for name, spec in NEEDED.items() if name in field_hints(cls)}
    return cls(**{**needed, key: value})


def refused(make: Any) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        make()
    return error.value


def test_there_are_parts_of_many_kinds_within_others() -> None:
    assert {kind for _, _, kind in FIELDS} >= {"level", "memory", "objective", "retention", "features", "output"}
    assert len(FIELDS) > 40


@pytest.mark.parametrize(("cls", "key", "kind"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_a_field_takes_what_a_spec_takes(cls: type[Part], key: str, kind: str) -> None:
    name = nestopt.registry.name_of(cls)
    needed = {other: spec for other, spec in NEEDED.items() if other in field_hints(cls)}
    for wrong in (f"no such {kind}", {kind: "none at all"}, {"fields": 1}, 3.5, []):
        python = refused(lambda wrong=wrong: made(cls, key, wrong))
        spec = refused(lambda wrong=wrong: nestopt.build(cls.kind, {cls.kind: name, **needed, key: wrong}))
        assert str(python) == str(spec)
        assert python.path.partition(".")[0] == key
    default = getattr(made(cls, "period", 1) if "period" in field_hints(cls) else cls(), key)
    if default is not None:
        plain = nestopt.to_spec(default)
        assert getattr(made(cls, key, plain), key) == default
        assert made(cls, key, plain) == made(cls, key, default)


def test_names_mappings_lists_and_classes() -> None:
    by_name = titans(
        rule="adam", step_size=0.02, normalized=False, retention="decay", memory={"memory": "mlp", "depth": 3}
    )
    assert by_name == titans(rule=adam(), step_size=0.02, normalized=False, retention=Decay(), memory=Mlp(depth=3))
    assert titans(rule={"level": "momentum", "beta": {"gate": 0.8}}) == titans(rule=momentum(Gate(0.8)))
    assert levels.second_moment(of=["momentum", {"level": "muon", "period": 4}]).of == chain(momentum(), muon(period=4))
    assert levels.cautious(of=adam) == levels.cautious(of="adam") == levels.cautious(of=adam())
    assert momentum({"gate": 0.5}) == momentum(Gate(0.5))
    assert momentum({"heads": {"init": 0.9, "ratio": 0.25}}).beta == nestopt.Heads(0.9, 0.25)


def test_compositions() -> None:
    stack = chain(momentum(), adam())
    assert chain("momentum", "adam") == chain(["momentum", adam()]) == Chain(["momentum", "adam"]) == stack
    assert (
        chain(a="momentum", b={"level": "adam"})
        == Chain({"a": "momentum", "b": "adam"})
        == chain(a=momentum(), b=adam())
    )
    assert chain("gd", b=["momentum", "adam"]) == chain(levels.gd(), b=stack)
    assert parallel("momentum", {"level": "muon", "period": 16}, weights=[1, 0.5]) == parallel(
        momentum(), muon(period=16), weights=[1.0, 0.5]
    )
    assert nest({"level": "gd", "period": 4}, ["momentum", "adam"]) == nest(levels.gd(period=4), stack)
    assert list(chain("adam", {"level": "adam", "eps": 1e-6}).levels) == list(chain(adam(), adam(eps=1e-6)).levels)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: titans(rule="muno"),
            r"^rule: 'muno' is not allowed; no level is called .* Did you mean 'muon'\?",
        ),
        (lambda: titans(rule={"level": "muon", "bta": 1}), r"^rule\.bta: 1 is not allowed; muon has no key 'bta'"),
        (
            lambda: titans(rule=["adam", {"level": "muon", "beta": 2}]),
            r"^rule\[1\]\.beta: 2(\.0)? is not allowed; give a",
        ),
        (lambda: titans(rule=Decay()), r"^rule: Decay\(keep=0\.99\) is not allowed; it is a retention; give a level$"),
        (lambda: titans(rule=None), r"^rule: null is not allowed; a level is written as a name"),
        (
            lambda: titans(memory="mpl"),
            r"^memory: 'mpl' is not allowed; .* Did you mean 'mlp'",
        ),
        (lambda: momentum({"gat": 0.5}), r"^beta\.gat: 0\.5 is not allowed; .*Did you mean 'gate'"),
        (lambda: chain("momentum", 3), r"^levels\[1\]: 3 is not allowed; a level is written as a name"),
        (lambda: chain(7), r"^levels\[0\]: 7 is not allowed"),
        (lambda: parallel(fast="muno"), r"^levels\.fast: 'muno' is not allowed"),
        (lambda: nest("gd", "momentun"), r"^inner: 'momentun' is not allowed"),
        (lambda: Chain("momentum"), r"^levels: 'momentum' is not allowed; give a list or a mapping"),
    ],
)
def test_mistakes_are_those_of_specs(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
