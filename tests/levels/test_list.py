"""`nestopt.levels.list`: names by a pattern, and nothing of Python's own hidden by it."""

from __future__ import annotations

import pytest

import nestopt
from nestopt.cli import main
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


def test_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["levels", "*momentum*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "level:"
    assert [line.split()[0] for line in lines[1:]] == nestopt.levels.list("*momentum*")
    assert main(["levels", "newton_schulz"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith(":")] == ["level:", "output:"]
    assert main(["levels", "muno"]) == 2
    assert "nothing is called 'muno'. Did you mean 'muon'" in capsys.readouterr().err
