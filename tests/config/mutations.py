"""Configurations as people and accidents write them: seeded mutations of good ones, as YAML text."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

from nestopt.config.io import dump

SMALL = {"dim": 16, "heads": 2, "blocks": 2}
GOOD: list[Any] = [
    {"model": SMALL},
    {"model": {**SMALL, "mixer": {"level": "titans", "rule": [{"level": "momentum", "beta": {"gate": 0.5}}, "adam"]}}},
    {
        "model": {
            **SMALL,
            "mixers": ["deltanet", {"level": "window_attention", "memory": {"memory": "window", "size": 8}}],
        }
    },
    {"model": {**SMALL, "mlp": {"level": "cms", "periods": [4, 8], "learn": "context"}}, "train": {"learn": "all"}},
    {"model": SMALL, "optimizer": {"stack": [{"level": "momentum", "period": 4}, "newton_schulz"], "lr": 0.1}},
    {"model": SMALL, "optimizer": {"stack": "m3", "rest": {"stack": "adamw", "lr": 0.01}, "layer_decay": 0.9}},
    {"model": SMALL, "optimizer": {"groups": [{"match": r"blocks\.\d+\.mixer", "lr": 0.1, "stack": "adam"}]}},
    {"model": SMALL, "optimizer": {"stack": {"level": "nest", "outer": "momentum", "inner": ["adam", "gd"]}}},
    {"model": SMALL, "data": {"window": 8, "batch": 2, "path": "a/b.txt"}, "train": {"steps": 3, "seconds": None}},
    {"level": "parallel", "levels": ["muon", {"level": "muon", "period": 16}]},
    [{"level": "chain", "levels": {"slow": "momentum", "fast": "adam"}}, "newton_schulz"],
]
NAMES = "cms dgd adam adamw muon shampoo m3 titans ttt dla oja omega self_modifying deltanet retnet chain nest parallel"
NAMES += " window mlp matrix stdlib documents attention hope-340m linear_attention regression_optimum AdamW none null"
NUMBERS = [0, -1, 1, 2, 3, 0.5, 1e-9, 1e9, 1e300, -1e300, float("inf"), float("nan"), 2**31, 2**63, 10**30, 1000000007]
ODD: list[Any] = [None, True, False, "", " ", "é\u2028", "a\0b", "x" * 5000, [], {}, [[]], {"": ""}, [None], "1e-3"]
ODD += ["(a+)+$", "(", "a" * 300 + "/b", "../" * 2000, {"level": "momentum"}, {"gate": 2}, {"heads": 0.5}, "2020-02-30"]
LINES = [
    "? [a]\n: b\n",
    "<<: {a: 1}\n",
    "!!timestamp x",
    "!!float ''",
    "!!int ''",
    "!!bool x",
    "!!binary 'é'",
    "!!python/object:os.system x",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "&a [*a, *a]",
    "&a {x: *a}",
    "*missing",
    "\t- x",
    "'unclosed",
    "{a: 1",
    "@x",
    "%YAML 3.0",
    "--- a\n--- b",
    "1:2:3",
    "0x" + "f" * 5000,
    "9" * 5000,
    "0o8",
    ".inf",
    "~",
]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(value, key), *_places(item)]]


def _any(draw: random.Random) -> Any:
    return draw.choice([draw.choice(NAMES.split()), draw.choice(NUMBERS), copy.deepcopy(draw.choice(ODD))])


def _nested(value: Any, depth: int, wrap: Callable[[Any], Any]) -> Any:
    for _ in range(depth):
        value = wrap(value)
    return value


def _change(data: Any, draw: random.Random) -> Any:
    """Change one thing of the data."""
    places = _places(data)
    if not places:
        return _any(draw)
    container, key = draw.choice(places)
    how = draw.randrange(8)
    if how == 7 and isinstance(container[key], int | float):
        container[key] = draw.choice([container[key] * 2, container[key] / 2, draw.choice(NUMBERS)])
    elif how <= 2:
        container[key] = _any(draw)
    elif how == 3:
        del container[key]
    elif how == 4 and isinstance(container, dict):
        container[draw.choice([str(key)[:-1], f"{key}s", str(key).upper(), "level", "period", 7])] = container.pop(key)
    elif how == 5:
        other, at = draw.choice(places)
        container[key] = copy.deepcopy(other.get(at) if isinstance(other, dict) else None)
    else:
        wraps: list[Callable[[Any], Any]] = [lambda x: [x], lambda x: {"level": x}, lambda x: [x, x]]
        container[key] = _nested(container[key], draw.choice([1, 3, 12]), draw.choice(wraps[:2] if how else wraps))
    return data


def _spoil(text: str, draw: random.Random) -> str:
    """Change the text, in a way that YAML may or may not take."""
    lines, at = text.split("\n"), draw.randrange(len(text) + 1)
    how = draw.randrange(7)
    if how == 0:
        return text[:at] + draw.choice("{}[]:,&*!|>'\"%@`#\n\t \0é-") + text[at:]
    if how == 1:
        return text[:at] + text[at + draw.randrange(1, 9) :]
    if how == 2:
        return f"{text}\nx: {draw.choice(LINES)}\n"
    if how == 3:
        i = draw.randrange(len(lines))
        head, colon, _ = lines[i].partition(":")
        return "\n".join([*lines[:i], f"{head}{colon} {draw.choice(LINES)}", *lines[i + 1 :]])
    if how == 4:
        laughs = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, draw.choice([4, 30])))
        return f"l0: &l0 [lol]\n{laughs}{text}"
    if how == 5:
        depth, (begin, end) = draw.choice([30, 200, 3000]), draw.choice(["[]", ("{a: ", "}")])
        return f"{text}\nx: {begin * depth}{end * depth}\n"
    return "\n".join(draw.sample(lines, len(lines)))


def mutated(seed: int) -> str:
    """One to four changes of a good configuration."""
    draw = random.Random(seed)
    data = copy.deepcopy(draw.choice(GOOD))
    for _ in range(draw.choice([0, 1, 1, 2, 4])):
        data = _change(data, draw)
    text = dump(data)
    return text if draw.random() < 0.6 else _spoil(text, draw)
