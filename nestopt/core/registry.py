"""What is known by name: levels, parts and more, from nestopt itself and from installed plugins."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import pluggy
import torch

from nestopt._version import VERSION
from nestopt.core import hookspecs
from nestopt.core.features import Features
from nestopt.core.level import Level
from nestopt.core.memories import Memory
from nestopt.core.objectives import Objective
from nestopt.core.outputs import Output
from nestopt.core.part import is_subclass, label_by, nearest
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
    "optimizer": (torch.optim.Optimizer, "nestopt_register_optimizers"),
    "model": (Mapping, "nestopt_register_models"),
    "schedule": ("nestopt.train.schedule:Schedule", "nestopt_register_schedules"),
    "callback": ("nestopt.train.callbacks:Callback", "nestopt_register_callbacks"),
    "logger": ("nestopt.train.loggers:Logger", "nestopt_register_loggers"),
    "command": ("nestopt.command:Command", "nestopt_register_commands"),
}
"""Each kind of thing: its base class (or where that is, if it loads when it is used), and the hook that registers it.

What is registered is a subclass of it; of `OBJECTS`, an instance.
"""

OBJECTS = {"model"}
"""Kinds of which objects are registered, not classes."""

WORDS = {"model", "command"}
"""Kinds whose names may have hyphens and dots."""

SLOW = 1.0
"""Seconds from which on the import of a plugin is called slow."""


def base_of(kind: str) -> type[Any]:
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
        provides: what it registered, as (kind, name); `KINDS[kind][1]` is the hook.
        error: why it was skipped, or None.
        blocked: whether it was switched off.
        version: of its distribution; None without one.
        seconds: that its import took.
        traceback: of the error, where it is one of Python's.
    """

    name: str
    source: str
    provides: tuple[tuple[str, str], ...] = ()
    error: str | None = None
    blocked: bool = False
    version: str | None = None
    seconds: float = 0.0
    traceback: str | None = None


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
        self._classes: dict[str, dict[str, tuple[Any, str]]] = {kind: {} for kind in KINDS}
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
            entry = self._take_point(point, off=every or point.name in names or point.name in self._blocked)
            if entry.error:
                text = f"plugin {point.name!r} ({entry.source}) is skipped: {entry.error}"
                warnings.warn(text, PluginWarning, stacklevel=2)
        for name, plugin in self._added.items():
            self._take(plugin, name, source=_module_of(plugin))

    def _take_point(self, point: importlib.metadata.EntryPoint, off: bool) -> Plugin:
        """Import what an entry point names and register it, unless it is `off` or needs another nestopt."""
        dist, name = point.dist, point.name
        source, version = (f"{dist.name} {dist.version}", dist.version) if dist else (point.value, None)
        if off:
            return self._note(Plugin(name, source, blocked=True, version=version))
        if dist and (problem := _unmet(dist.requires or ())):
            return self._note(Plugin(name, source, error=problem, version=version))
        begin = time.perf_counter()
        try:
            plugin = point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a SystemExit, too: one broken plugin ends no program
            why = f"import failed: {_say(error)}"
            return self._note(Plugin(name, source, error=why, version=version, traceback=_whole(error)))
        return self._take(plugin, name, source, version, time.perf_counter() - begin)

    def _take(self, plugin: object, name: str, source: str, version: str | None = None, seconds: float = 0.0) -> Plugin:
        """Register `plugin` and run its hooks. All or nothing: an error leaves none of its names behind."""
        if name in self._plugins:
            taken = f"another plugin is called {name!r} ({self._plugins[name].source})"
            return self._note(Plugin(name, source, error=taken, version=version))
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
            entry = Plugin(name, source, provides, version=version, seconds=seconds)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._forget(name)
            entry = Plugin(name, source, error=_say(error), version=version, seconds=seconds, traceback=_whole(error))
        return self._note(entry)

    def _note(self, entry: Plugin) -> Plugin:
        """Keep an entry, under a key of its own where another plugin has its name, so that both are listed."""
        taken = entry.name in self._plugins
        self._plugins[f"{entry.name} ({entry.source})" if taken else entry.name] = entry
        return entry

    def _registrar(self, kind: str, owner: str) -> hookspecs.Register:
        hook = KINDS[kind][1]

        def register(name: str, cls: Any) -> None:
            if kind in self._waiting:
                self._take_builtin(kind)  # whose names come first
            base = base_of(kind)
            full = f"{base.__module__}.{base.__qualname__}"
            if kind in OBJECTS and not isinstance(cls, base):
                raise TypeError(f"{hook}: {name!r} is {cls!r}, not a {full}")
            if kind not in OBJECTS and not is_subclass(cls, base):
                raise TypeError(f"{hook}: {name!r} is {cls!r}, not a subclass of {full}")
            if inspect.isabstract(cls):
                raise TypeError(f"{hook}: {name!r} lacks {', '.join(sorted(getattr(cls, '__abstractmethods__', ())))}")
            if kind in WORDS:
                if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                    raise ValueError(f"{hook}: {name!r} is not a name; use letters, digits, '_', '-' and '.'")
            elif not name.isidentifier():
                raise ValueError(f"{hook}: {name!r} is not a name; use letters, digits and '_'")
            if name in self._classes[kind]:
                raise ValueError(f"the {kind} name {name!r} is taken by plugin {self._classes[kind][name][1]!r}")
            self._classes[kind][name] = (cls, owner)
            if isinstance(cls, type):
                self._names.setdefault(cls, name)

        return register

    def _forget(self, owner: str) -> None:
        for known in self._classes.values():
            for name in [name for name, (_, by) in known.items() if by == owner]:
                if isinstance(thing := known.pop(name)[0], type):
                    self._names.pop(thing, None)

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


def _unmet(requires: Iterable[str]) -> str | None:
    """Say why a distribution with these requirements can't be used with this nestopt; None where it can."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    for text in requires:
        try:
            need = Requirement(text)
        except InvalidRequirement:  # of an old tool, on something else
            continue
        ours = canonicalize_name(need.name) == "nestopt" and (need.marker is None or need.marker.evaluate())
        if ours and not need.specifier.contains(VERSION, prereleases=True):
            return (
                f"it needs nestopt{need.specifier}, and nestopt {VERSION} is installed; install another version of it"
            )
    return None


def _whole(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _module_of(plugin: object) -> str:
    return getattr(plugin, "__name__", type(plugin).__module__)


registry = Registry()
"""The registry that nestopt uses."""
label_by(registry.name_of)
