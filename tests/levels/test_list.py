"""`nestopt.levels.list`: names by a pattern, and nothing of Python's own hidden by it."""

from __future__ import annotations

import nestopt
from nestopt.core import Level, hookimpl, registry


class Tram(Level):
    def step(self, grad, state, signal):
        return grad, state


class Plugin:
    @hookimpl
    def nestopt_register_levels(self, register):
        register("tram_momentum", Tram)


def test_all_of_them() -> None:
    names = nestopt.levels.list()
    assert names == sorted(names) == registry.names("level")
    assert {"gd", "momentum", "muon", "titans", "chain"} <= set(names)
    for name in names:
        assert issubclass(getattr(nestopt.levels, name), Level)


def test_by_a_pattern() -> None:
    assert nestopt.levels.list("*momentum*") == [name for name in registry.names("level") if "momentum" in name]
    assert nestopt.levels.list("adam?") == ["adamw"]
    assert nestopt.levels.list("muon") == ["muon"]
    assert nestopt.levels.list("MUON") == nestopt.levels.list("") == []


def test_those_of_plugins() -> None:
    plugin = Plugin()
    registry.add(plugin, "trams")
    try:
        assert nestopt.levels.list("tram*") == ["tram_momentum"]
    finally:
        registry.remove("trams")
    assert nestopt.levels.list("tram*") == []


def test_a_star_import_leaves_the_list_of_python() -> None:
    names: dict[str, object] = {}
    exec("from nestopt.levels import *", names)
    assert names["momentum"] is nestopt.levels.momentum
    assert "list" not in names
