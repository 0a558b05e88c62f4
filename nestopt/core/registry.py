"""What is known by name: levels and parts, from nestopt itself and from installed plugins."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import warnings
from typing import Any

import pluggy

from nestopt.core import hookspecs
from nestopt.core.features import Features
from nestopt.core.level import Level
from nestopt.core.memories import Memory
from nestopt.core.objectives import Objective
from nestopt.core.outputs import Output
from nestopt.core.part import Part, is_subclass, label_by, nearest
from nestopt.core.retentions import Retention
from nestopt.core.token_form import TokenForm

KINDS: dict[str, tuple[type | str, str]] = {
    "level": (Level, "nestopt_register_levels"),
    "memory": (Memory, "nestopt_register_memories"),
    "objective": (Objective, "nestopt_register_objectives"),
    "retention": (Retention, "nestopt_register_retentions"),
    "features": (Features, "nestopt_register_features"),
    "output": (Output, "nestopt_register_outputs"),
    "dataset": ("nestopt.train.data:Dataset", "nestopt_register_datasets"),
    "task": ("nestopt.train.data:Task", "nestopt_register_tasks"),
    "token_form": (TokenForm, "nestopt_register_token_forms"),
}
"""Each kind of part: its base class (or where that is, if it loads when it is used), and the hook that registers it."""


def base_of(kind: str) -> type[Part]:
    """Return the class that all parts of a kind derive from."""
    base, _ = KINDS[kind]
    return pkgutil.resolve_name(base) if isinstance(base, str) else base


BUILTIN = "nestopt"
DISABLE = "NESTOPT_DISABLE_PLUGINS"


class UnknownName(KeyError):
    """No part of that kind is registered under that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class PluginWarning(UserWarning):
    """A plugin was skipped."""


@dataclasses.dataclass(frozen=True)
class Plugin:
    """One plugin, as `nestopt plugins` lists it.

    Attributes:
        name: of its entry point.
        source: the distribution and version, or the module.
        provides: what it registered, as (kind, name).
        error: why it was skipped, or None.
        blocked: whether it was switched off.
    """

    name: str
    source: str
    provides: tuple[tuple[str, str], ...] = ()
    error: str | None = None
    blocked: bool = False


