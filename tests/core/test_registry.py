"""The registry: one road for built-ins and plugins, and what happens when a plugin is broken."""

import importlib.metadata
import subprocess
import sys
import types

import pytest
import torch

import nestopt
from nestopt.core import Level, PluginWarning, Registry, UnknownName, hookimpl
from nestopt.core.objectives import Objective


class Lion(Level):
    beta: float = 0.9

    def init(self, param):
        return {"m": torch.zeros_like(param)}

    def step(self, grad, state, signal):
        m = self.beta * state["m"] + (1 - self.beta) * grad
        return m.sign(), {"m": m}


class Cosine(Objective):
    def __call__(self, y, v):
        return -torch.nn.functional.cosine_similarity(y, v, dim=-1).sum()


def plugin(name="lion", cls=Lion, hook="nestopt_register_levels"):
    module = types.ModuleType(f"nestopt_{name}")

    @hookimpl(specname=hook)
    def register_it(register):
        register(name, cls)

    module.register_it = register_it
    return module


@pytest.fixture
def points(monkeypatch):
    """Entry points of made-up distributions: {name: what loading it gives (or raises)}."""
    found = {}

    class Point:
        dist = None

        def __init__(self, name, thing):
            self.name, self.value, self.thing = name, f"module_of_{name}", thing

        def load(self):
            if isinstance(self.thing, BaseException):
                raise self.thing
            return self.thing

    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: [Point(*item) for item in found.items()] if group == "nestopt" else [],
    )
    return found


@pytest.fixture
def registry():
    new = Registry()
    new.add_builtin(nestopt.levels)
    return new


def test_builtins_come_by_the_hooks(registry):
    assert {"momentum", "adam", "titans", "chain"} <= set(registry.names("level"))
    assert registry.get("level", "momentum") is nestopt.levels.momentum
    assert registry.name_of(nestopt.levels.momentum) == "momentum"
    assert registry.owner("level", "momentum") == "nestopt"


def test_a_plugin_is_found_by_its_entry_point(registry, points):
    points["lion"] = plugin()
    points["cosine"] = plugin("cosine", Cosine, "nestopt_register_objectives")
    assert registry.get("level", "lion") is Lion
    assert registry.get("objective", "cosine") is Cosine
    assert ("level", "lion") in next(p for p in registry.plugins() if p.name == "lion").provides


def test_a_plugin_that_does_not_import_is_skipped_by_name(registry, points):
    points["broken"] = ImportError("no module named 'gone'")
    points["lion"] = plugin()
    with pytest.warns(PluginWarning, match=r"'broken'.*no module named 'gone'"):
        assert registry.get("level", "lion") is Lion
    broken = next(p for p in registry.plugins() if p.name == "broken")
    assert "no module named 'gone'" in broken.error


@pytest.mark.parametrize(
    ("name", "cls", "words"),
    [
        ("momentum", Lion, "'momentum' is taken by plugin 'nestopt'"),
        ("cosine", Cosine, "not a subclass"),
        ("pair", tuple[float, float], "not a subclass"),
        ("a-b", Lion, "not a name"),
        ("abstract", type("Abstract", (Level,), {}), "lacks step"),
    ],
)
def test_a_plugin_that_does_not_register_is_skipped_whole(registry, points, name, cls, words):
    module = plugin(name, cls)

    @hookimpl
    def nestopt_register_objectives(register):
        register("leftover", Cosine)

    module.nestopt_register_objectives = nestopt_register_objectives
    points["bad"] = module
    with pytest.warns(PluginWarning, match="'bad'"):
        names = registry.names("objective")
    assert "leftover" not in names  # all or nothing
    assert registry.get("level", "momentum") is nestopt.levels.momentum
    assert words in next(p for p in registry.plugins() if p.name == "bad").error


@pytest.mark.parametrize("thing", [SystemExit(3), GeneratorExit("of pytest, perhaps"), ImportError("gone")])
def test_a_plugin_whose_import_ends_the_program_is_skipped(registry, points, thing):
    points["bad"], points["lion"] = thing, plugin()
    with pytest.warns(PluginWarning, match=f"'bad'.*{type(thing).__name__}"):
        assert registry.get("level", "lion") is Lion
    points.clear()
    points["bad"] = module = types.ModuleType("ends_in_its_hook")

    @hookimpl
    def nestopt_register_levels(register):
        raise thing

    module.nestopt_register_levels = nestopt_register_levels
    registry.block("nothing")
    with pytest.warns(PluginWarning, match=f"'bad'.*{type(thing).__name__}"):
        assert registry.get("level", "momentum") is nestopt.levels.momentum


def test_ctrl_c_is_no_fault_of_a_plugin(registry, points):
    points["slow"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        registry.names("level")


@pytest.mark.parametrize("name", ["nestopt_register_levels", "nestopt_register_level", "nestopt_register_forms"])
def test_a_hook_that_is_not_marked_is_an_error(registry, points, name):
    points["bad"] = module = types.ModuleType("forgetful")
    setattr(module, name, lambda register: register("lion", Lion))
    with pytest.warns(PluginWarning, match=f"{name} is not marked as a hook; write @nestopt.hookimpl"):
        assert "lion" not in registry.names("level")


def test_a_misspelt_hook_is_an_error(registry, points):
    points["bad"] = plugin(hook="nestopt_register_level")
    with pytest.warns(PluginWarning, match="nestopt_register_level"):
        registry.names("level")


@pytest.mark.parametrize("value", ["1", "all", "other,lion"])
def test_plugins_are_switched_off_by_the_environment(registry, points, monkeypatch, value):
    points["lion"] = plugin()
    monkeypatch.setenv("NESTOPT_DISABLE_PLUGINS", value)
    assert "lion" not in registry.names("level")
    assert next(p for p in registry.plugins() if p.name == "lion").blocked
    assert "momentum" in registry.names("level")


def test_a_plugin_is_blocked_by_name(registry, points):
    points["lion"] = plugin()
    assert "lion" in registry.names("level")
    registry.block("lion")
    assert "lion" not in registry.names("level")


def test_a_plugin_taken_by_hand_stays_when_another_is_blocked(registry, points):
    points["other"] = plugin("other")
    registry.add(plugin("mine"), "mine")
    registry.block("other")
    assert registry.get("level", "mine") is Lion
    assert "other" not in registry.names("level")
    registry.remove("mine")
    registry.block("nothing")
    assert "mine" not in registry.names("level")


def test_two_plugins_of_one_name_are_both_listed(registry, points):
    points["nestopt"] = plugin("impostor")
    with pytest.warns(PluginWarning, match="another plugin is called 'nestopt'"):
        assert "impostor" not in registry.names("level")
    assert len([p for p in registry.plugins() if p.name == "nestopt"]) == 2


def test_unknown_names_suggest_the_nearest_and_tell_of_skipped_plugins(registry, points):
    points["broken"] = ImportError("gone")
    with pytest.warns(PluginWarning), pytest.raises(UnknownName) as error:
        registry.get("level", "momentun")
    assert "Did you mean 'momentum'?" in str(error.value)
    assert "broken" in str(error.value)


def test_plugins_without_an_entry_point():
    nestopt.registry.add(plugin("lion_of_a_notebook"), "notebook")
    try:
        assert nestopt.levels.lion_of_a_notebook is Lion
        with pytest.raises(ValueError, match="another plugin is called 'notebook'"):
            nestopt.registry.add(plugin("another"), "notebook")
    finally:
        nestopt.registry.remove("notebook")
    with pytest.raises(AttributeError, match="lion_of_a_notebook"):
        _ = nestopt.levels.lion_of_a_notebook


class Lejon(Lion):
    """Known by another name than its class's."""


def test_state_keys_and_descriptions_say_the_registered_name():
    levels = nestopt.levels
    assert levels.oja().label == "oja"
    assert list(nestopt.chain([levels.oja(), levels.momentum()]).levels) == ["oja", "momentum"]
    assert list(nestopt.chain([Lejon(), levels.momentum()]).levels) == ["lejon", "momentum"]
    nestopt.registry.add(plugin("swedish_lion", Lejon), "swedish")
    try:
        stack = nestopt.chain([Lejon(), levels.momentum()])
        assert Lejon().label == "swedish_lion"
        assert list(stack.init(torch.zeros(2))) == ["swedish_lion", "momentum"]
        assert [memory.rule for memory in nestopt.describe(stack).memories] == ["momentum", "swedish_lion"]
        assert nestopt.describe(stack).title == "swedish_lion → momentum"
        assert nestopt.to_spec(stack) == {"level": "chain", "levels": ["swedish_lion", "momentum"]}
    finally:
        nestopt.registry.remove("swedish")
    assert Lejon().label == "lejon"


def test_a_checkpoint_from_before_the_registered_name_is_refused_in_words():
    param = torch.nn.Parameter(torch.zeros(2))
    before = nestopt.optim.Nested([param], nestopt.chain(lejon=Lejon(), momentum=nestopt.levels.momentum()))
    param.grad = torch.ones(2)
    before.step()
    nestopt.registry.add(plugin("swedish_lion", Lejon), "swedish")
    try:
        now = nestopt.optim.Nested([param], nestopt.chain([Lejon(), nestopt.levels.momentum()]))
        with pytest.raises(ValueError, match="another stack"):
            now.load_state_dict(before.state_dict())
        state = now.state_dict()["param_groups"]
        with pytest.raises(ValueError, match="before a level in it had its present name"):
            now.load_state_dict({**before.state_dict(), "param_groups": state})
    finally:
        nestopt.registry.remove("swedish")


def test_importing_nestopt_looks_for_no_plugins():
    ask = "import nestopt; print(nestopt.registry._loaded)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