class Registry:
    """Names to classes. Plugins are looked for at the first look-up, not at import.

    The environment variable `NESTOPT_DISABLE_PLUGINS` switches off installed plugins: `1` (or `all`) every one, else
    the named ones, separated by commas. nestopt's own levels can't be switched off.
    """

    def __init__(self, group: str = hookspecs.PROJECT) -> None:
        self.group = group
        self._builtin: list[tuple[object, str]] = []
        self._added: dict[str, object] = {}
        self._blocked: set[str] = set()
        self._reset()

    def _reset(self) -> None:
        self._classes: dict[str, dict[str, tuple[type, str]]] = {kind: {} for kind in KINDS}
        self._names: dict[type, str] = {}
        self._plugins: dict[str, Plugin] = {}
        self._loaded = False
        self._waiting: set[str] = set()

    # -- filling it ------------------------------------------------------------------------------------------------

    def add_builtin(self, plugin: object, kind: str = "") -> None:
        """Take a module of nestopt's own, or its name, by the hooks that any plugin uses.

        One with a `kind` has parts of that kind only, and is imported when the first of them is asked for.
        """
        self._builtin.append((plugin, kind))
        self._reset()

    def block(self, name: str) -> None:
        """Switch the plugin `name` off (`-p no:NAME`). Takes effect at once."""
        self._blocked.add(name)
        self._reset()

    def add(self, plugin: object, name: str | None = None) -> None:
        """Take a plugin object now, without an entry point (in a notebook, or a test). Errors are raised."""
        self._load()
        name = name or str(getattr(plugin, "__name__", type(plugin).__name__))
        if name in self._plugins:
            raise ValueError(f"another plugin is called {name!r} ({self._plugins[name].source})")
        entry = self._take(plugin, name, source=_module_of(plugin))
        if entry.error:
            del self._plugins[name]
            raise ValueError(f"plugin {name!r}: {entry.error}")
        self._added[name] = plugin

    def remove(self, name: str) -> None:
        """Forget a plugin taken by `add`, and all that it registered."""
        if self._added.pop(name, None) is not None:
            self._forget(name)
            del self._plugins[name]

    def _load(self, kind: str = "") -> None:
        """Take what there is, but for what waits until another kind is asked for; `"all"` takes that, too."""
        if not self._loaded:
            self._loaded = True
            self._waiting = {of for _, of in self._builtin if of}
            self._take_builtin("")
            self._take_plugins()
        for waiting in sorted(self._waiting if kind == "all" else self._waiting & {kind}):
            self._take_builtin(waiting)

    def _take_builtin(self, kind: str) -> None:
        self._waiting.discard(kind)
        for given, of in self._builtin:
            if of != kind:
                continue
            module = importlib.import_module(given) if isinstance(given, str) else given
            name = BUILTIN if given is self._builtin[0][0] else _module_of(module)
            entry = self._take(module, name, source=_module_of(module))
            if entry.error:
                raise RuntimeError(f"nestopt's own {entry.source}: {entry.error}")

    def _take_plugins(self) -> None:
        switch = os.environ.get(DISABLE, "").strip()
        names = {name.strip() for name in switch.split(",")}
        every = switch.lower() in ("1", "true", "all", "yes")
        for point in sorted(importlib.metadata.entry_points(group=self.group), key=lambda p: p.name):
            source = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
            if every or point.name in names or point.name in self._blocked:
                self._plugins[point.name] = Plugin(point.name, source, blocked=True)
                continue
            try:
                plugin = point.load()
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a SystemExit, too: one broken plugin ends no program
                entry = Plugin(point.name, source, error=f"import failed: {_say(error)}")
                self._plugins.setdefault(point.name, entry)
            else:
                entry = self._take(plugin, point.name, source)
            if entry.error:
                text = f"plugin {point.name!r} ({source}) is skipped: {entry.error}"
                warnings.warn(text, PluginWarning, stacklevel=2)
        for name, plugin in self._added.items():
            self._take(plugin, name, source=_module_of(plugin))

    def _take(self, plugin: object, name: str, source: str) -> Plugin:
        """Register `plugin` and run its hooks. All or nothing: an error leaves none of its names behind."""
        if name in self._plugins:
            entry = Plugin(name, source, error=f"another plugin is called {name!r} ({self._plugins[name].source})")
            # under a key of its own, so that both are listed
            self._plugins[f"{name} ({source})"] = entry
            return entry
        try:
            manager = pluggy.PluginManager(hookspecs.PROJECT)  # of its own: only this plugin's hooks are to run
            manager.add_hookspecs(hookspecs)
            manager.register(plugin, name=name)
            manager.check_pending()
            _check_marked(plugin)
            for kind, (_, hook) in KINDS.items():
                getattr(manager.hook, hook)(register=self._registrar(kind, name))
            provides = tuple(
                (kind, known) for kind in KINDS for known, (_, owner) in self._classes[kind].items() if owner == name
            )
            entry = Plugin(name, source, provides)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._forget(name)
            entry = Plugin(name, source, error=_say(error))
        self._plugins[name] = entry
        return entry

    def _registrar(self, kind: str, owner: str) -> hookspecs.Register:
        hook = KINDS[kind][1]

        def register(name: str, cls: Any) -> None:
            if kind in self._waiting:
                self._take_builtin(kind)  # whose names come first
            base = base_of(kind)
            if not is_subclass(cls, base):
                raise TypeError(f"{hook}: {name!r} is {cls!r}, not a subclass of {base.__module__}.{base.__qualname__}")
            if inspect.isabstract(cls):
                raise TypeError(f"{hook}: {name!r} lacks {', '.join(sorted(getattr(cls, '__abstractmethods__', ())))}")
            if not name.isidentifier():
                raise ValueError(f"{hook}: {name!r} is not a name; use letters, digits and '_'")
            if name in self._classes[kind]:
                raise ValueError(f"the {kind} name {name!r} is taken by plugin {self._classes[kind][name][1]!r}")
            self._classes[kind][name] = (cls, owner)
            self._names.setdefault(cls, name)

        return register

    def _forget(self, owner: str) -> None:
        for known in self._classes.values():
            for name in [name for name, (_, by) in known.items() if by == owner]:
                self._names.pop(known.pop(name)[0], None)

    # -- looking up ------------------------------------------------------------------------------------------------

    def get(self, kind: str, name: str) -> Any:
        """Return the class registered as `name`. Raises UnknownName, with the nearest name there is."""
        self._load(kind)
        known = self._classes[kind]
        if name not in known:
            failed = [f"{p.name}: {p.error}" for p in self._plugins.values() if p.error]
            skipped = f" Skipped plugins: {'; '.join(failed)}." if failed else ""
            raise UnknownName(
                f"no {kind} is called {name!r}.{nearest(name, known)} Known: {', '.join(sorted(known))}.{skipped}"
            )
        return known[name][0]

    def names(self, kind: str) -> list[str]:
        """Return all names of a kind, sorted."""
        self._load(kind)
        return sorted(self._classes[kind])

    def name_of(self, cls: type) -> str | None:
        """Return the name that `cls` is registered under, or None."""
        self._load(getattr(cls, "kind", ""))
        return self._names.get(cls)

    def owner(self, kind: str, name: str) -> str:
        """Return which plugin registered `name`."""
        self.get(kind, name)
        return self._classes[kind][name][1]

    def plugins(self) -> list[Plugin]:
        """Return every plugin found, nestopt's own first; those that were skipped or switched off, too."""
        self._load("all")
        own = {BUILTIN, *(given if isinstance(given, str) else _module_of(given) for given, _ in self._builtin)}
        return sorted(self._plugins.values(), key=lambda plugin: plugin.name not in own)


def _check_marked(plugin: object) -> None:
    """Raise TypeError for a function that is called as a hook and not marked as one: pluggy would pass it over."""
    for hook in (name for name in dir(plugin) if name.startswith("nestopt_register")):
        function = getattr(plugin, hook, None)
        marks = (f"{hookspecs.PROJECT}_impl", f"{hookspecs.PROJECT}_spec")
        if callable(function) and not any(hasattr(function, mark) for mark in marks):
            raise TypeError(f"{hook} is not marked as a hook; write @nestopt.hookimpl above it")


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _module_of(plugin: object) -> str:
    return getattr(plugin, "__name__", type(plugin).__module__)


registry = Registry()
"""The registry that nestopt uses."""
label_by(registry.name_of)
